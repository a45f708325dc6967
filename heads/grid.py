"""Grids: the settings to try, as typed or from a TOML file, to configs.

    experts=0,1,2,4,6,8 rank=4,8,16 pool=attention,mean seed=0:3

Each factor is a setting of `FitConfig`; `0:3` is 0, 1, 2. In a TOML file the factors are the lists
of `[grid]`, and `[base]` holds settings that all share. Combinations that describe the same head
(the rank of no adapter, say) are one variant.
"""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ctfm.heads.config import FitConfig
from ctfm.store.errors import ConfigError
from ctfm.store.provenance import digest

_LONGEST_NAME = 120
"""Characters of a folder's name; longer ones are cut and told apart by a digest."""

Factors = Mapping[str, tuple[Any, ...]]
"""Values to try of each setting."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Factors over a base."""

    base: FitConfig
    """Settings that all variants share."""

    factors: Factors
    """Values of each setting that varies, in the order given."""

    def __post_init__(self) -> None:
        known = {field.name for field in fields(FitConfig)}
        if unknown := [name for name in self.factors if name not in known]:
            raise ConfigError(
                f"a grid varies settings of a fit, got {', '.join(unknown)}. Known are "
                f"{', '.join(sorted(known))}"
            )
        if empty := [name for name, values in self.factors.items() if not values]:
            raise ConfigError(f"a grid needs values for each factor, got none for {empty[0]}")
        for name, values in self.factors.items():
            if twice := [value for value in values if values.count(value) > 1]:
                raise ConfigError(
                    f"a grid has each value of a factor once, got {twice[0]} of {name} twice"
                )

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the factors, the last one varying fastest."""
        return [
            dict(zip(self.factors, values, strict=True))
            for values in itertools.product(*self.factors.values())
        ]

    def config(self, point: Mapping[str, Any]) -> FitConfig:
        """The config of a combination, without what it has no use for."""
        return FitConfig.from_dict({**self.base.as_dict(), **point}).canonical()

    def variants(self) -> dict[str, FitConfig]:
        """Every head that is to be fitted, by its name."""
        found: dict[FitConfig, str] = {}
        for point in self.points():
            found.setdefault(self.config(point), self.name(self.config(point)))
        return {name: config for config, name in found.items()}

    def name(self, config: FitConfig) -> str:
        """The name of a variant: its factors, such as `experts=6,rank=8,seed=0`."""
        default = FitConfig()
        shown = [
            name
            for name in self.factors
            if len(self.factors[name]) > 1 or getattr(config, name) != getattr(default, name)
        ]
        text = ",".join(f"{name}={_shown(getattr(config, name))}" for name in shown) or "base"
        if len(text) <= _LONGEST_NAME:
            return text
        return f"{text[:_LONGEST_NAME]}-{digest(config.as_dict())[:8]}"


def read_grid(words: Sequence[str], *, base: FitConfig, vary_order: bool = False) -> Grid:
    """A grid as it was typed.

    Args:
        words: `name=value,value`, or one path of a TOML file.
        base: Settings that all variants share; those of a file's `[base]` come over it.
        vary_order: Whether the order of the data moves with `seed`, instead of being shared.

    Raises:
        ConfigError: If a word cannot be read, or no setting has that name.
    """
    if len(words) == 1 and "=" not in words[0]:
        grid = _from_file(Path(words[0]), base)
    else:
        grid = Grid(base=base, factors=dict(map(_factor, words)))
    return _Ordered(base=grid.base, factors=grid.factors) if vary_order else grid


class _Ordered(Grid):
    """A grid whose order of the data moves with the seed."""

    def config(self, point: Mapping[str, Any]) -> FitConfig:
        config = super().config(point)
        return replace(config, order_seed=config.seed)


def _from_file(path: Path, base: FitConfig) -> Grid:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the grid {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    if unknown := sorted(set(content) - {"base", "grid"}):
        raise ConfigError(f"{path} may hold [base] and [grid], got {', '.join(unknown)}")
    merged = FitConfig.from_dict({**base.as_dict(), **content.get("base", {})})
    factors = {
        name: _values(values) if isinstance(values, str) else tuple(_as_list(values))
        for name, values in content.get("grid", {}).items()
    }
    return Grid(base=merged, factors=factors)


def _factor(word: str) -> tuple[str, tuple[Any, ...]]:
    name, equals, text = word.partition("=")
    if not equals or not name or not text:
        raise ConfigError(f"a factor is name=value,value, such as experts=0,2,6; got {word!r}")
    return name, _values(text)


def _values(text: str) -> tuple[Any, ...]:
    """`0:3` as 0, 1, 2; otherwise values between commas, texts where they are not TOML."""
    first, colon, last = text.partition(":")
    if colon and first.lstrip("-").isdigit() and last.lstrip("-").isdigit():
        return tuple(range(int(first), int(last)))
    return tuple(parse_value(one) for one in text.split(","))


def parse_value(text: str) -> Any:
    """A TOML value; a word that TOML does not know is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
