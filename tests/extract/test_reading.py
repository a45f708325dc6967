"""Reading any format, and telling heads in HU from everything else by values and size."""

import hashlib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from jaxtyping import Int16
from scipy import ndimage

from ctfm.extract.hu_check import check_hu
from ctfm.extract.reading import read_template, read_volume
from ctfm.extract.volume import Volume
from ctfm.store.errors import ConfigError, ScanError
from ctfm.store.reasons import Reason

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the public test scans are not here")

SPACING_MM = (5.0, 2.0, 2.5)  # z, y, x
SHAPE = (29, 128, 100)


def ellipse(radius_y_mm: float, radius_x_mm: float, radius_z_mm: float) -> np.ndarray:
    axes = [
        (np.arange(n) - (n - 1) / 2) * mm / radius
        for n, mm, radius in zip(
            SHAPE, SPACING_MM, (radius_z_mm, radius_y_mm, radius_x_mm), strict=True
        )
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return np.asarray(z**2 + y**2 + x**2 < 1)


def head(scale: float = 1.0) -> Int16[np.ndarray, "z y x"]:
    """Air, scalp, skull (400 to 1800 HU) and brain, with noise; on a thin and dense couch."""
    hu = np.full(SHAPE, -1000.0)
    skull = np.linspace(400, 1800, SHAPE[1])[:, None] * np.ones(SHAPE)
    for shrink_mm, value in ((0, 30), (6, skull), (14, 35)):
        radii = (95 * scale - shrink_mm, 75 * scale - shrink_mm, 85 * scale - shrink_mm)
        hu = np.where(ellipse(*radii), value, hu)
    hu += np.random.default_rng(2).normal(0, 12, SHAPE)
    hu[:, -6:-4, :] = 300
    return np.round(hu).clip(-1024).astype(np.int16)


def volume_of(hu: Int16[np.ndarray, "z y x"]) -> Volume:
    z = np.arange(len(hu))[:, None]
    return Volume(
        hu=hu,
        slice_origin_mm=np.array([110.0, 120.0, 0.0]) + z * np.array([0.0, 0.0, SPACING_MM[0]]),
        row_step_mm=np.array([0.0, -SPACING_MM[1], 0.0]),
        column_step_mm=np.array([-SPACING_MM[2], 0.0, 0.0]),
    )


def shifted(by: int, low: int = -32768) -> Int16[np.ndarray, "z y x"]:
    return (head().astype(int) + by).clip(low).astype(np.int16)


def grey(low: float, high: float) -> Int16[np.ndarray, "z y x"]:
    return ((head().clip(low, high) - low) / (high - low) * 255).astype(np.int16)


def stripped(background: int) -> Int16[np.ndarray, "z y x"]:
    brain = ellipse(80, 60, 70)
    return np.where(brain, head(), background).astype(np.int16)


def reason_of(volume: Volume) -> Reason:
    with pytest.raises(ScanError) as caught:
        check_hu(volume)
    return caught.value.reason


def test_a_head_is_accepted_with_or_without_noise_padding_and_couch() -> None:
    hu = head()
    check_hu(volume_of(hu))
    check_hu(volume_of(hu[:, :-10]))
    noise = np.random.default_rng(1).normal(0, 100, SHAPE)
    check_hu(volume_of((hu + noise).clip(-1024, 3000).astype(np.int16)))
    hu[:, :40, :30] = -2000  # padding that no header declares
    hu[:, :40, -30:] = -2000
    check_hu(volume_of(hu))


@pytest.mark.parametrize("background", [0, -1024])
def test_a_stripped_brain_is_accepted(background: int) -> None:
    check_hu(volume_of(stripped(background)))


@pytest.mark.parametrize("low", [-700, -500, -200, -100])
def test_a_head_without_air_below_is_refused(low: int) -> None:
    with pytest.raises(ScanError, match=f"exactly {low}.* clipped to a window") as caught:
        check_hu(volume_of(head().clip(low, 3071)))
    assert caught.value.reason is Reason.NOT_HU


@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_a_head_in_a_smaller_unit_is_refused(scale: float) -> None:
    with pytest.raises(ScanError, match=r"air is at -[57]0"):
        check_hu(volume_of((head() * scale).astype(np.int16)))


def test_what_was_filled_with_0_outside_of_the_scan_is_refused() -> None:
    hu = head()
    hu[:, :, :22] = 0
    with pytest.raises(ScanError, match="exactly 0 HU beside air"):
        check_hu(volume_of(hu))


def test_a_slice_that_is_blank_or_rescaled_otherwise_is_named() -> None:
    hu = head()
    hu[0] = hu[-1] = -1024  # beyond the head that is usual
    check_hu(volume_of(hu))
    hu[11] = -1024
    with pytest.raises(ScanError, match="slice 12 of 29 is blank"):
        check_hu(volume_of(hu))
    hu = head()
    hu[11] += 1024
    with pytest.raises(ScanError, match=r"slice 12 of 29 is at \d+ HU, and at -10\d\d"):
        check_hu(volume_of(hu))


def test_a_part_of_a_head_is_accepted() -> None:
    check_hu(volume_of(head()[18:25]))


NO_HU = {
    "constant": np.full(SHAPE, 7, dtype=np.int16),
    "only air": np.full(SHAPE, -1000, dtype=np.int16),
    "never rescaled": shifted(1024),
    "rescaled twice": shifted(-1024),
    "rescaled twice and clipped": shifted(-1024, low=-1024),
    "rescaled twice by 1000 and clipped": shifted(-1000, low=-1024),
    "brain window": grey(0, 80),
    "subdural window": grey(-20, 100),
    "wide window": grey(-1000, 1000),
    "thousandths": (head() / 1000).astype(np.int16),
    "tenths": (head() * 10.0).clip(-10240, 32767).astype(np.int16),
}


@pytest.mark.parametrize("what", NO_HU)
def test_values_that_are_no_hu_are_refused(what: str) -> None:
    assert reason_of(volume_of(NO_HU[what])) is Reason.NOT_HU


WINDOWS = [(0, 80), (-20, 100), (0, 120), (-100, 300), (-160, 240), (-1000, 400), (-1024, 800)]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_head_that_was_clipped_to_a_window_is_refused(window: tuple[int, int]) -> None:
    with pytest.raises(ScanError, match=f"exactly {window[1]}.* clipped to a window") as caught:
        check_hu(volume_of(head().clip(*window)))
    assert caught.value.reason is Reason.NOT_HU


@pytest.mark.parametrize("limits", [(-1024, 3071), (-1000, 1000), (-1000, 900), (-900, 3071)])
def test_a_head_that_was_clipped_where_scanners_or_bone_windows_end_is_accepted(
    limits: tuple[int, int],
) -> None:
    hu = head()
    hu[10:12, 30:34, 40:44] = 9000  # metal
    check_hu(volume_of(hu.clip(*limits)))


def structures() -> Int16[np.ndarray, "z y x"]:
    """0 to 16, as a label map of nested structures has them."""
    depth = ndimage.distance_transform_edt(ellipse(80, 60, 70), sampling=SPACING_MM)
    return np.asarray(np.ceil(depth / depth.max() * 16), np.int16)


def in_per_cent(mask: np.ndarray, blur_mm: float) -> Int16[np.ndarray, "z y x"]:
    smooth = ndimage.gaussian_filter(mask.astype(float), [blur_mm / mm for mm in SPACING_MM])
    return np.asarray(np.rint(100 * smooth), np.int16)


CORTEX = ellipse(80, 60, 70) & ~ellipse(60, 40, 50)
MAPS = {
    "mask": ellipse(80, 60, 70).astype(np.int16),
    "two labels": np.where(ellipse(60, 40, 50), 32, 8 * ellipse(80, 60, 70)).astype(np.int16),
    "labels": structures(),
    "labels in tens": (10 * structures()).astype(np.int16),
    "many labels": (structures() + 17 * (np.arange(SHAPE[2]) > 50) * (structures() > 0)).astype(
        np.int16
    ),
    "probability": in_per_cent(ellipse(80, 60, 70), 3.0),
    "probability of cortex": in_per_cent(CORTEX, 6.0),
    "smooth probability of cortex": in_per_cent(CORTEX, 8.0),
    "sharp probability": in_per_cent(CORTEX, 1.0),
}


@pytest.mark.parametrize("what", MAPS)
def test_labels_and_probabilities_are_refused(what: str) -> None:
    assert reason_of(volume_of(MAPS[what])) is Reason.NOT_HU


def test_a_label_map_is_called_one() -> None:
    with pytest.raises(ScanError, match="labels, not a scan"):
        check_hu(volume_of(MAPS["many labels"]))


def test_a_stripped_brain_with_large_ventricles_and_a_bleeding_is_accepted() -> None:
    hu = stripped(0)
    hu[ellipse(40, 30, 35)] -= 30  # 176 mL at 5 HU
    hu[8:18, 80:92, 60:75] += 40
    check_hu(volume_of(hu))


def test_a_head_without_noise_is_accepted() -> None:
    hu = np.full(SHAPE, -1000, np.int16)
    for shrink_mm, value in ((0, 1000), (8, 32), (50, 8)):
        hu[ellipse(95 - shrink_mm, 75 - shrink_mm, 85 - shrink_mm)] = value
    check_hu(volume_of(hu))


def test_a_body_larger_than_a_head_is_refused() -> None:
    torso = volume_of(head(scale=1.3))
    wider = replace(torso, column_step_mm=torso.column_step_mm * 1.5)
    assert reason_of(wider) is Reason.NOT_A_HEAD


def test_shoulders_below_a_head_do_not_matter() -> None:
    hu = head()
    shoulders = np.full((10, *SHAPE[1:]), 40, dtype=np.int16)
    check_hu(volume_of(np.concatenate([shoulders, hu])))


def test_a_thing_smaller_than_a_head_is_refused() -> None:
    hu = np.full(SHAPE, -1000, dtype=np.int16)
    hu[:, 50:70, 45:60] = 30
    assert reason_of(volume_of(hu)) is Reason.NOT_A_HEAD


def test_a_file_that_is_gone_is_said_to_have_vanished(tmp_path: Path) -> None:
    for files in ([], [str(tmp_path / "a")], [str(tmp_path / "a.nii")], [str(tmp_path / "a.mha")]):
        with pytest.raises(ScanError) as caught:
            read_volume(files)
        assert caught.value.reason is Reason.VANISHED


def test_several_files_of_a_one_file_format_are_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]))
    nib.save(image, tmp_path / "a.nii")
    assert read_volume([str(tmp_path / "a.nii")]).hu.shape == (6, 5, 4)
    with pytest.raises(ScanError, match="2 files of a format"):
        read_volume([str(tmp_path / "a.nii"), str(tmp_path / "a.nii")])


