"""Folders of transformers models, as `hf:` reads them."""

import json
from pathlib import Path
from typing import Any


def write_processor(folder: Path, size_px: int | tuple[int, int], **more: Any) -> None:
    """Write the image processor of a model with this input, (y, x) or square."""
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    said = {"size": {"height": height, "width": width}, **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
