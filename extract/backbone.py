"""A backbone: its facts (`BackboneEntry`), and itself once loaded (`Backbone`).

    int16 HU ──channels──▶ 0..1 (or HU) ──pixels──▶ its own size, mean, sd ──module──▶ tokens

An entry is a row of literal facts, each with where it is stated; its loader imports the library
that it needs. Everything a backbone does to an image after windowing happens here, on the device,
and is in `settings`, because it decides what a row of a store means.

Tokens: `cls` is the class token after the final norm or, in a model without one, the one vector
that the model itself sums a slice up in, so that it exists for every slice backbone; `mean` is
the mean of the patch tokens, without class and register tokens; `pooler` is the output of a
trained pooling head.

A slice backbone gives one row a slice. A volume backbone gives one row a scan: its `channels` are
one sample (1 m z y x), padded or cropped about their middle to the size that it takes, and never
resized, because the grid (`BackboneEntry.grid`) already has its spacing.

Axes: s samples (slices, or one volume), m channels, z slices, y rows, x columns, d embedding.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ctfm.extract.augment import Jitter
from ctfm.extract.config import Grid
from ctfm.extract.hub import WANTED, hub_folder
from ctfm.extract.trial import check_repeatable
from ctfm.extract.weight_files import commit_of
from ctfm.extract.windows import fit_to, jitter_hu, to_channels
from ctfm.store.errors import BackboneError, ConfigError

Windows = Sequence[tuple[float, float]]
Precision = Literal["float32", "bfloat16"]
Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user said of a backbone that is not in the registry."""

    name: str
    """With the prefix of its family, or the name of a program's file."""

    weights: Path | None = None
    """A file or folder, in place of the hub where there is one."""

    trust_remote_code: bool = False
    """Whether code that comes with it may run."""

    download: bool = True
    """Whether what is not on this machine may be fetched."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """What a loader gives back."""

    module: nn.Module
    """In evaluation mode, float32, on the CPU: pixels (s m y x), (s m z y x) to {token: (s d)}."""

    digest: str
    """SHA-256 of the content of the weights (`digest_tensors`), or of the settings without any."""

    entry: "BackboneEntry | None" = None
    """The facts as the checkpoint's own configuration states them; None: those of the registry."""

    remarks: tuple[str, ...] = ()
    """What of the checkpoint was cut off, left out or chosen."""