def test_a_template_comes_with_the_digest_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "template.nii"
    nib.save(nib.Nifti1Image(stripped(0).transpose(), np.diag([2.5, 2.0, 5.0, 1.0])), path)
    volume, digest = read_template(path)
    assert volume.hu.shape == SHAPE
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_template_that_cannot_be_used_is_an_error_of_the_user(tmp_path: Path) -> None:
    for name in ("gone.nii", "folder"):
        with pytest.raises(ConfigError, match="template"):
            read_template(tmp_path / name)
    flat = nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
    nib.save(flat, tmp_path / "flat.nii")
    with pytest.raises(ConfigError, match="every voxel is 0"):
        read_template(tmp_path / "flat.nii")


def test_a_message_names_neither_file_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "Nachname.nii").write_bytes(b"x")
    for name in ("Nachname.nii", "Nachname.dcm"):
        with pytest.raises(ScanError) as caught:
            read_volume([str(tmp_path / name)])
        assert "Nachname" not in str(caught.value)


def real(folder: str) -> Volume:
    files = sorted(path for path in (DATA / folder).iterdir() if path.name != "DIRFILE")
    return read_volume([str(path) for path in files])


@needs_data
def test_real_heads_phantoms_and_stripped_brains_are_accepted() -> None:
    check_hu(real("dcm_qa_ct/GE"))
    check_hu(real("dcm_qa_ct/Philips/S21570/S2010"))
    check_hu(read_volume([str(DATA / "totalsegmentator" / "ct_brain_atlas_1mm.nii.gz")]))
    check_hu(read_volume([str(DATA / "ichseg" / "scct_stripped_hu.nii.gz")]))


