"""The settings of a fit: defaults, checks, and the way through TOML."""

import dataclasses
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import tomli_w

from ctfm.heads.config import PRESETS, FitConfig
from ctfm.store.errors import ConfigError
from ctfm.store.shares import FRACTIONS
from ctfm.store.splits import SALT


def test_defaults_are_those_of_the_paper() -> None:
    config = FitConfig()
    assert (config.experts, config.rank, config.router_hidden) == (6, 8, 256)
    assert (config.lr_head, config.lr_molre, config.gamma) == (1e-3, 1e-4, 2.0)
    assert (config.min_epochs, config.patience) == (20, 5)
    assert (config.split_fractions, config.split_salt) == (FRACTIONS, SALT)


@pytest.mark.parametrize(
    "config",
    [
        FitConfig(),
        PRESETS["paper"],
        FitConfig(findings=("b", "a"), repeat_threshold=0, split_fractions=(0.5, 0.25, 0.25)),
        FitConfig(gamma=1, lr_head=1),
    ],
)
def test_survives_toml(config: FitConfig) -> None:
    text = tomli_w.dumps(config.as_dict())
    again = FitConfig.from_dict(tomllib.loads(text))
    assert again == config
    assert tomli_w.dumps(again.as_dict()) == text


def test_equal_settings_are_equal_however_they_are_written() -> None:
    assert FitConfig(repeat_threshold=0).as_dict() == FitConfig(repeat_threshold=0.0).as_dict()
    assert isinstance(FitConfig(gamma=2).gamma, float)


def test_what_is_left_out_has_its_default() -> None:
    assert FitConfig.from_dict({"experts": 1}) == FitConfig(experts=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"experts": -1}, "experts must be at least 0, got -1"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"max_epochs": 19}, "max_epochs must be at least min_epochs, got 19 and 20"),
        ({"lr_head": float("nan")}, "lr_head must be at least 0, got nan"),
        ({"repeat_threshold": 1.5}, "repeat_threshold must be auto or within 0..1"),
        ({"split_fractions": (0.9, 0.2, 0.1)}, "fractions are the shares of train"),
        ({"split_fractions": (0.0, 0.5, 0.5)}, "fractions are the shares of train"),
        ({"findings": ("a", "b", "a")}, "findings must differ, got a twice"),
        ({"epochs": 3}, "unknown settings of a fit: epochs"),
    ],
)
def test_refuses_what_cannot_be(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig.from_dict(setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pool": "sum"}, "pool must be one of attention, gated, mean, max"),
        ({"alpha": "inverse"}, "alpha must be one of balanced, complement, none"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        (
            {"repeat_threshold": "often"},
            "repeat_threshold must be auto or within 0..1, got 'often'",
        ),
        ({"split_fractions": 3}, "split_fractions must be a list"),
        ({"split_fractions": ["a", "b", "c"]}, "fractions are the shares"),
        ({"findings": 3}, "findings must be a list"),
    ],
)
def test_refuses_a_value_of_another_kind(setting: dict[str, Any], message: str) -> None:
    # In a process of its own: here the annotations are checked, and would refuse it first.
    code = f"from ctfm.heads.config import FitConfig; FitConfig.from_dict({setting})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ConfigError: {message}" in ran.stderr


def test_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FitConfig().rank = 4  # type: ignore[misc]


def test_is_imported_without_torch() -> None:
    code = "import sys, ctfm.heads.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
