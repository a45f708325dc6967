"""The synthetic head: tissues where they belong, and findings that change what they say."""

from dataclasses import replace

import numpy as np
import pytest

from ctfm.extract.phantom import Lesion, head_hu
from ctfm.extract.phantom_anatomy import Anatomy, draw_anatomy
from ctfm.extract.phantom_canvas import Canvas, Ellipsoid, Lattice
from ctfm.extract.phantom_draws import SHIFT_LABEL_MM
from ctfm.extract.phantom_findings import (
    FINDINGS,
    LASTING,
    PREVALENCE,
    draw_findings,
    draw_lesions,
    draw_names,
)
from ctfm.extract.phantom_lesions import Infarct, Mass, MidlineShift
from ctfm.store.errors import ConfigError
from ctfm.store.findings import load_findings

DIFFUSE = {"hydrocephalus", "midline_shift"}
WHOLE_HEAD = Lattice(
    origin_mm=np.array([96.0, 120.0, 4.0]),
    steps_mm=np.array([[0, 0, -2.5], [0, -4.0, 0], [-3.2, 0, 0]]),
    shape=(66, 58, 61),
)
SLICE_Z_MM = 4.0 - 2.5 * np.arange(66)


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def reference_head(seed: int = 3) -> Anatomy:
    """A drawn head of the reference size, so that places can be given in its millimetres."""
    return replace(
        draw_anatomy(rng(seed)), half_axes_mm=(74.0, 93.0, 88.0), ventricles=1.0, texture_hu=0.0
    )


def hu_at(anatomy: Anatomy, x_mm: float, y_mm: float, z_mm: float) -> float:
    point = Lattice(
        origin_mm=np.array([x_mm, y_mm, z_mm], np.float64), steps_mm=np.eye(3), shape=(1, 1, 1)
    )
    return float(head_hu(anatomy, point)[0, 0, 0])


def lesions_of(name: str, seed: int) -> tuple[Anatomy, tuple[Lesion, ...]]:
    anatomy = draw_anatomy(rng(seed))
    return anatomy, draw_lesions([name], rng(seed, 1), anatomy, lasting_rng=rng(seed, 2))


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(
    ("place_mm", "low_hu", "high_hu"),
    [
        ((0, 0, 6), -1000, -1000),  # above the vertex
        ((60, 100, -60), -1000, -1000),  # beside the forehead
        ((32, -25, -48), 24, 31),  # white matter
        ((11, -12, -78), 35, 41),  # thalamus
        ((24, 5, -78), 35, 41),  # lentiform nucleus
        ((11, -4, -60), 3, 10),  # lateral ventricle
        ((0, 2, -80), 3, 10),  # third ventricle
        ((0, -31, -110), 3, 10),  # fourth ventricle
        ((0, -10, -106), 28, 34),  # pons
        ((26, -46, -111), 27, 41),  # cerebellum
        ((25, 56, -112), -90, -60),  # fat of the orbit
        ((31, 70, -106), 10, 20),  # globe
        ((29, 56, -130), -1000, -900),  # maxillary sinus
        ((7, 24, -112), -1000, -800),  # sphenoid sinus
        ((9, 81, -85), -1000, -800),  # frontal sinus
        ((38, -5, -150), 45, 60),  # muscle
    ],
)
def test_tissues_have_their_hu(
    place_mm: tuple[float, float, float], side: int, low_hu: float, high_hu: float
) -> None:
    x_mm, y_mm, z_mm = place_mm
    assert low_hu <= hu_at(reference_head(), side * x_mm, y_mm, z_mm) <= high_hu


