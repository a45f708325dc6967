"""The ellipsoid of the upper skull: exact points, noisy ones, and parts of a whole."""

import numpy as np
import pytest

from ctfm.extract.dome import (
    DOME_PITCH_DEG,
    Dome,
    effect_of_missing,
    fit_dome,
    spread_directions,
)

ACROSS_MM, LONG_MM, SHORT_MM = 70.0, 88.0, 67.0
RAYS = 1400


def points_of(*, angle_deg: float, noise_mm: float = 0.0) -> tuple[Dome, np.ndarray]:
    """An ellipsoid, and points all around it as they are seen from 3 mm beside its middle."""
    logs = np.log([ACROSS_MM / LONG_MM, LONG_MM, SHORT_MM / LONG_MM])
    dome = Dome(state=np.array([3.0, -2.0, np.deg2rad(angle_deg), *logs]))
    directions = spread_directions(RAYS)
    radius = 1 / np.linalg.norm(directions / dome.semi_axes_mm, axis=1)
    radius = radius + noise_mm * np.random.default_rng(1).normal(size=RAYS)
    x, long, short = (directions * radius[:, None]).T
    cos, sin = np.cos(dome.state[2]), np.sin(dome.state[2])
    points = np.stack([x, cos * long - sin * short, sin * long + cos * short], axis=1)
    return dome, points + np.array([0.0, 3.0, -2.0])


@pytest.mark.parametrize("angle_deg", [-33.0, -13.0, 7.0])
def test_finds_the_ellipsoid_whose_points_it_is_given(angle_deg: float) -> None:
    truth, points = points_of(angle_deg=angle_deg, noise_mm=0.5)
    upper = points[truth.height_mm(points) > -30]
    found = fit_dome(upper, usual_deg=-DOME_PITCH_DEG)
    assert found.angle_deg == pytest.approx(angle_deg, abs=1.0)
    assert found.semi_axes_mm == pytest.approx((ACROSS_MM, LONG_MM, SHORT_MM), abs=1.5)
    assert found.middle_mm == pytest.approx((3.0, -2.0), abs=1.5)
    assert found.residual_mm(upper) < 0.6


def test_own_coordinates_are_those_of_the_axes() -> None:
    dome, points = points_of(angle_deg=-20.0)
    reach = np.linalg.norm(dome.own_mm(points) / dome.semi_axes_mm, axis=1)
    np.testing.assert_allclose(reach, 1, atol=1e-12)


def test_of_a_whole_skull_nothing_is_missing() -> None:
    dome, points = points_of(angle_deg=-DOME_PITCH_DEG)
    missing = effect_of_missing(dome, points, rays=RAYS)
    assert abs(missing.turn_deg) < 0.05
    assert missing.turn_sd_deg < 0.3
    assert abs(missing.rise_mm) < 0.05
    assert missing.rise_sd_mm < 0.2


@pytest.mark.parametrize("side", [1, -1], ids=["top", "bottom"])
def test_the_more_is_missing_the_less_is_certain(side: int) -> None:
    dome, points = points_of(angle_deg=-DOME_PITCH_DEG)
    height_mm = dome.height_mm(points)
    cuts_mm = (50.0, 40.0, 30.0) if side == 1 else (0.0, 10.0, 20.0)
    parts = [points[side * height_mm < side * cut_mm] for cut_mm in cuts_mm]
    found = [effect_of_missing(dome, part, rays=RAYS) for part in parts]
    turns = [one.turn_sd_deg for one in found]
    assert turns == sorted(turns)
    assert turns[-1] > turns[0] + 0.5
    if side == 1:
        rises = [one.rise_sd_mm for one in found]
        assert rises == sorted(rises)
        assert rises[0] > 0.5


def test_with_next_to_nothing_left_a_head_is_taken_to_lie_as_usual() -> None:
    dome, points = points_of(angle_deg=-DOME_PITCH_DEG)
    band = points[np.abs(dome.height_mm(points) - 5) < 5]
    found = fit_dome(band, usual_deg=-DOME_PITCH_DEG)
    assert found.angle_deg == pytest.approx(-DOME_PITCH_DEG, abs=5)
    assert found.semi_axes_mm == pytest.approx((ACROSS_MM, LONG_MM, SHORT_MM), abs=8)
    assert effect_of_missing(found, band, rays=RAYS).turn_sd_deg > 10
