"""File owners: from subjects, sidecars and DICOM series, to the patient and study of each file.

A patient is named by PatientID, as in DICOM, and so are the other files of its BIDS subject; else
by the subject. A study that is here as DICOM, too, is of the patient that it has there, whatever
its subject is called. What names more than it can names nothing: a StudyInstanceUID of several
patients, or a PatientID of many subjects, is a placeholder.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ctfm.extract.series_ids import plain_id
from ctfm.extract.sidecars import Sidecar

MAX_SUBJECTS_OF_A_PATIENT = 2
"""Chosen: one person may be two subjects of a trial, hardly three."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a file is; "" where nothing tells it."""

    patient: str = ""
    study: str = ""


def owners(
    subjects: Sequence[str], sidecars: Sequence[Sidecar], dicom: Mapping[str, Set[str]]
) -> list[Owner]:
    """Tell whose each file is.

    Args:
        subjects: Of each file, by its name; "" for none.
        sidecars: Of each file.
        dicom: The patients of each StudyInstanceUID in DICOM series.
    """
    patient_ids = _without_placeholders([one.patient for one in sidecars], subjects)
    of_subject = _first_of(zip(subjects, patient_ids, strict=True))
    patient_ids = [
        own or of_subject.get(subject, "")
        for own, subject in zip(patient_ids, subjects, strict=True)
    ]
    names = [own or subject for own, subject in zip(patient_ids, subjects, strict=True)]
    studies = [one.study for one in sidecars]
    true = _true_studies(zip(studies, names, patient_ids, strict=True), dicom)
    studies = [study if study in true else "" for study in studies]
    in_dicom = [min(dicom.get(study, {""})) for study in studies]
    also = _first_of(zip(names, in_dicom, strict=True))
    return [
        Owner(patient=there or also.get(name, name), study=study)
        for name, study, there in zip(names, studies, in_dicom, strict=True)
    ]


def _without_placeholders(patient_ids: Sequence[str], subjects: Sequence[str]) -> list[str]:
    have: dict[str, set[str]] = defaultdict(set)
    for patient_id, subject in zip(patient_ids, subjects, strict=True):
        if subject:
            have[patient_id].add(subject)
    return [one if len(have[one]) <= MAX_SUBJECTS_OF_A_PATIENT else "" for one in patient_ids]


def _first_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """For each name that has any, the first in the alphabet of what goes with it."""
    first: dict[str, str] = {}
    for name, other in pairs:
        if name and other:
            first[name] = min(other, first.get(name, other))
    return first


def _true_studies(files: Iterable[tuple[str, str, str]], dicom: Mapping[str, Set[str]]) -> Set[str]:
    """The studies of one patient; each file is study, name of the patient, and PatientID."""
    named: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, set[str]] = defaultdict(set)
    for study, name, patient_id in files:
        named[study] |= {plain_id(name)} - {""}
        ids[study] |= {plain_id(patient_id)} - {""}
    # Without a PatientID, DICOM has the study for a patient.
    there = {
        study: {plain_id(one) for one in dicom.get(study, ()) if one != study} for study in ids
    }
    return {
        study
        for study in ids
        if study and len(named[study]) <= 1 and len(ids[study] | there[study]) <= 1
    }