def test_scalp_skull_and_brain_follow_each_other_below_the_vertex() -> None:
    anatomy = replace(reference_head(), scalp_mm=6.0, skull_mm=8.0, csf_mm=2.0)
    ray = Lattice(
        origin_mm=np.array([12.0, 0.0, 3.0]),
        steps_mm=np.array([[0, 0, -0.25], [0, 1.0, 0], [1.0, 0, 0]]),
        shape=(100, 1, 1),
    )
    hu = head_hu(anatomy, ray, edge_mm=0.4).ravel()
    depth_mm = 0.25 * (np.arange(100) - np.argmax(hu > -500))
    assert hu[depth_mm < -0.5].max() == -1000
    assert hu[(depth_mm > 2.5) & (depth_mm < 4)].max() < -60  # fat
    assert hu[(depth_mm > 6.5) & (depth_mm < 7.8)].min() > 1000  # outer table
    assert 600 < hu[(depth_mm > 9) & (depth_mm < 11)].mean() < 700  # diploe
    assert hu[(depth_mm > 12.5) & (depth_mm < 13.4)].min() > 1000  # inner table
    assert hu[depth_mm > 14.6].max() < 60


def test_the_head_is_its_own_mirror_image_but_for_texture() -> None:
    anatomy = replace(draw_anatomy(rng(7)), texture_hu=0.0)
    hu = head_hu(anatomy, WHOLE_HEAD, edge_mm=3.0)
    difference_hu = np.abs(hu - hu[:, :, ::-1])
    # Rounding may take a depth to the next entry of the table of layers.
    assert (difference_hu > 0.1).mean() < 1e-4
    assert difference_hu.max() < 100
    textured = head_hu(replace(anatomy, texture_hu=0.7), WHOLE_HEAD, edge_mm=3.0)
    assert 0.1 < np.abs(textured - hu).max() < 3


def test_front_and_back_differ() -> None:
    hu = head_hu(reference_head(), WHOLE_HEAD, edge_mm=3.0)
    assert np.abs(hu - hu[:, ::-1]).mean() > 100


@pytest.mark.parametrize("seed", range(4))
def test_the_head_lies_in_its_frame(seed: int) -> None:
    anatomy = draw_anatomy(rng(seed))
    fine = Lattice(
        origin_mm=np.array([100.0, 110.0, 6.0]),
        steps_mm=np.array([[0, 0, -1.0], [0, -1.0, 0], [-4.0, 0, 0]]),
        shape=(72, 221, 51),
    )
    head = head_hu(anatomy, fine) > -500
    z_mm = 6.0 - np.flatnonzero(head.any(axis=(1, 2)))
    y_mm = 110.0 - np.flatnonzero(head.any(axis=(0, 2)))
    assert abs(z_mm.max()) <= 1
    assert abs(y_mm.max() + y_mm.min()) <= 6
    assert 170 < y_mm.max() - y_mm.min() < 200


def test_a_turned_lattice_sees_the_same_head() -> None:
    anatomy = draw_anatomy(rng(5))
    angle = np.radians(35)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    steps_mm = np.diag([5.0, -7.0, -9.0])[[2, 1, 0]] @ turn
    turned = Lattice(origin_mm=np.array([30.0, 95.0, -9.0]), steps_mm=steps_mm, shape=(13, 17, 11))
    hu = head_hu(anatomy, turned)
    for z, y, x in [(0, 0, 0), (3, 8, 5), (9, 9, 4), (12, 16, 10), (7, 4, 8)]:
        place_mm = turned.origin_mm + np.array([z, y, x]) @ turned.steps_mm
        assert hu[z, y, x] == pytest.approx(hu_at(anatomy, *place_mm.tolist()), abs=0.1)


def test_a_box_holds_every_point_between_its_corners() -> None:
    lattice = Lattice(
        origin_mm=np.array([-20.0, 31.0, 4.0]),
        steps_mm=np.array([[1.0, 0.2, -4.0], [0.3, -3.0, 0.5], [2.5, 0.4, 0.6]]),
        shape=(9, 13, 11),
    )
    low, high = (-8.0, 5.0, -25.0), (4.0, 20.0, -10.0)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in lattice.shape), indexing="ij"), axis=-1)
    place_mm = lattice.origin_mm + index @ lattice.steps_mm
    inside = ((place_mm >= low) & (place_mm <= high)).all(axis=-1)
    box = lattice.box(low, high)
    assert box is not None
    assert inside[box].sum() == inside.sum() > 0
    np.testing.assert_allclose(list(lattice.coordinates()), np.moveaxis(place_mm, -1, 0), atol=1e-4)
    assert lattice.box((900, 900, 900), (910, 910, 910)) is None


