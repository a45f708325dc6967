"""A path as a model: a TorchScript file or an exported program, to tokens.

Such a file is a program, and opening it runs what its author put there: TorchScript as it is
unpacked, an exported program through pickled example inputs and constants, sizes that are
evaluated as Python, and compiled libraries. torch says so of both, and has no safe way to open
either (SECURITY.md; `torch.export.load`). So one is opened only if the user says that its code may
run (`--trust-remote-code`). The file's digest is in the store's settings.

What a program cannot tell stands in a TOML file beside it with the same stem
(`ctfm.extract.description`): `size_px` and `tokens` at least. It takes pixels (s m y x), or
(s m z y x) of whole scans, any number of samples at once, and gives a tensor (s d), several, or a
mapping from token to tensor.

Axes: s samples, m channels, z slices, y rows, x columns, d embedding.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import Asked, BackboneEntry, Loaded, one_source
from ctfm.extract.checkpoints import kind_of
from ctfm.extract.config import PAPER_WINDOWS_HU
from ctfm.extract.description import described
from ctfm.store.errors import BackboneError
from ctfm.store.provenance import file_sha256

SUFFIXES = (".pt2", ".pt", ".pth", ".ts")
"""A name that ends so is a path, not a name of the registry."""

EXAMPLE = "size_px = [224, 224] and tokens = { cls = 768 }"


class ProgramTokens(nn.Module):
    """Pixels to tokens.

    Args:
        program: Callable with pixels.
        tokens: Name and d of each output, in their order.
    """

    def __init__(self, program: Any, tokens: Mapping[str, int]) -> None:
        super().__init__()
        self.program = program
        self.tokens = dict(tokens)

    def train(self, mode: bool = True) -> "ProgramTokens":
        """Nothing: a program stays in the mode in which it was saved."""
        del mode
        return self

    def forward(self, pixels: Float[Tensor, "s m *size"]) -> dict[str, Float[Tensor, "s _"]]:
        """The outputs under the names of the description."""
        outputs = self.program(pixels)
        if isinstance(outputs, Mapping):
            return {name: outputs[name] for name in self.tokens}
        several = (outputs,) if isinstance(outputs, Tensor) else outputs
        return dict(zip(self.tokens, several, strict=True))


def program_entry(asked: Asked) -> BackboneEntry:
    """The facts about a program, from the file beside it; the program is not opened.

    Raises:
        BackboneError: If the file is not there, is no program, or is not described.
    """
    file = asked.weights
    if file is None or not file.is_file():
        raise BackboneError(f"no program at {file}: pass its path as --model or as --weights")
    kind = kind_of(file)
    if kind not in ("TorchScript", "exported program"):
        raise BackboneError(
            f"{file} is no TorchScript file and no exported program (its content: {kind}): "
            "weights go to --weights, with the model that they are of as --model"
        )
    description = file.with_suffix(".toml")
    if not description.is_file():
        raise BackboneError(
            f"{file} does not tell what goes in: write {description.name} beside it, with "
            f"{EXAMPLE} at least"
        )
    plain = BackboneEntry(
        name=asked.name,
        architecture=kind,
        hub_id=None,
        revision=None,
        licence="see its author",
        gated=False,
        tokens={},
        parameters=0,
        load=partial(load_program, file=file, trusted=asked.trust_remote_code),
        sources=one_source(description.name),
        native_windows_hu=PAPER_WINDOWS_HU,
        own_preprocessing=True,
        takes_key=False,
        precisions=("float32",),
        foreign=True,
    )
    return described(plain, description)


def load_program(
    entry: BackboneEntry, weights: Path | None, *, file: Path, trusted: bool
) -> Loaded:
    """Open a program, if its code may run.

    Args:
        entry: From `program_entry`.
        weights: Not looked at: the file was found with the entry.
        file: The program.
        trusted: Whether the user said so.

    Raises:
        BackboneError: If it may not run, or cannot be opened.
    """
    del weights
    if not trusted:
        raise BackboneError(
            f"{file} is a program ({entry.architecture}), and whoever made it can have it do "
            "anything on this machine, already as it is opened: pass --trust-remote-code if you "
            "trust its author, or use its weights as safetensors with a model that ctfm has"
        )
    try:
        program = _open(file, kind=entry.architecture)
    except Exception as error:  # what a program raises as it is opened is up to its author
        raise BackboneError(f"{file} cannot be opened: {_one_line(error)}") from error
    module = ProgramTokens(program, entry.tokens)
    digest = file_sha256(file)
    # None at all would say that it has no weights; a frozen program has them as constants.
    parameters = max(1, sum(parameter.numel() for parameter in module.parameters()))
    own = replace(entry, parameters=parameters, remote_code=digest)
    return Loaded(module=module, digest=digest, entry=own)


def _open(file: Path, *, kind: str) -> Any:
    if kind == "exported program":
        return torch.export.load(file).module()
    with warnings.catch_warnings():
        # TorchScript is deprecated, and still what people have.
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
