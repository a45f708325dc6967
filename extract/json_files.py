"""JSON files: from one that nobody vouches for, to the object in it.

What is too large, no JSON, or something else than an object counts as unreadable.
"""

import json
from collections.abc import Mapping
from typing import Any

from ctfm.extract.sources import Opener
from ctfm.store.errors import ScanError

MAX_BYTES = 1 << 20


def read_object(opener: Opener, file: str) -> Mapping[str, Any] | None:
    """The object that a file holds; None if it cannot be read or holds none."""
    try:
        with opener.open(file) as stream:
            content = stream.read(MAX_BYTES + 1)
        said = json.loads(content) if len(content) <= MAX_BYTES else None
    except (OSError, ScanError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None