@pytest.mark.parametrize("radius_mm", [6.0, 17.0])
def test_the_volume_of_a_shape_does_not_depend_on_the_pixel(radius_mm: float) -> None:
    ball = Ellipsoid(centre_mm=(1.0, 2.0, 3.0), radii_mm=(radius_mm,) * 3)
    for pixel_mm in (1.0, 3.0):
        n = int(60 / pixel_mm)
        steps_mm = pixel_mm * np.eye(3)
        lattice = Lattice(origin_mm=np.full(3, -28.3), steps_mm=steps_mm, shape=(n, n, n))
        canvas = Canvas.blank(lattice, edge_mm=pixel_mm)
        canvas.fill_shape(ball, 1.0)
        exact_mm3 = 4 / 3 * np.pi * radius_mm**3
        assert canvas.hu.sum() * pixel_mm**3 == pytest.approx(exact_mm3, rel=0.08)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_changes_hu_where_it_says_and_only_there(name: str, seed: int) -> None:
    anatomy, lesions = lesions_of(name, seed)
    (lesion,) = (lesion for lesion in lesions if lesion.finding == name)
    others = [other for other in lesions if other is not lesion]
    with_it = head_hu(anatomy, WHOLE_HEAD, lesions=lesions, edge_mm=1.0)
    change_hu = np.abs(with_it - head_hu(anatomy, WHOLE_HEAD, lesions=others, edge_mm=1.0))
    within = (lesion.z_min_mm - 0.5 <= SLICE_Z_MM) & (lesion.z_max_mm + 0.5 >= SLICE_Z_MM)
    assert change_hu[~within].max() < 0.1
    changed = (change_hu[within] > 2).any(axis=(1, 2))
    assert changed.mean() > 0.5
    assert lesion.focal is (name not in DIFFUSE)
    assert -140 < lesion.z_min_mm < lesion.z_max_mm <= 0


@pytest.mark.parametrize(
    ("name", "low_hu", "high_hu"),
    [
        ("intraparenchymal_hemorrhage", 55, 85),
        ("intraventricular_hemorrhage", 55, 85),
        ("subdural_hematoma", 50, 85),
        ("epidural_hematoma", 55, 85),
        ("scalp_hematoma", 50, 70),
        ("chronic_infarct", 5, 15),
        ("intracranial_calcification", 120, 600),
        ("pneumocephalus", -1000, -900),
    ],
)
def test_a_finding_has_its_hu_where_it_changes_most(
    name: str, low_hu: float, high_hu: float
) -> None:
    for seed in range(4):
        anatomy, lesions = lesions_of(name, seed)
        lesion = next(lesion for lesion in lesions if lesion.finding == name)
        middle_mm = (lesion.z_min_mm + lesion.z_max_mm) / 2
        slice_ = Lattice(
            origin_mm=np.array([96.0, 120.0, middle_mm]),
            steps_mm=np.array([[0, 0, -1.0], [0, -1.0, 0], [-1.0, 0, 0]]),
            shape=(1, 233, 193),
        )
        hu = head_hu(anatomy, slice_, lesions=lesions)
        change_hu = np.abs(hu - head_hu(anatomy, slice_))
        inside = (hu >= low_hu) & (hu <= high_hu) & (change_hu > 5)
        assert inside.sum() > 8


def test_an_acute_infarct_lowers_brain_by_4_to_10_hu() -> None:
    for seed in range(5):
        _, lesions = lesions_of("acute_infarct", seed)
        (infarct,) = (lesion for lesion in lesions if isinstance(lesion, Infarct))
        assert -10 <= infarct.change_hu <= -4