@needs_data
def test_real_scans_that_are_no_hu_are_refused() -> None:
    assert reason_of(real("slicer/CTHeadAxialDicom")) is Reason.NOT_HU
    head_hu = real("dcm_qa_ct/GE")
    for low, high in ((0, 80), (-1024, 400)):
        assert reason_of(replace(head_hu, hu=head_hu.hu.clip(low, high))) is Reason.NOT_HU
    for name in ("scct.nii", "scct_stripped.nii"):
        assert reason_of(read_volume([str(DATA / "clinical" / name)])) is Reason.NOT_HU
    mr = DATA / "niivue" / "nifti_space" / "RAS.nii.gz"
    assert reason_of(read_volume([str(mr)])) is Reason.NOT_HU


@needs_data
def test_real_torsos_are_no_heads() -> None:
    assert reason_of(real("totalsegmentator/example_ct_dicom")) is Reason.NOT_A_HEAD
    small = DATA / "totalsegmentator" / "example_ct_sm.nii.gz"
    assert reason_of(read_volume([str(small)])) is Reason.NOT_A_HEAD


@needs_data
@pytest.mark.parametrize("by", [1024, 1000, -1024, -1000])
def test_a_real_head_rescaled_once_too_often_or_never_is_refused(by: int) -> None:
    volume = real("dcm_qa_ct/GE")
    for low in (-32768, -1024):
        hu = (volume.hu.astype(int) + by).clip(low).astype(np.int16)
        assert reason_of(replace(volume, hu=hu)) is Reason.NOT_HU
