"""A cohort of phantoms: from a seed, to DICOM series, labels, and where each finding lies.

What a study is depends on (seed, patient, study) alone, not on the order, the number of workers or
the size of the cohort. Studies of one patient share the anatomy and what lasts.

Writes `study-0001/…` with the images, `lesions.parquet`, and last of all `labels.parquet`: a
folder with labels is finished. A study's folder gets its name when all its images are in it.
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from numpy.random import Generator

from ctfm.extract.phantom import Lesion
from ctfm.extract.phantom_anatomy import Anatomy, draw_anatomy
from ctfm.extract.phantom_dicom import Identity, localizer_of, slices_of
from ctfm.extract.phantom_findings import FINDINGS, PREVALENCE, draw_findings, draw_lesions
from ctfm.extract.phantom_scanner import (
    Pose,
    Protocol,
    acquire,
    draw_pose,
    draw_protocol,
    sharpened,
)
from ctfm.extract.volume import Volume
from ctfm.store.errors import ConfigError
from ctfm.store.files import (
    PARTIAL_SUFFIX,
    partial_path,
    publish_table,
    remove_leftovers,
    writing,
)
from ctfm.store.isolation import process_pool

MIN_MATRIX = 16
LESIONS = "lesions.parquet"

_STUDY_SHARES = (0.75, 0.18, 0.07)
"""Of patients with one, two and three studies."""

LESIONS_SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string(), nullable=False),
        pa.field("finding", pa.string(), nullable=False),
        pa.field("focal", pa.bool_(), nullable=False),
        pa.field("z_min_mm", pa.float64(), nullable=False),  # in the head frame
        pa.field("z_max_mm", pa.float64(), nullable=False),
    ]
)
LABELS_SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string(), nullable=False),  # StudyInstanceUID
        pa.field("patient_id", pa.string(), nullable=False),  # PatientID
        *(pa.field(name, pa.int8(), nullable=False) for name in FINDINGS),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PhantomScan:
    """One series of a phantom, and the truth about it."""

    volume: Volume
    world_from_head: Float64[np.ndarray, "4 4"]
    """Rigid: the head frame to world RAS, mm."""
    findings: tuple[str, ...]
    """In the order of `FINDINGS`."""
    lesions: tuple[Lesion, ...]
    """Those that are findings, one each."""
    anatomy: Anatomy
    pose: Pose
    protocol: Protocol
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What was written."""

    folder: Path
    labels: Path
    lesions: Path
    studies: int
    patients: int


def make_scan(
    seed: int,
    patient: int,
    study: int = 0,
    *,
    matrix: int = 512,
    slices: int | None = None,
    findings: Collection[str] | None = None,
    prevalence: Mapping[str, float] = PREVALENCE,
    pose: Pose | None = None,
    tilt_deg: float | None = None,
    sharp: bool = False,
) -> PhantomScan:
    """Make one scan in memory.

    Args:
        seed: Of the cohort.
        patient: Number of the patient, from 1 in a cohort.
        study: Number of the patient's study, from 0.
        matrix: Rows and columns.
        slices: How many; None is what the drawn spacing gives.
        findings: Exactly these; None draws them.
        prevalence: To draw findings from.
        pose: Of the head; None draws it. `Pose()` is straight.
        tilt_deg: Of the gantry; None draws it.
        sharp: Reconstruct with the bone kernel; everything but kernel and noise stays the same.

    Raises:
        ConfigError: If a number is out of its range or a finding is unknown.
    """
    _check(matrix=matrix, slices=slices)
    anatomy = draw_anatomy(_rng(seed, patient, "anatomy"))
    rng, lasting_rng = _finding_rngs(seed, patient, study)
    if findings is None:
        lesions = draw_findings(rng, anatomy, prevalence, lasting_rng=lasting_rng)
    else:
        lesions = draw_lesions(findings, rng, anatomy, lasting_rng=lasting_rng)
    pose = pose or draw_pose(_rng(seed, patient, study, "pose"))
    rng = _rng(seed, patient, study, "protocol")
    protocol = draw_protocol(rng, anatomy, pose, matrix=matrix, slices=slices, tilt_deg=tilt_deg)
    return _scan(
        anatomy,
        lesions,
        sharpened(protocol) if sharp else protocol,
        pose=pose,
        identity=Identity(seed=seed, patient=patient, study=study, series=1 + sharp),
    )