def test_a_shift_moves_the_midline_by_its_amount() -> None:
    anatomy, (lesion,) = lesions_of("midline_shift", 2)
    assert isinstance(lesion, MidlineShift)
    shift = lesion.shift
    row = Lattice(
        origin_mm=np.array([18.0, 2.0, -80.0]) * anatomy.stretch,
        steps_mm=np.array([[0, 0, -1.0], [0, -1.0, 0], [-0.25, 0, 0]]),
        shape=(1, 1, 145),
    )
    third_ventricle = head_hu(anatomy, row, lesions=[lesion]).ravel() < 12
    x_mm = 18.0 * anatomy.stretch[0] - 0.25 * np.flatnonzero(third_ventricle).mean()
    assert 0.8 < x_mm / shift.amount_mm < 1.05


def test_prevalences_are_those_asked_for() -> None:
    prevalence = {name: max(share, 0.1) for name, share in PREVALENCE.items()}
    draws = 4000
    counts = dict.fromkeys(FINDINGS, 0)
    for i in range(draws):
        for name in draw_names(rng(1, i), prevalence, lasting_rng=rng(2, i)):
            counts[name] += 1
    for name, share in prevalence.items():
        sd = np.sqrt(share * (1 - share) / draws)
        assert abs(counts[name] / draws - share) < 4 * sd, name


def test_default_prevalences_go_from_2_to_30_percent() -> None:
    assert len(FINDINGS) >= 14
    assert min(PREVALENCE.values()) == 0.02
    assert max(PREVALENCE.values()) == 0.30


def test_findings_are_of_the_taxonomy_and_no_child_comes_without_its_parent() -> None:
    taxonomy = load_findings()
    assert [name for name in taxonomy.names if name in FINDINGS] == list(FINDINGS)
    assert not {finding.parent for finding in taxonomy if finding.name in FINDINGS} & set(FINDINGS)


def test_a_midline_shift_has_a_mass_that_pushes_it_away() -> None:
    masses = {"subdural_hematoma", "epidural_hematoma", "intraparenchymal_hemorrhage"}
    masses |= {"intracranial_tumor", "acute_infarct"}
    for i in range(400):
        names = draw_names(rng(i), PREVALENCE, lasting_rng=rng(i, 1))
        assert "midline_shift" not in names or names & masses


def test_only_a_shift_of_5_mm_is_called_one() -> None:
    anatomy = draw_anatomy(rng(0))
    amounts_mm: dict[bool, list[float]] = {True: [], False: []}
    for i in range(60):
        for called in (True, False):
            names = ["intraparenchymal_hemorrhage", *["midline_shift"] * called]
            lesions = draw_lesions(names, rng(i), anatomy, lasting_rng=rng(i, 1))
            (blood,) = (lesion for lesion in lesions if isinstance(lesion, Mass))
            (shift,) = (lesion for lesion in lesions if isinstance(lesion, MidlineShift))
            assert (shift.finding == "midline_shift") is called
            assert shift.shift.amount_mm * blood.shapes[0].centre_mm[0] <= 0 or not called
            amounts_mm[called].append(abs(shift.shift.amount_mm))
    assert min(amounts_mm[True]) >= SHIFT_LABEL_MM > max(amounts_mm[False])


def test_what_lasts_is_the_same_in_all_studies_of_a_patient() -> None:
    anatomy = draw_anatomy(rng(0))
    certain = dict.fromkeys([*LASTING, "subdural_hematoma"], 1.0)
    first, second = (
        draw_findings(rng(study), anatomy, certain, lasting_rng=rng(9)) for study in (1, 2)
    )
    for name in certain:
        one, other = (
            next(lesion for lesion in lesions if lesion.finding == name)
            for lesions in (first, second)
        )
        assert (one == other) is (name in LASTING)


def test_the_same_seed_draws_the_same_findings() -> None:
    anatomy = draw_anatomy(rng(0))
    one, other = (draw_findings(rng(4), anatomy, lasting_rng=rng(5)) for _ in range(2))
    assert one == other


def test_refuses_a_finding_that_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="no finding lipoma: it draws intraparenchymal"):
        draw_names(rng(0), {"lipoma": 0.5}, lasting_rng=rng(1))
    with pytest.raises(ConfigError, match="prevalence of midline_shift must lie"):
        draw_names(rng(0), {"midline_shift": 1.5}, lasting_rng=rng(1))
