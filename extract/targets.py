"""A target by name: what a command line or another machine can say about a store to fill."""

from dataclasses import dataclass, replace
from pathlib import Path

from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.lora import merge_adapter
from ctfm.extract.pipeline import Target


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """A target whose backbone is not loaded: small, hashable, and the same on every machine."""

    config: ExtractConfig
    """`config.backbone` is the model."""

    store: str
    """A folder that every machine sees under this path, or a URL."""

    weights: str | None = None
    """A file or folder in place of the hub."""

    weights_key: str | None = None
    """Which part of a checkpoint that holds the network more than once."""

    adapter: str | None = None
    """Folder of a LoRA adapter to merge."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    def absolute(self) -> "TargetSpec":
        """The same target for a process in another folder; a URL stays as it is."""
        return replace(
            self,
            store=self.store if "://" in self.store else str(Path(self.store).absolute()),
            weights=None if self.weights is None else str(Path(self.weights).absolute()),
            adapter=None if self.adapter is None else str(Path(self.adapter).absolute()),
        )

    def load(self) -> Target:
        """Load the backbone, on the CPU in float32, and merge the adapter.

        Raises:
            ChoiceError: If a key is needed to say which part of the checkpoint is meant.
            BackboneError: If there is no such backbone or token, or the weights do not load, or
                the adapter does not fit.
        """
        backbone = get_backbone(
            self.config.backbone,
            self.weights,
            tokens=self.config.tokens,
            trust_remote_code=self.trust_remote_code,
            weights_key=self.weights_key,
        )
        if self.adapter is not None:
            backbone = merge_adapter(backbone, Path(self.adapter))
        return Target(backbone=backbone, config=self.config, store=self.store)


def default_store(features: Path, model: str, adapter: Path | None = None) -> Path:
    """Where a model's features go: a folder of its name, and of its adapter's."""
    name = model if adapter is None else f"{model}+{adapter.resolve().name}"
    return features / name.replace(":", "-").replace("/", "-")
