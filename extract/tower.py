"""A tower: a network whose shape is known beforehand, from any layout of its checkpoint.

A family says how to build it, how to read its checkpoints, and what the release calls the module's
tensors; the rest is the same for all. Whatever the layout of a file, its tensors are checked and
digested under the names of the release, which no version of a library changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ctfm.extract.backbone import BackboneEntry, Loaded
from ctfm.extract.weights import Found, digest_tensors, load_completely
from ctfm.store.errors import BackboneError


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What a family knows of one of its networks; `load` and `build` serve a `BackboneEntry`."""

    build: Callable[[], nn.Module]
    """Pixels to tokens, without weights: its parameters are on the meta device."""

    read: Callable[[Path, str | None], Found]
    """A checkpoint of any layout, and the key of the part that is meant, to its tensors, under the
    names of the release."""

    released: Callable[[str], str]
    """The release's name of a tensor of the module."""

    def load(self, entry: BackboneEntry, weights: Path | None) -> Loaded:
        """Read the weights into the network, completely or not at all.

        Raises:
            BackboneError: If there are none, or they do not fit exactly.
        """
        if weights is None:
            raise BackboneError(f"{entry.name} has no repository: pass `--weights FILE`")
        found = self.read(weights, entry.weights_key)
        return fill(self.build(), found, entry=entry, source=weights, released=self.released)


def fill(
    module: nn.Module,
    found: Found,
    *,
    entry: BackboneEntry,
    source: Path,
    released: Callable[[str], str] = str,
) -> Loaded:
    """Put a checkpoint into a module, completely or not at all, and digest it.

    Args:
        module: What to fill; may be on the meta device.
        found: All tensors of the network, by the names of the release.
        entry: The facts of the backbone, as the checkpoint states them.
        source: What the tensors were read from, for the message.
        released: The release's name of a tensor of the module.

    Raises:
        BackboneError: Naming the first tensors that are missing, unexpected or misshapen.
    """
    names = {released(name): name for name in module.state_dict()}
    load_completely(module, found.tensors, source=f"{source} as {entry.name}", names=names)
    held = module.state_dict()
    digest = digest_tensors({of_release: held[name] for of_release, name in names.items()})
    return Loaded(module=module, digest=digest, entry=entry, remarks=found.remarks)