Loader = Callable[["BackboneEntry", Path | None], Loaded]
"""Entry and weights to a module; None only where the entry has no repository to take them from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BackboneEntry:
    """The facts about one backbone; `sources` says where each is stated."""

    name: str
    """As `--model` takes it."""

    architecture: str
    """One phrase for a table."""

    hub_id: str | None
    """Repository on the Hugging Face hub; None if the weights are not there, or it has none."""

    revision: str | None
    """Commit of the repository. None is not pinned: the store says which commit was used."""

    licence: str
    """Of the weights."""

    gated: bool
    """Whether access has to be asked for."""

    tokens: Mapping[str, int]
    """d of each token it gives; the first is the default one."""

    parameters: int
    """Parameters of the tower that makes the tokens."""

    load: Loader
    """Entry and weights to a module, completely or `BackboneError`."""

    sources: Mapping[str, str]
    """Field name to where its value is stated."""

    describe: Callable[["BackboneEntry", Path], "BackboneEntry"] | None = None
    """Entry and weights to the facts as a file beside the weights states them; None: none does."""

    input: Literal["windows", "hu"] = "windows"
    """Window channels in 0..1, or one channel of HU."""

    unit: Literal["slice", "volume"] = "slice"
    """What one embedding is of."""

    channels: int = 3
    """Channels that the module takes."""

    size_px: tuple[int, ...] | None = None
    """Input size (y, x), or (z, y, x) of a volume backbone; None takes the grid as it is."""

    mean: tuple[float, ...] = ()
    """Subtracted from each channel after the resize; empty: nothing is."""

    sd: tuple[float, ...] = ()
    """Divides each channel after the mean; empty: nothing does."""

    interpolation: Interpolation = "bilinear"
    """Of the resize. Bicubic overshoots, and is clipped to 0..1 as in an 8-bit pipeline."""

    antialias: bool = True
    """Of the resize; without effect when it enlarges."""

    native_windows_hu: tuple[tuple[float, float], ...] | None = None
    """Windows it was trained with; None if it was not trained on CT."""

    own_preprocessing: bool = False
    """Whether its own windows are used, and not the paper's, unless the user says otherwise."""

    own_window: bool = False
    """Whether a last channel is added to the windows: the scan's own minimum to maximum."""

    grid: Grid | None = None
    """Grid it was trained on; None takes the paper's. `default_settings` hands it on."""

    pad_hu: float = -1000.0
    """What a volume is padded with where it has fewer slices or pixels than `size_px`."""

    batch_size: int = 64
    """Samples a forward pass on a GPU, unless the user says otherwise."""

    files: tuple[str, ...] = WANTED
    """Patterns of what is needed of the hub's repository."""

    tower: re.Pattern[str] | None = None
    """Matches the names of its tensors in a larger checkpoint, of whose shards the others are not
    fetched; None needs all."""

    skeleton: Callable[[], nn.Module] | None = None
    """Its module on the meta device, without weights, of the shape that `parameters` is counted
    for; None if only a checkpoint tells it."""

    released: Callable[[str], str] = str
    """The release's name of a tensor of its module: adapters of either name are understood."""

    takes_key: bool = True
    """Whether a part of its checkpoint can be chosen (`weights_key`)."""

    weights_key: str | None = None
    """Which part of the checkpoint is to be loaded, as the user says; None: there is one."""

    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    """In which types it can compute."""

    remote_code: str | None = None
    """SHA-256 of code that came with the model and runs, because the user trusts it; None if none
    does."""

    foreign: bool = False
    """Whether the network is any that another library builds, or the user's own program: it is
    tried when it is loaded (`ctfm.extract.trial`). Those of the registry are held by tests."""

    lora_targets: Mapping[str, str] = field(default_factory=dict)
    """Key layout (`hf`, `timm`) to a pattern that whole names of the attention projections match.

    A pattern and not a suffix: `proj` would also hit a patch embedding, `out_proj` a pooling head
    whose LoRA does nothing.
    """

    def __post_init__(self) -> None:
        """Refuse a normalisation that leaves no numbers.

        Raises:
            BackboneError: If an sd is not positive, or a number is none.
        """
        if not all(0 < sd < math.inf for sd in self.sd) or not all(map(math.isfinite, self.mean)):
            raise BackboneError(
                f"{self.name} is said to be normalised by mean {self.mean} and sd {self.sd}: each "
                "has to be a number, and an sd more than 0. Mend it where it is written, in a "
                "local copy"
            )


_OF_EVERY_ENTRY = (
    *("architecture", "hub_id", "revision", "licence", "gated", "tokens", "parameters"),
    *("channels", "size_px", "mean", "sd", "interpolation", "antialias", "native_windows_hu"),
)
FACTS = (*_OF_EVERY_ENTRY, "own_window", "grid", "pad_hu", "lora_targets")
"""Fields of an entry that need a source, the last four only where they are not the default."""


def one_source(stated_in: str) -> dict[str, str]:
    """`sources` of an entry all of whose facts are stated in one place."""
    return dict.fromkeys(_OF_EVERY_ENTRY, stated_in)


def one_line(error: Exception) -> str:
    """What a library says of a failure, short enough for a sentence of ours."""
    return " ".join(str(error).split())[:500]


def interpolation_of(name: str, *, source: str) -> Interpolation:
    """The interpolation that a library calls so.

    Args:
        name: As PIL has it, in small letters.
        source: What says it, for the message.

    Raises:
        BackboneError: If slices are not resized so here.
    """
    usable: dict[str, Interpolation] = {"bilinear": "bilinear", "bicubic": "bicubic"}
    if name not in usable:
        raise BackboneError(
            f"{source} resizes by {name} interpolation, and slices are resized by bilinear or "
            "bicubic interpolation: write one of these there in a local copy, and pass its folder, "
            "if that will do"
        )
    return usable[name]


def default_settings(entry: BackboneEntry) -> dict[str, Any]:
    """Fields of `ExtractConfig` that a backbone decides when the user says nothing about them."""
    settings = {} if entry.grid is None else asdict(entry.grid)
    if entry.own_preprocessing and entry.native_windows_hu is not None:
        settings["windows_hu"] = entry.native_windows_hu
    return settings


