"""What decides a head, apart from the embeddings and the labels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from ctfm.store.errors import ConfigError
from ctfm.store.shares import check_fractions

AdapterName = Literal["molre", "lora", "mlp", "linear", "none"]
PoolName = Literal["attention", "gated", "mean", "max", "multihead", "per-finding"]
JoinName = Literal["slices", "scans"]
LossName = Literal["focal", "bce", "asymmetric"]
AlphaForm = Literal["balanced", "complement", "none", "sqrt", "effective", "retinanet"]
ScheduleName = Literal["constant", "cosine"]
SplitMethod = Literal["hash", "stratified"]
ViewsName = Literal["random", "clean"]
Precision = Literal["float32", "bfloat16"]

_CHOICES: dict[str, Any] = {
    "adapter": AdapterName,
    "pool": PoolName,
    "join": JoinName,
    "loss": LossName,
    "alpha": AlphaForm,
    "schedule": ScheduleName,
    "split_method": SplitMethod,
    "views": ViewsName,
    "precision": Precision,
}

_LEAST: dict[str, float] = {
    "experts": 0,
    "rank": 1,
    "router_hidden": 1,
    "top_k": 0,
    "router_noise": 0,
    "load_balance": 0,
    "router_z": 0,
    "pool_heads": 1,
    "pool_hidden": 1,
    "gamma": 0,
    "gamma_positive": 0,
    "gamma_negative": 0,
    "margin": 0,
    "lr_head": 0,
    "lr_molre": 0,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "ema": 0,
    "clip_norm": 0,
    "batch_size": 1,
    "min_epochs": 1,
    "patience": 1,
    "folds": 0,
    "fold": 0,
    "min_positives": 1,
    "seed": 0,
    "order_seed": 0,
}

_UNUSED_EXPERTS = {"none": 0, "linear": 0, "lora": 1}
"""What `experts` is where the adapter has none to choose."""


_DATA_SETTINGS = (
    "token",
    "findings",
    "join",
    "batch_size",
    "repeat_threshold",
    "split_fractions",
    "split_salt",
    "split_method",
    "folds",
    "fold",
    "views",
    "min_positives",
    "precision",
    "order_seed",
)

_USED_BY: dict[str, Callable[["FitConfig"], bool]] = {
    "rank": lambda fit: fit.adapter in ("molre", "lora", "mlp"),
    **{
        name: lambda fit: fit.adapter == "molre"
        for name in (
            "router_hidden",
            "expert_bias",
            "top_k",
            "router_temperature",
            "router_noise",
            "load_balance",
            "router_z",
            "router_entropy",
        )
    },
    "lr_molre": lambda fit: fit.adapter != "none",
    "pool_heads": lambda fit: fit.pool == "multihead",
    "pool_hidden": lambda fit: fit.pool == "gated",
    "gamma": lambda fit: fit.loss == "focal",
    "gamma_positive": lambda fit: fit.loss == "asymmetric",
    "gamma_negative": lambda fit: fit.loss == "asymmetric",
    "margin": lambda fit: fit.loss == "asymmetric",
}
"""Settings that only some heads have a use for."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides a head, and nothing that does not.

    The defaults are the paper's where it states a value (Sec. 2.2 of the MoLRE paper), else the
    source is named. Device and progress are arguments of `fit_head`.
    """

    adapter: AdapterName = "molre"
    """What adapts a slice (`heads/adapters.py`); with `experts` of 0, molre is none."""

    experts: int = 6
    """K; 1 is LoRA with a trivial router, 0 is no adapter. An `mlp` is K·r wide, as wide as the
    molre that it is to be compared with; the other adapters have no use for it."""

    rank: int = 8
    """r of every expert, and of `lora`."""

    router_hidden: int = 256
    """d_h, hidden width of the router."""

    expert_bias: bool = False
    """Whether each expert adds a vector of its own; Eq. 1 has none, the counts of Table 2 do."""

    top_k: int = 0
    """Experts that take part in a slice; 0 is all of them, as in the paper."""

    router_temperature: float = 1.0
    """The router's scores are divided by it."""

    router_noise: float = 0.0
    """Standard deviation of noise on the router's scores while fitting."""

    load_balance: float = 0.0
    """Weight of the load-balancing loss (`routing.RoutingPenalties`); the paper has none."""

    router_z: float = 0.0
    """Weight of the router's z-loss; the paper has none."""

    router_entropy: float = 0.0
    """Weight of the mean entropy of the routing, positive to sharpen it; the paper has none."""

    pool: PoolName = "attention"
    """How slices are weighed (`heads/pooling.py`; Algorithm 1 is attention)."""

    pool_heads: int = 4
    """Queries of the pool `multihead`."""

    pool_hidden: int = 128
    """Hidden width of the pool `gated`; 128 as in its source."""

    join: JoinName = "slices"
    """With several stores: one head on the embeddings of each slice, laid end to end, or an adapter
    and a pool for each store (`scans`) and one classifier on all that they pool."""

    token: str = "cls"
    """Which embedding of a slice, as the feature store names it."""

    findings: tuple[str, ...] = ()
    """Which findings, in this order; none named is every finding of the labels."""

    loss: LossName = "focal"
    """Its name in `losses.LOSSES`."""

    gamma: float = 2.0
    """γ of the focal loss."""

    gamma_positive: float = 0.0
    """γ+ of the asymmetric loss."""

    gamma_negative: float = 4.0
    """γ− of the asymmetric loss; 4 and 0 are its source's for rare labels."""

    margin: float = 0.05
    """Probability below which the asymmetric loss leaves a negative out."""

    alpha: AlphaForm = "balanced"
    """Form of the prevalence weights α_t: see `losses.ALPHA_FORMS`."""

    lr_head: float = 1e-3
    """Learning rate of query and classifier."""

    lr_molre: float = 1e-4
    """Learning rate of experts and router."""

    weight_decay: float = 0.01
    """Of AdamW, on all but biases and the query; the paper states none, this is torch's default."""

    schedule: ScheduleName = "constant"
    """How learning rates change over `max_epochs`."""

    warmup_epochs: float = 0.0
    """Epochs over which learning rates rise from 0."""

    ema: float = 0.0
    """Decay of the moving average of the parameters that is judged and kept; 0 is none."""

    clip_norm: float = 0.0
    """Largest norm of the gradient of a head; 0 does not clip."""

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

    split_method: SplitMethod = "hash"
    """How splits and folds are drawn: by a hash of each patient alone, which keeps it where it is
    when the cohort grows, or so that each finding has its share in every part, which moves it."""

    folds: int = 0
    """Parts of the patients in a cross-validation: `fold` is tested, the next one validates, the
    others train. 0 is none: the split is that of `split_fractions` or the labels."""

    fold: int = 0
    """Which one is tested, from 0."""

    views: ViewsName = "random"
    """What train sees of a store with several views: one at random a scan and epoch, or view 0.
    Validation and test always see view 0."""

    min_positives: int = 5
    """Fewest scans with, and fewest without, a finding for its AUC to enter a macro AUC."""

    precision: Precision = "float32"
    """Type of the products with the embeddings; everything else is float32."""

    seed: int = 0
    """Of the first parameters, and of the noise on the routing."""

    order_seed: int = 0
    """Of the order of scans, the rounding of repeats and the choice of views. Heads that share it
    see the same batches and can be fitted side by side."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_sizes()
        self._check_names()
        threshold = self.repeat_threshold
        if threshold != "auto" and not (isinstance(threshold, float | int) and 0 <= threshold <= 1):
            raise ConfigError(f"repeat_threshold must be auto or within 0..1, got {threshold!r}")
        check_fractions(self.split_fractions)
        # TOML tells 0 from 0.0 and lists from tuples, and equal settings must be equal.
        fractions = tuple(float(share) for share in self.split_fractions)
        object.__setattr__(self, "split_fractions", fractions)
        object.__setattr__(self, "findings", tuple(self.findings))
        for field in fields(self):
            if field.type is float:
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        if threshold != "auto":
            object.__setattr__(self, "repeat_threshold", float(threshold))
        if self.adapter == "molre" and self.experts == 0:
            object.__setattr__(self, "adapter", "none")
        object.__setattr__(self, "experts", _UNUSED_EXPERTS.get(self.adapter, self.experts))

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) in (int, float):
                continue
            if isinstance(field.type, type) and type(value) is not field.type:
                kind = field.type.__name__
                raise ConfigError(f"{field.name} must be of type {kind}, got {value!r}")
            if get_origin(field.type) is tuple and not isinstance(value, tuple | list):
                raise ConfigError(f"{field.name} must be a list, such as [a, b], got {value!r}")

    def _check_sizes(self) -> None:
        for name, lowest in _LEAST.items():
            value = getattr(self, name)
            if not lowest <= value < math.inf:
                raise ConfigError(f"{name} must be at least {lowest}, got {value}")
        if self.max_epochs < self.min_epochs:
            raise ConfigError(
                f"max_epochs must be at least min_epochs, got {self.max_epochs} and "
                f"{self.min_epochs}: lower min_epochs (--min-epochs), too"
            )
        if not self.router_temperature > 0:
            raise ConfigError(f"router_temperature must be positive, got {self.router_temperature}")
        if self.ema >= 1 or self.margin >= 1:
            raise ConfigError(f"ema and margin must be below 1, got {self.ema} and {self.margin}")
        if self.folds in (1, 2) or (self.fold and self.fold >= self.folds):
            raise ConfigError(
                "folds must be 0 or at least 3 (one tests, one validates, the others train) and "
                f"fold below it, got fold {self.fold} of {self.folds}"
            )

    def _check_names(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.adapter == "mlp" and self.experts == 0:
            raise ConfigError("an mlp is experts x rank wide: experts must be at least 1, got 0")
        if twice := {name for name in self.findings if self.findings.count(name) > 1}:
            raise ConfigError(f"findings must differ, got {', '.join(sorted(twice))} twice")

    def canonical(self) -> "FitConfig":
        """The same head with every setting that it has no use for at its default.

        Two configs whose canonical forms are equal describe the same fit.
        """
        unused = {name for name, used in _USED_BY.items() if not used(self)}
        return replace(self, **{name: getattr(FitConfig, name) for name in unused})

    def data_settings(self) -> dict[str, Any]:
        """The settings that decide which batches a head sees, and in which order."""
        return {name: getattr(self, name) for name in _DATA_SETTINGS}

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
