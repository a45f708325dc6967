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
        ("max_slices", 10**9),
        ("size_px", 8000),
        ("slice_mm", float("nan")),
        ("in_plane_mm", 1e-9),
        ("views", 10**9),
        ("seed", 10**30),
        ("preprocessing", 0),
        ("tokens", ()),
        ("windows_hu", ()),
        ("windows_hu", ((0.0, float("inf")),)),
        ("windows_hu", ((0.0, 80.0),) * 1000),
    ],
)
def test_refuses_what_makes_no_sense(setting: str, value: object) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("windows_hu", None),
        ("windows_hu", 80),
        ("windows_hu", [[0, 80, 100]]),
        ("windows_hu", [0, 80]),
        ("windows_hu", "0:80"),
        ("tokens", "cls"),
        ("tokens", None),
        ("tokens", [1]),
        ("max_slices", 1e9),
        ("max_slices", True),
        ("slice_mm", 10**400),
        ("seed", "0"),
        ("backbone", None),
        ("backbone", ""),
        ("template", 7),
        ("windows_hu", [["0", "80"]]),
        ("dtype", ["float16"]),
    ],
)
def test_values_of_other_types_are_refused_when_they_are_read(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        ExtractConfig.from_dict({**CONFIG.as_dict(), setting: value})


@pytest.mark.parametrize("setting", ["backbone", "windows_hu", "tokens"])
def test_a_setting_that_is_missing_is_named(setting: str) -> None:
    values = CONFIG.as_dict()
    del values[setting]
    with pytest.raises(ConfigError, match=f"have no {setting}"):
        ExtractConfig.from_dict(values)


def test_the_largest_grids_in_use_are_allowed() -> None:
    for size_px, max_slices in ((256, 128), (512, 2000), (224, 4096), (1024, 1024)):
        replace(CONFIG, size_px=size_px, max_slices=max_slices)


def test_more_voxels_than_a_machine_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="a grid may have 1073741824 voxels"):
        replace(CONFIG, size_px=2048, max_slices=2048)