def sample_positions(
    entry: BackboneEntry, position_mm: Float32[np.ndarray, " s"]
) -> Float32[np.ndarray, " n"]:
    """`position_mm` of the rows that a scan with slices there gets from this backbone.

    Those of its slices; of a volume backbone, whose row stands for them all, their middle.
    """
    if entry.unit == "slice":
        return position_mm
    middle_mm = (position_mm[0] + position_mm[-1]) / 2
    return np.array([middle_mm], np.float32)


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """A LoRA adapter that is in the weights of a backbone."""

    digest: str
    """SHA-256 of its tensors and its scaling."""

    max_relative_error: float
    """Of the merged tokens against the unmerged ones, on a probe batch in float32."""

    scan_ids: frozenset[str] = frozenset()
    """Scans it was trained on, as far as it says."""

    patient_ids: frozenset[str] = frozenset()
    """Patients it was trained on, as far as it says."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A loaded backbone on a device, in a precision."""

    entry: BackboneEntry
    module: nn.Module
    """Pixels (s m y x) or (s m z y x) to {token: (s d)}; what LoRA training wraps."""
    digest: str
    """SHA-256 of the content of the weights as they were loaded."""
    tokens: Mapping[str, int]
    """d of each token that `embed` returns."""
    device: torch.device
    precision: Precision = "float32"
    commit: str | None = None
    """Of the hub repository that the weights are from; None if they are from somewhere else."""
    adapter: MergedAdapter | None = None
    """What was merged into the weights."""
    remarks: tuple[str, ...] = ()
    """What of the checkpoint and the adapter was cut off, left out or chosen; decides nothing."""

    @property
    def name(self) -> str:
        """As `--model` takes it."""
        return self.entry.name

    def settings(self) -> dict[str, Any]:
        """Weights and everything done to an image after windowing, as plain JSON values."""
        entry = self.entry
        volume = {"unit": "volume", "own_window": entry.own_window, "pad_hu": entry.pad_hu}
        code = {} if entry.remote_code is None else {"remote_code": entry.remote_code}
        return {
            "weights": self.digest,
            "input": entry.input,
            "size_px": None if entry.size_px is None else list(entry.size_px),
            "interpolation": entry.interpolation,
            "antialias": entry.antialias,
            "mean": list(entry.mean),
            "sd": list(entry.sd),
            **(volume if entry.unit == "volume" else {}),
            **code,
            **({} if self.adapter is None else {"adapter": self.adapter.digest}),
        }

    def to(self, device: str | torch.device, precision: Precision = "float32") -> "Backbone":
        """The same backbone on a device and in a precision; its module is moved, not copied.

        Raises:
            ConfigError: If it cannot compute in that precision, or was rounded to bfloat16 and
                float32 is asked for.
        """
        if precision not in self.entry.precisions:
            raise ConfigError(
                f"{self.name} computes in {' or '.join(self.entry.precisions)}, not {precision}"
            )
        if (self.precision, precision) == ("bfloat16", "float32"):
            raise ConfigError(
                f"{self.name} was rounded to bfloat16 and cannot be float32 again: load it anew"
            )
        _cast(self.module.to(device), _DTYPES[precision])
        return replace(self, device=torch.device(device), precision=precision)

    def channels(
        self,
        hu: Int16[Tensor, "z y x"] | Float[Tensor, "z y x"],
        windows_hu: Windows,
        jitter: Jitter | None = None,
    ) -> Float[Tensor, "s m *size"]:
        """Slices of one scan as the channels this backbone takes, float32, on its device.

        Args:
            hu: In HU, vertex first.
            windows_hu: (low, high) a channel. A backbone that takes HU ignores them, but for the
                scale of `jitter`: that of the narrowest one.
            jitter: Brightness and noise of an augmented view.

        Returns:
            One sample a slice (m y x), or one a scan (m z y x).

        Raises:
            ConfigError: If the backbone takes another number of channels.
        """
        entry = self.entry
        hu = hu.to(self.device, non_blocking=True)
        if entry.unit == "volume" and entry.size_px is not None:
            hu = fit_to(hu, entry.size_px, fill=entry.pad_hu)
        if entry.input == "hu":
            channels = hu[:, None].to(torch.float32)
            narrowest = min(windows_hu, key=lambda window: window[1] - window[0])
            if jitter is not None:
                channels = jitter_hu(channels, jitter, window_hu=narrowest)
        else:
            self._check_windows(windows_hu)
            channels = to_channels(hu, windows_hu, own_window=entry.own_window, jitter=jitter)
        return channels.transpose(0, 1)[None] if entry.unit == "volume" else channels

    def _check_windows(self, windows_hu: Windows) -> None:
        own = int(self.entry.own_window)
        if len(windows_hu) + own != self.entry.channels:
            added = ", one of them the scan's own range" if own else ""
            raise ConfigError(
                f"{self.name} takes {self.entry.channels} channels{added}, got {len(windows_hu)} "
                "windows: pass one LOW:HIGH for each to --windows"
            )

    def pixels(self, channels: Float[Tensor, "s m *size"]) -> Float[Tensor, "s m *new"]:
        """Channels resized and normalised as this backbone was trained, in its precision."""
        entry = self.entry
        resized = entry.unit == "slice" and entry.size_px is not None
        if resized and channels.shape[2:] != entry.size_px:
            channels = interpolate(
                channels, size=entry.size_px, mode=entry.interpolation, antialias=entry.antialias
            )
            if entry.interpolation == "bicubic" and entry.input == "windows":
                channels = channels.clamp_(0.0, 1.0)
        if entry.mean:
            shape = (-1,) + (1,) * (channels.ndim - 2)
            mean, sd = (
                torch.tensor(values, device=channels.device).reshape(shape)
                for values in (entry.mean, entry.sd)
            )
            channels = (channels - mean).div_(sd)
        return channels.to(_DTYPES[self.precision])

    def embed(self, channels: Float[Tensor, "s m *size"]) -> dict[str, Float[Tensor, "s _"]]:
        """Every token of every sample, (s d) float32; not differentiable.

        Samples may come from several scans. A result may hold NaN if the module gives it: the
        caller checks.

        Args:
            channels: From `channels`.
        """
        with torch.inference_mode():
            tokens = self.module(self.pixels(channels))
            return {name: tokens[name].to(torch.float32) for name in self.tokens}


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_backbone(
    entry: BackboneEntry,
    weights: str | Path | None = None,
    *,
    tokens: Sequence[str] | None = None,
    weights_key: str | None = None,
    download: bool = True,
) -> Backbone:
    """Load an entry's weights, completely or not at all, on the CPU in float32.

    Args:
        entry: Which backbone.
        weights: A file or folder; None takes the hub cache, else the hub.
        tokens: Which tokens `embed` returns; None is all of them.
        weights_key: Which part of a checkpoint that holds the network more than once, such as
            `model_ema`.
        download: Whether the network may be used.

    Raises:
        ChoiceError: If a key is needed.
        BackboneError: If it has no such token, takes no key, or the weights are not to be had, not
            complete, or another model's, or it gives an image other tokens each time or in other
            company.
    """
    unknown = [token for token in tokens or () if token not in entry.tokens]
    if unknown:
        raise BackboneError(
            f"{entry.name} has no token {unknown[0]!r}: choose from {', '.join(entry.tokens)}"
        )
    if weights_key is not None and not entry.takes_key:
        raise BackboneError(
            f"{entry.name} takes no --weights-key: save the part that is meant by itself"
        )
    place = None if weights is None else Path(weights)
    if place is None and entry.hub_id is not None:
        place = hub_folder(
            entry.hub_id,
            revision=entry.revision,
            gated=entry.gated,
            files=entry.files,
            tower=entry.tower,
            download=download,
        )
    loaded = entry.load(replace(entry, weights_key=weights_key), place)
    entry = loaded.entry or entry
    backbone = Backbone(
        entry=entry,
        module=loaded.module.eval().requires_grad_(False),
        digest=loaded.digest,
        tokens={token: entry.tokens[token] for token in tokens or entry.tokens},
        device=torch.device("cpu"),
        commit=None if place is None else commit_of(place),
        remarks=loaded.remarks,
    )
    if entry.foreign:
        _try(backbone)
    return backbone


def _try(backbone: Backbone) -> None:
    entry = backbone.entry
    assert entry.size_px is not None
    generator = torch.Generator().manual_seed(0)
    channels = torch.rand(2, entry.channels, *entry.size_px, generator=generator)
    check_repeatable(
        backbone.module, backbone.pixels(channels), tokens=entry.tokens, name=entry.name
    )


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    # Rotary frequencies rounded to bfloat16 would move the patches; transformers keeps them in
    # float32 when it loads in bfloat16, `Module.to` does not.
    owners = [m for m in module.modules() if "inv_freq" in m._buffers]
    frequencies = [owner.inv_freq for owner in owners]
    module.to(dtype)
    for owner, frequency in zip(owners, frequencies, strict=True):
        owner.inv_freq = frequency
