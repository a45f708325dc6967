"""Phantom cohorts: DICOM that others read as it was made, and its truth."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.dataset import Dataset
from scipy.ndimage import map_coordinates

from ctfm.extract import phantom_cohort
from ctfm.extract.dicom_pixels import read_dicom
from ctfm.extract.geometry import measure_stack
from ctfm.extract.phantom_cohort import Cohort, PhantomScan, make_scan, write_cohort, write_series
from ctfm.extract.phantom_findings import FINDINGS
from ctfm.extract.phantom_scanner import VENDORS, Pose
from ctfm.store.errors import ConfigError

SCANS, MATRIX, SLICES = 14, 32, 7

TYPE_1 = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "FrameOfReferenceUID",
    "ImageType",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "RescaleIntercept",
    "RescaleSlope",
]
"""Of the modules that PS3.3 A.3 makes mandatory for a CT image."""
TYPE_2 = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "PatientPosition",
    "PositionReferenceIndicator",
    "Manufacturer",
    "InstanceNumber",
    "SliceThickness",
    "KVP",
    "AcquisitionNumber",
]
"""May be empty, may not be absent."""


def scan_by(manufacturer: str, *, tilt_deg: float = 0.0, matrix: int = 48) -> PhantomScan:
    for patient in range(1, 40):
        scan = make_scan(2, patient, matrix=matrix, slices=9, tilt_deg=tilt_deg)
        if scan.protocol.vendor.manufacturer == manufacturer:
            return scan
    raise AssertionError(f"no scan by {manufacturer} among 40")


def read_headers(folder: Path) -> list[Dataset]:
    datasets = [pydicom.dcmread(file) for file in folder.iterdir()]
    return sorted(datasets, key=lambda dataset: int(dataset.InstanceNumber))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    out = tmp_path_factory.mktemp("phantoms") / "cohort"
    return write_cohort(out, scans=SCANS, seed=4, matrix=MATRIX, slices=SLICES, extras=0.4)


@pytest.fixture(scope="module", params=[vendor.manufacturer for vendor in VENDORS])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PhantomScan, list[Dataset]]:
    scan = scan_by(request.param, tilt_deg=17.0)
    folder = tmp_path_factory.mktemp("series") / "not" / "there" / "yet"
    assert write_series(scan, folder, first_number=3) == 3 + len(scan.volume.hu)
    return scan, read_headers(folder)


def test_a_scan_depends_on_seed_patient_and_study_alone() -> None:
    first = make_scan(5, 3, 1, matrix=MATRIX, slices=SLICES)
    make_scan(5, 8, matrix=MATRIX, slices=SLICES)
    again = make_scan(5, 3, 1, matrix=MATRIX, slices=SLICES)
    np.testing.assert_array_equal(first.volume.hu, again.volume.hu)
    np.testing.assert_array_equal(first.world_from_head, again.world_from_head)
    assert (first.lesions, first.identity) == (again.lesions, again.identity)
    for other in ((6, 3, 1), (5, 4, 1), (5, 3, 0)):
        scan = make_scan(*other, matrix=MATRIX, slices=SLICES)
        assert (scan.volume.hu != first.volume.hu).any()
        assert scan.identity.study_uid != first.identity.study_uid


def test_studies_of_a_patient_share_the_anatomy() -> None:
    first, second, other = (
        make_scan(5, patient, study, matrix=MATRIX, slices=SLICES)
        for patient, study in ((3, 0), (3, 1), (4, 0))
    )
    assert first.anatomy == second.anatomy != other.anatomy
    assert first.pose != second.pose
    assert first.identity.patient_id == second.identity.patient_id != other.identity.patient_id


@pytest.mark.parametrize("names", [(), ("epidural_hematoma", "midline_shift"), FINDINGS])
def test_forced_findings_are_exactly_those(names: tuple[str, ...]) -> None:
    scan = make_scan(1, 2, matrix=MATRIX, slices=SLICES, findings=set(names))
    assert scan.findings == names
    assert tuple(lesion.finding for lesion in scan.lesions) == names


def test_the_head_is_where_the_scan_says() -> None:
    pose = Pose(pitch_deg=-11.0, roll_deg=6.0, yaw_deg=9.0, shift_mm=(8.0, -14.0, 19.0))
    scan = make_scan(2, 5, matrix=160, slices=60, findings=(), pose=pose, tilt_deg=-8.0)
    volume = scan.volume
    steps = np.stack([np.diff(volume.slice_origin_mm, axis=0).mean(axis=0), volume.row_step_mm])
    steps = np.concatenate([steps, volume.column_step_mm[None]])
    half_width_mm, half_length_mm, height_mm = scan.anatomy.half_axes_mm
    bone_mm = scan.anatomy.scalp_mm + scan.anatomy.skull_mm / 2
    places = {
        (0, 0, -bone_mm): (400, 1500),
        (half_width_mm + 8, 0, -0.6 * height_mm): (-1024, -900),
        (0, half_length_mm + 9, -0.6 * height_mm): (-1024, -900),
        (30, -25, -46): (10, 45),
    }
    for place_mm, (low_hu, high_hu) in places.items():
        world_mm = (scan.world_from_head @ (*place_mm, 1.0))[:3]
        voxel = (world_mm - volume.slice_origin_mm[0]) @ np.linalg.inv(steps)
        hu = map_coordinates(volume.hu.astype(float), voxel[:, None], order=1, cval=np.nan)[0]
        assert low_hu <= hu <= high_hu, place_mm
    rotation = scan.world_from_head[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_pixels_come_back_as_hu(written: tuple[PhantomScan, list[Dataset]]) -> None:
    scan, datasets = written
    for dataset, hu in zip(datasets, scan.volume.hu, strict=True):
        stored = dataset.pixel_array.astype(int)
        restored = stored * int(dataset.RescaleSlope) + int(dataset.RescaleIntercept)
        padding = stored == dataset.get("PixelPaddingValue", 1 << 20)
        np.testing.assert_array_equal(restored[~padding], hu[~padding])
        assert (hu[padding] == -1024).all()
        assert padding.any() == ("PixelPaddingValue" in dataset)
    assert scan.volume.hu.min() < -950
    assert scan.volume.hu.max() > 500


def test_geometry_comes_back_with_its_tilt(written: tuple[PhantomScan, list[Dataset]]) -> None:
    scan, datasets = written
    volume = scan.volume
    lps_to_ras = np.array([-1.0, -1.0, 1.0])
    for dataset, origin_mm in zip(datasets, volume.slice_origin_mm, strict=True):
        position_mm = np.array(dataset.ImagePositionPatient, float) * lps_to_ras
        np.testing.assert_allclose(position_mm, origin_mm, atol=1e-3)
        along_row, along_column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
        rows_mm, columns_mm = map(float, dataset.PixelSpacing)
        row_step_mm, column_step_mm = along_column * rows_mm, along_row * columns_mm
        np.testing.assert_allclose(row_step_mm * lps_to_ras, volume.row_step_mm, atol=1e-5)
        np.testing.assert_allclose(column_step_mm * lps_to_ras, volume.column_step_mm, atol=1e-5)
        assert float(dataset.GantryDetectorTilt) == 17.0
    table_mm = np.diff(volume.slice_origin_mm, axis=0)
    np.testing.assert_allclose(table_mm[:, :2], 0, atol=1e-9)
    stack = measure_stack(
        volume.slice_origin_mm,
        row_step_mm=volume.row_step_mm,
        column_step_mm=volume.column_step_mm,
    )
    assert stack.tilt_deg == pytest.approx(17.0)
    assert stack.spacing_mm == pytest.approx(scan.protocol.spacing_mm)


def test_every_mandatory_attribute_is_there(written: tuple[PhantomScan, list[Dataset]]) -> None:
    _, datasets = written
    for dataset in datasets:
        assert not [keyword for keyword in TYPE_1 if dataset.get(keyword) in (None, "", [])]
        assert not [keyword for keyword in TYPE_2 if keyword not in dataset]
        assert dataset.SOPClassUID == pydicom.uid.CTImageStorage
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert list(dataset.ImageType)[:3] == ["ORIGINAL", "PRIMARY", "AXIAL"]
        assert str(dataset.PatientName).startswith("PHANTOM^")
    uids = [dataset.SOPInstanceUID for dataset in datasets]
    uids += [datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID]
    uids += [datasets[0].FrameOfReferenceUID]
    assert len(set(uids)) == len(datasets) + 3
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_vendors_differ_in_what_they_store() -> None:
    habits = {(vendor.intercept, vendor.signed, vendor.padding) for vendor in VENDORS}
    assert habits == {(-1024, False, None), (-1024, True, -2000), (0, True, None)}


def test_the_package_reads_back_what_it_wrote(tmp_path: Path) -> None:
    scan = scan_by("GE MEDICAL SYSTEMS", tilt_deg=-12.5)
    write_series(scan, tmp_path)
    volume = read_dicom([str(file) for file in tmp_path.iterdir()])
    np.testing.assert_array_equal(volume.hu, scan.volume.hu)
    np.testing.assert_allclose(volume.slice_origin_mm, scan.volume.slice_origin_mm, atol=1e-3)


def test_a_sharp_reconstruction_shows_the_same_scan_with_more_noise() -> None:
    soft, sharp = (make_scan(3, 1, matrix=64, slices=9, sharp=sharp) for sharp in (False, True))
    np.testing.assert_array_equal(soft.volume.slice_origin_mm, sharp.volume.slice_origin_mm)
    assert soft.lesions == sharp.lesions
    assert soft.identity.study_uid == sharp.identity.study_uid
    assert soft.identity.uid("series") != sharp.identity.uid("series")
    brain = (soft.volume.hu > 20) & (soft.volume.hu < 45)
    brain[:5] = False
    difference = sharp.volume.hu[brain].astype(float) - soft.volume.hu[brain]
    assert abs(np.median(difference)) < 2
    assert sharp.volume.hu[brain].std() > 1.2 * soft.volume.hu[brain].std()


def test_labels_agree_with_lesions_and_with_dicom(cohort: Cohort) -> None:
    labels = pq.read_table(cohort.labels)
    lesions = pq.read_table(cohort.lesions).to_pylist()
    assert labels.column_names == ["study_id", "patient_id", *FINDINGS]
    assert {str(labels.schema.field(name).type) for name in FINDINGS} == {"int8"}
    found = defaultdict(set)
    for lesion in lesions:
        found[lesion["study_id"]].add(lesion["finding"])
        assert lesion["z_min_mm"] < lesion["z_max_mm"] <= 0
    rows = labels.to_pylist()
    assert len(rows) == SCANS == cohort.studies
    for number, row in enumerate(rows, start=1):
        assert {name for name in FINDINGS if row[name]} == found[row["study_id"]]
        headers = read_headers(cohort.folder / f"study-{number:04d}")
        assert {header.StudyInstanceUID for header in headers} == {row["study_id"]}
        assert {header.PatientID for header in headers} == {row["patient_id"]}


def test_some_patients_have_several_studies(cohort: Cohort) -> None:
    counts = Counter(pq.read_table(cohort.labels)["patient_id"].to_pylist())
    assert len(counts) == cohort.patients < SCANS
    assert 2 <= max(counts.values()) <= 3


def test_some_studies_have_a_localizer_or_a_second_reconstruction(cohort: Cohort) -> None:
    series: Counter[str] = Counter()
    for folder in cohort.folder.glob("study-*"):
        headers = read_headers(folder)
        by_series = Counter(header.SeriesInstanceUID for header in headers)
        localizers = [header for header in headers if "LOCALIZER" in header.ImageType]
        assert sorted(by_series.values()) in [
            [*[1] * len(localizers), *[SLICES] * n] for n in (1, 2)
        ]
        for localizer in localizers:
            assert localizer.pixel_array.shape == (localizer.Rows, localizer.Columns)
        series.update(localizer=bool(localizers), second=len(by_series) - len(localizers) - 1)
    assert 0 < series["localizer"] < SCANS
    assert 0 < series["second"] < SCANS


def test_file_names_follow_the_vendor(cohort: Cohort) -> None:
    names = {file.name for file in cohort.folder.glob("study-*/*")}
    assert {"IM0001", "1.dcm", "000001.dcm"} <= names


def test_workers_and_size_of_the_cohort_change_no_byte(cohort: Cohort, tmp_path: Path) -> None:
    done: list[int] = []
    write_cohort(
        tmp_path / "again",
        scans=5,
        seed=4,
        matrix=MATRIX,
        slices=SLICES,
        extras=0.4,
        workers=2,
        progress=done.append,
    )
    assert done == [1, 2, 3, 4, 5]
    again, whole = files_of(tmp_path / "again"), files_of(cohort.folder)
    images = [name for name in again if not name.endswith(".parquet")]
    assert len(images) >= 5 * SLICES
    assert all(again[name] == whole[name] for name in images)
    labels = pq.read_table(tmp_path / "again" / "labels.parquet")
    assert labels == pq.read_table(cohort.labels).slice(0, 5)


def test_a_floor_raises_rare_findings(tmp_path: Path) -> None:
    cohort = write_cohort(
        tmp_path / "out", scans=3, matrix=MATRIX, slices=4, prevalence_floor=1.0, extras=0
    )
    labels = pq.read_table(cohort.labels)
    assert all(labels[name].to_pylist() == [1, 1, 1] for name in FINDINGS)


def test_a_cohort_that_was_interrupted_has_no_labels(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, scans=3, matrix=MATRIX, slices=4, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["study-0001"]


def small_cohort(out: Path, **options: Any) -> Cohort:
    return write_cohort(out, scans=4, matrix=MATRIX, slices=4, extras=0.9, **options)


@pytest.mark.parametrize("when", ["between studies", "within a study"])
def test_an_interrupted_cohort_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def stop(done: int) -> None:
        if done == 2 and when == "between studies":
            raise KeyboardInterrupt

    def write_and_stop(scan: PhantomScan, folder: Path, *, first_number: int = 1) -> int:
        number = write_series(scan, folder, first_number=first_number)
        if "study-0003" in folder.name:
            raise KeyboardInterrupt
        return number

    monkeypatch.setattr(phantom_cohort, "write_series", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        small_cohort(tmp_path / "killed", progress=stop)
    monkeypatch.undo()
    written_ns = (tmp_path / "killed" / "study-0002").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="is not empty"):
        small_cohort(tmp_path / "killed")
    small_cohort(tmp_path / "killed", resume=True)
    assert (tmp_path / "killed" / "study-0002").stat().st_mtime_ns == written_ns
    small_cohort(tmp_path / "whole")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_goes_on_with_no_folder_that_holds_something_else(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, cohort.folder):
        with pytest.raises(ConfigError, match="is not empty"):
            write_cohort(folder, scans=SCANS, resume=True)


def test_refuses_a_folder_that_holds_anything(cohort: Cohort) -> None:
    with pytest.raises(ConfigError, match="is not empty: choose another folder"):
        write_cohort(cohort.folder, scans=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scans": 0}, "scans must be positive, got 0"),
        ({"workers": 0}, "workers must be positive"),
        ({"matrix": 8}, "matrix must be 16 at least, got 8"),
        ({"slices": 0}, "slices must be positive"),
        ({"prevalence_floor": 1.1}, "prevalence_floor must lie in"),
        ({"extras": -0.1}, "extras must lie in"),
    ],
)
def test_refuses_numbers_out_of_range(
    setting: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_cohort(tmp_path / "out", **{"scans": 1, **setting})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_spacing_and_coverage_are_those_of_head_scans() -> None:
    for patient in range(1, 12):
        scan = make_scan(8, patient, matrix=16)
        assert 4 <= scan.protocol.spacing_mm <= 5
        along_mm = len(scan.volume.hu) * scan.protocol.spacing_mm
        assert 125 < along_mm < 170
        highest_mm = scan.volume.hu[-1].max()
        assert (highest_mm < 700) or scan.protocol.above_mm < 4