def write_series(scan: PhantomScan, folder: Path, *, first_number: int = 1) -> int:
    """Write a scan as DICOM files.

    Args:
        scan: The scan.
        folder: Made if it is not there.
        first_number: In the name of the first file.

    Returns:
        The number after that of the last file.

    Raises:
        StoreError: If a file cannot be written.
    """
    name = scan.protocol.vendor.file_name
    number = first_number
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for dataset in slices_of(scan.volume, scan.protocol, scan.identity):
            dataset.save_as(folder / name.format(n=number), enforce_file_format=True)
            number += 1
    return number


def write_cohort(
    out: Path,
    *,
    scans: int,
    seed: int = 0,
    matrix: int = 512,
    slices: int | None = None,
    prevalence_floor: float = 0.0,
    extras: float = 0.1,
    resume: bool = False,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Cohort:
    """Write a cohort.

    Args:
        out: Folder, empty or not there yet; or, with `resume`, that of an interrupted call.
        scans: Number of studies.
        seed: Same seed, same cohort; a larger cohort begins with the smaller one.
        matrix: Rows and columns of a slice.
        slices: A scan; None is what scanners do.
        prevalence_floor: Rarer findings are raised to it.
        extras: Share of studies with a localizer, and with a second reconstruction.
        resume: Keep the studies that are there. The other arguments must be those of that call.
        workers: Processes; the files do not depend on it.
        progress: Called with the number of studies that are done, after each.

    Raises:
        ConfigError: If `out` holds anything else, or a number is out of its range.
        StoreError: If something cannot be written.
    """
    _check(matrix=matrix, slices=slices)
    _check_cohort(scans=scans, workers=workers, prevalence_floor=prevalence_floor, extras=extras)
    prevalence = {name: max(share, prevalence_floor) for name, share in PREVALENCE.items()}
    jobs = [
        _Job(
            folder=out / f"study-{number:04d}",
            seed=seed,
            patient=patient,
            study=study,
            matrix=matrix,
            slices=slices,
            prevalence=prevalence,
            extras=extras,
        )
        for number, (patient, study) in enumerate(islice(_studies(seed), scans), start=1)
    ]
    # The labels come last: a cohort that has them is whole.
    _make_ready(out, kept={LESIONS, *(job.folder.name for job in jobs)} if resume else set())
    truths = _write_studies(jobs, workers=workers, progress=progress or (lambda done: None))
    return _publish(out, truths)


def _make_ready(out: Path, *, kept: Collection[str]) -> None:
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if kept:
            remove_leftovers(out)
        for path in out.iterdir():
            if path.name not in kept and not (kept and path.suffix == PARTIAL_SUFFIX):
                raise ConfigError(
                    f"{out} is not empty: choose another folder, or remove what it holds"
                )


def _scan(
    anatomy: Anatomy,
    lesions: Sequence[Lesion],
    protocol: Protocol,
    *,
    pose: Pose,
    identity: Identity,
) -> PhantomScan:
    world_from_head = pose.world_from_head(anatomy)
    noise_key = (identity.seed, identity.patient, identity.study, "noise", protocol.sharp)
    volume = acquire(
        anatomy, lesions, protocol, world_from_head=world_from_head, rng=_rng(*noise_key)
    )
    world_from_head[2, 3] += protocol.table_mm
    found = _by_finding(lesions)
    return PhantomScan(
        volume=volume,
        world_from_head=world_from_head,
        findings=tuple(found),
        lesions=tuple(found.values()),
        anatomy=anatomy,
        pose=pose,
        protocol=protocol,
        identity=identity,
    )


def _by_finding(lesions: Iterable[Lesion]) -> dict[str, Lesion]:
    """Those that are findings, in the order of `FINDINGS`."""
    found = {lesion.finding: lesion for lesion in lesions}
    return {name: found[name] for name in FINDINGS if name in found}


@dataclass(frozen=True, kw_only=True)
class _Job:
    folder: Path
    seed: int
    patient: int
    study: int
    matrix: int
    slices: int | None
    prevalence: dict[str, float]
    extras: float


@dataclass(frozen=True, kw_only=True)
class _Truth:
    labels: dict[str, object]
    lesions: list[dict[str, object]]


def _write_studies(
    jobs: list[_Job], *, workers: int, progress: Callable[[int], None]
) -> list[_Truth]:
    truths: dict[int, _Truth] = {}
    if workers == 1:
        for i, job in enumerate(jobs):
            truths[i] = _write_study(job)
            progress(len(truths))
    else:
        with process_pool(min(workers, len(jobs))) as pool:
            index_of = {pool.submit(_write_study, job): i for i, job in enumerate(jobs)}
            for future in as_completed(index_of):
                truths[index_of[future]] = future.result()
                progress(len(truths))
    return [truths[i] for i in range(len(jobs))]


def _write_study(job: _Job) -> _Truth:
    """Write the images of a study, unless they are there, and say what is in them."""
    partial = partial_path(job.folder)
    try:
        if not job.folder.exists():
            _write_images(job, partial)
            with writing(job.folder):
                partial.rename(job.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _truth_of(job)


def _write_images(job: _Job, folder: Path) -> None:
    def scan_of(*, sharp: bool) -> PhantomScan:
        return make_scan(
            job.seed,
            job.patient,
            job.study,
            matrix=job.matrix,
            slices=job.slices,
            prevalence=job.prevalence,
            sharp=sharp,
        )

    scan = scan_of(sharp=False)
    rng = _rng(job.seed, job.patient, job.study, "extras")
    number = write_series(scan, folder)
    if rng.random() < job.extras:
        number = write_series(scan_of(sharp=True), folder, first_number=number)
    if rng.random() < job.extras:
        identity = Identity(seed=job.seed, patient=job.patient, study=job.study, series=0)
        dataset = localizer_of(scan.volume, scan.protocol, identity)
        file = folder / scan.protocol.vendor.file_name.format(n=number)
        with writing(file):
            dataset.save_as(file, enforce_file_format=True)


def _truth_of(job: _Job) -> _Truth:
    identity = Identity(seed=job.seed, patient=job.patient, study=job.study)
    anatomy = draw_anatomy(_rng(job.seed, job.patient, "anatomy"))
    rng, lasting_rng = _finding_rngs(job.seed, job.patient, job.study)
    found = _by_finding(draw_findings(rng, anatomy, job.prevalence, lasting_rng=lasting_rng))
    ids = {"study_id": identity.study_uid, "patient_id": identity.patient_id}
    lesions: list[dict[str, object]] = [
        {
            "study_id": identity.study_uid,
            "finding": name,
            "focal": lesion.focal,
            "z_min_mm": lesion.z_min_mm,
            "z_max_mm": lesion.z_max_mm,
        }
        for name, lesion in found.items()
    ]
    return _Truth(
        labels={**ids, **{name: int(name in found) for name in FINDINGS}}, lesions=lesions
    )


def _publish(out: Path, truths: Sequence[_Truth]) -> Cohort:
    labels, lesions = out / "labels.parquet", out / LESIONS
    lesion_rows = [row for truth in truths for row in truth.lesions]
    label_rows = [truth.labels for truth in truths]
    publish_table(lesions, pa.Table.from_pylist(lesion_rows, schema=LESIONS_SCHEMA))
    publish_table(labels, pa.Table.from_pylist(label_rows, schema=LABELS_SCHEMA))
    patients = len({row["patient_id"] for row in label_rows})
    return Cohort(
        folder=out, labels=labels, lesions=lesions, studies=len(truths), patients=patients
    )


def _studies(seed: int) -> Iterator[tuple[int, int]]:
    """(patient, study) of a cohort without end."""
    for patient in count(1):
        n = _rng(seed, patient, "studies").choice(len(_STUDY_SHARES), p=_STUDY_SHARES)
        yield from ((patient, study) for study in range(n + 1))


def _finding_rngs(seed: int, patient: int, study: int) -> tuple[Generator, Generator]:
    """Of the findings of a study, and of those that all studies of the patient share."""
    return _rng(seed, patient, study, "findings"), _rng(seed, patient, "lasting")


def _rng(*key: object) -> Generator:
    digest = hashlib.sha256(repr(("ctfm phantom", *key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def _check(*, matrix: int, slices: int | None) -> None:
    if matrix < MIN_MATRIX:
        raise ConfigError(f"matrix must be {MIN_MATRIX} at least, got {matrix}")
    if slices is not None and slices < 1:
        raise ConfigError(f"slices must be positive, got {slices}")


def _check_cohort(*, scans: int, workers: int, prevalence_floor: float, extras: float) -> None:
    for name, number in (("scans", scans), ("workers", workers)):
        if number < 1:
            raise ConfigError(f"{name} must be positive, got {number}")
    for name, share in (("prevalence_floor", prevalence_floor), ("extras", extras)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} must lie in 0..1, got {share}")
