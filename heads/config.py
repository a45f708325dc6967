"""What decides a head, apart from the embeddings and the labels."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ctfm.store.errors import ConfigError

PoolName = Literal["attention", "mean"]
AlphaForm = Literal["balanced", "complement", "none"]
Precision = Literal["float32", "bfloat16"]

_LEAST = {
    "experts": 0,
    "rank": 1,
    "router_hidden": 1,
    "gamma": 0,
    "lr_head": 0,
    "lr_molre": 0,
    "weight_decay": 0,
    "batch_size": 1,
    "min_epochs": 1,
    "patience": 1,
    "min_positives": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides a head, and nothing that does not.

    The defaults are the paper's where it states a value (Sec. 2.2 of the MoLRE paper), else the
    source is named. Device and progress are arguments of `fit_head`.
    """

    experts: int = 6
    """K; 1 is LoRA with a trivial router, 0 is no adapter."""

    rank: int = 8
    """r of every expert."""

    router_hidden: int = 256
    """d_h, hidden width of the router."""

    expert_bias: bool = False
    """Whether each expert adds a vector of its own; Eq. 1 has none, the counts of Table 2 do."""

    pool: PoolName = "attention"
    """How slices become one embedding (Algorithm 1; the mean is the baseline)."""

    token: str = "cls"
    """Which embedding of a slice, as the feature store names it."""

    findings: tuple[str, ...] = ()
    """Which findings, in this order; none named is every finding of the labels."""

    gamma: float = 2.0
    """γ of the focal loss."""

    alpha: AlphaForm = "balanced"
    """Form of the prevalence weights α_t: see `losses.ALPHA_FORMS`."""

    lr_head: float = 1e-3
    """Learning rate of query and classifier."""

    lr_molre: float = 1e-4
    """Learning rate of experts and router."""

    weight_decay: float = 0.01
    """Of AdamW, on all but biases and the query; the paper states none, this is torch's default."""

    batch_size: int = 32
    """Scans of a step; the paper states none."""

    min_epochs: int = 20
    """Fitting never stops before."""

    patience: int = 5
    """Fitting stops when this many epochs brought no better validation macro AUC."""

    max_epochs: int = 100
    """Fitting stops here at the latest; the paper states none."""

    repeat_threshold: float | Literal["auto"] = "auto"
    """t of repeat-factor sampling. `auto`: the largest with an epoch of at most 1.4 times the
    scans; 0: no repeats; 0.001: as LVIS, which does almost nothing at the paper's prevalences."""

    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of patients in train, validation and test, unless the labels have a `split` column."""

    split_salt: str = "ctfm"
    """Another salt draws another split."""

    min_positives: int = 5
    """Fewest scans with, and fewest without, a finding for its AUC to enter a macro AUC."""

    precision: Precision = "float32"
    """Type of the products with the embeddings; everything else is float32."""

    seed: int = 0
    """Of the first parameters, the order of scans and the rounding of repeats."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_names()
        threshold = self.repeat_threshold
        if threshold != "auto" and not (isinstance(threshold, float | int) and 0 <= threshold <= 1):
            raise ConfigError(f"repeat_threshold must be auto or within 0..1, got {threshold!r}")
        fractions = tuple(float(share) for share in self.split_fractions)
        usable = len(fractions) == 3 and fractions[0] > 0 and min(fractions) >= 0
        if not usable or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
            raise ConfigError(
                "split_fractions must be three shares that add up to 1, some for train, got "
                f"{fractions}"
            )
        # TOML tells 0 from 0.0 and lists from tuples, and equal settings must be equal.
        object.__setattr__(self, "split_fractions", fractions)
        object.__setattr__(self, "findings", tuple(self.findings))
        for name in ("gamma", "lr_head", "lr_molre", "weight_decay"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if threshold != "auto":
            object.__setattr__(self, "repeat_threshold", float(threshold))

    def _check_sizes(self) -> None:
        for name, lowest in (_LEAST | {"max_epochs": self.min_epochs}).items():
            value = getattr(self, name)
            if not lowest <= value < math.inf:
                raise ConfigError(f"{name} must be at least {lowest}, got {value}")

    def _check_names(self) -> None:
        for name, choices in (("pool", PoolName), ("alpha", AlphaForm), ("precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        if twice := {name for name in self.findings if self.findings.count(name) > 1}:
            raise ConfigError(f"findings must differ, got {', '.join(sorted(twice))} twice")

    def as_dict(self) -> dict[str, Any]:
        """As plain values that TOML and JSON can hold; `from_dict` turns it back."""
        values = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FitConfig":
        """Rebuild a config from what `as_dict` gave; settings that are left out are the defaults.

        Raises:
            ConfigError: If a setting is unknown or out of its range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(
                f"unknown settings of a fit: {', '.join(unknown)}. Known are {', '.join(known)}"
            )
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**plain)


PRESETS = {
    "default": FitConfig(),
    "paper": FitConfig(expert_bias=True, alpha="complement", repeat_threshold=0.001),
}
"""`paper` reads the paper to the letter where the defaults depart from it: the expert biases that
its parameter counts imply, α_t = 1 - prevalence, and the repeat threshold of the LVIS paper."""
