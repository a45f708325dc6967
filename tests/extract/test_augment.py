"""Views: the ranges of Sec. 3.1, and the same draw for the same scan."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ctfm.extract.augment import View, Warp, draw_view

DRAWS = [draw_view(7, f"scan{i}", 1 + i % 3) for i in range(300)]


def warp(**changes: object) -> Warp:
    still = {
        "rotation_rad": (0.0, 0.0, 0.0),
        "scale": (1.0, 1.0, 1.0),
        "mirror": (False, False, False),
        "alpha": 0.0,
        "sigma_voxels": 10.0,
        "seed": 1,
    }
    return Warp(**{**still, **changes})  # type: ignore[arg-type]


def test_view_zero_is_the_scan_as_it_is() -> None:
    assert draw_view(3, "any", 0) == View(warp=None, jitter=None)


def test_a_draw_depends_on_seed_scan_and_view_alone() -> None:
    first = draw_view(3, "a", 1)
    draw_view(99, "between", 5)
    assert draw_view(3, "a", 1) == first
    assert first not in (draw_view(4, "a", 1), draw_view(3, "b", 1), draw_view(3, "a", 2))


def test_ids_that_run_into_the_view_number_do_not_collide() -> None:
    assert draw_view(1, "1", 11) != draw_view(1, "11", 1)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([a for d in DRAWS for a in d.warp.rotation_rad], -0.1, 0.1),  # type: ignore[union-attr]
        ([s for d in DRAWS for s in d.warp.scale], 0.85, 1.15),  # type: ignore[union-attr]
        ([d.warp.alpha for d in DRAWS], 0.0, 200.0),  # type: ignore[union-attr]
        ([d.warp.sigma_voxels for d in DRAWS], 10.0, 13.0),  # type: ignore[union-attr]
        ([d.jitter.brightness for d in DRAWS], 0.99, 1.01),  # type: ignore[union-attr]
        ([d.jitter.noise_sd**2 for d in DRAWS], 0.0, 0.03),  # type: ignore[union-attr]
    ],
    ids=["rotation", "scale", "alpha", "sigma", "brightness", "noise_variance"],
)
def test_every_range_is_filled_evenly_and_never_left(
    values: list[float], low: float, high: float
) -> None:
    assert min(values) >= low
    assert max(values) <= high
    quarters = np.histogram(values, bins=4, range=(low, high))[0] / len(values)
    assert np.abs(quarters - 0.25).max() < 0.1


def test_each_axis_is_mirrored_in_half_of_the_views_independently() -> None:
    mirrored = np.array([d.warp.mirror for d in DRAWS if d.warp is not None])
    assert np.abs(mirrored.mean(axis=0) - 0.5).max() < 0.1
    assert len(np.unique(mirrored, axis=0)) == 8


def test_the_matrix_turns_then_scales_then_mirrors() -> None:
    quarter = warp(
        rotation_rad=(0.0, 0.0, np.pi / 2), scale=(2.0, 3.0, 1.0), mirror=(False, True, False)
    )
    np.testing.assert_allclose(quarter.matrix() @ [1, 0, 0], [0, -3, 0], atol=1e-12)
    np.testing.assert_allclose(quarter.matrix() @ [0, 1, 0], [-2, 0, 0], atol=1e-12)


def test_rotations_are_right_handed_about_x_then_y_then_z() -> None:
    a, b, c = 0.05, -0.07, 0.09
    small = warp(rotation_rad=(a, b, c)).matrix()
    about = [
        np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]),
        np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]),
        np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]),
    ]
    np.testing.assert_allclose(small, about[2] @ about[1] @ about[0], atol=1e-12)


def test_the_elastic_field_varies_as_smoothed_noise_on_every_voxel_does() -> None:
    """The coarse lattice against batchgenerators' recipe, written out at full resolution."""
    shape, alpha, sigma = (48, 64, 56), 200.0, 10.0
    rng = np.random.default_rng(0)
    full = [
        gaussian_filter(rng.uniform(-1, 1, shape), sigma, mode="constant") * alpha
        for _ in range(12)
    ]
    fields = [
        np.stack([warp(alpha=alpha, sigma_voxels=sigma, seed=s).elastic(shape).plane(24.0)])
        for s in range(40)
    ]
    middle = (slice(12, 52), slice(12, 44))
    expected = np.std([field[24][middle] for field in full])
    got = np.std([field[0, :, *middle] for field in fields])
    assert got == pytest.approx(expected, rel=0.2)
    step = np.diff(np.stack(fields), axis=-1)
    assert np.abs(step).max() < 0.5  # voxels: smooth, nothing folds


def test_the_elastic_field_is_the_same_whatever_planes_are_asked_for() -> None:
    field = warp(alpha=150.0).elastic((21, 34, 27))
    plane = field.plane(5.0)
    assert plane.shape == (3, 34, 27)
    np.testing.assert_array_equal(warp(alpha=150.0).elastic((21, 34, 27)).plane(5.0), plane)
    np.testing.assert_allclose((field.plane(4.5) + field.plane(5.5)) / 2, plane, atol=1e-4)
