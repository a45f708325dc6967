"""The extraction config: checked where it is made, the same after a trip through JSON."""

import json
from dataclasses import replace

import pytest

from ctfm.extract.config import ExtractConfig
from ctfm.store.errors import ConfigError
from ctfm.store.provenance import digest

CONFIG = ExtractConfig(backbone="intensity", tokens=("cls", "mean"), views=3)


def test_survives_json() -> None:
    assert ExtractConfig.from_dict(json.loads(json.dumps(CONFIG.as_dict()))) == CONFIG


def test_whole_numbers_and_floats_are_the_same_setting() -> None:
    other = replace(CONFIG, slice_mm=4, windows_hu=((0, 80), (-20, 180), (-800, 2000)))
    assert digest(other.as_dict()) == digest(CONFIG.as_dict())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("windows_hu", ((80.0, 0.0),)),
        ("slice_mm", 0.0),
        ("size_px", -1),
        ("views", 0),
    ],
)
def test_refuses_what_makes_no_sense(setting: str, value: object) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **{setting: value})  # type: ignore[arg-type]
