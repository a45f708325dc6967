"""Series ids: from the planes of DICOM files, to those of one series, and whose it is.

A SeriesInstanceUID belongs to one study of one patient (PS3.3 A.1.2). Where images of one series
carry other ids, whose head it is cannot be known, and two lines of the catalogue would be one
patient in two splits. Ids that differ in case, blanks or leading zeros, and empty ones, do not
conflict. Some anonymisers give one SeriesInstanceUID to whole cohorts: images that share no study
and no object, and do not complement each other, stay apart.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.series_parts import is_stack

MAX_STEP_GAPS = 1.5
"""Gaps that may lie between two stacks, one of which goes on in the other. Chosen: half a gap more
than between the slices of one stack, less than where a slice is lost."""
WHOLE_HEAD_MM = 100.0
"""A stack of this length, without holes, goes on in no other. Chosen: the head of an adult is 140
to 180 mm long, and shorter parts are what a series is broken into."""
SAME_PLACE_MM = 1.0
"""Stacks that go on in each other lie so exactly above each other. Chosen: more than the rounding
of positions, less than patients are put apart."""

Originals = tuple[str, str, str]
"""Patient, study and series, as the headers have them."""


class SeriesPlanes:
    """The planes of each series. Equal facts become one object: a cohort has millions of planes."""

    def __init__(self) -> None:
        self.planes: dict[tuple[str, str, str], list[Plane]] = defaultdict(list)
        self._facts: dict[SeriesFacts, SeriesFacts] = {}

    def add(self, planes: Iterable[Plane]) -> None:
        """Sort planes in by patient, study and series, under the originals of their ids."""
        for plane in planes:
            facts = self._facts.setdefault(plane.facts, plane.facts)
            study = facts.study or facts.series
            originals = (facts.patient or study, study, facts.series)
            self.planes[originals].append(replace(plane, facts=facts))


def without_conflicts(
    series: Mapping[Originals, list[Plane]],
) -> Iterator[tuple[Originals, list[Plane], bool]]:
    """Join what is one series under several ids; whether these ids conflict."""
    by_series: dict[tuple[str, bool], list[Originals]] = defaultdict(list)
    for originals in sorted(series):
        folder = series[originals][0].facts.series_is_folder
        by_series[originals[2], folder].append(originals)
    for (_, folder), several in by_series.items():
        alone = len(several) == 1 or folder
        for one_series in [[one] for one in several] if alone else _joined(several, series):
            planes = [plane for one in one_series for plane in series[one]]
            yield _fullest(one_series, series), planes, _ids_conflict(planes)


def _joined(
    several: Sequence[Originals], series: Mapping[Originals, list[Plane]]
) -> list[list[Originals]]:
    """Group ids that share a study or an object, or whose stacks complement each other."""
    links = list(_continuations([series[one] for one in several]))
    first_of: dict[tuple[str, str], int] = {}
    # Where a header has no study, the study is named by its series.
    unnamed = any(study == name for _, study, name in several)
    for i, (patient, study, _) in enumerate(several):
        tokens = {("object", plane.sop) for plane in series[several[i]] if plane.sop}
        tokens |= {("study", study), *([("patient", plain_id(patient))] if unnamed else [])}
        links += [(first_of.setdefault(token, i), i) for token in tokens]
    n = len(several)
    ends = np.array(links).T
    _, label = connected_components(coo_array((np.ones(len(links)), (ends[0], ends[1])), (n, n)))
    groups: dict[int, list[Originals]] = defaultdict(list)
    for one, number in zip(several, label.tolist(), strict=True):
        groups[number].append(one)
    return list(groups.values())


def _continuations(stacks: Sequence[Sequence[Plane]]) -> Iterator[tuple[int, int]]:
    """Pairs of stacks of which one begins about where the other ends, or fills its holes.

    The head of every other patient of a cohort ends where one more begins: those are whole.
    """
    ends = []
    for i, stack in enumerate(stacks):
        if len(stack) > 1 and all(map(is_placed, stack)):
            low, high = extent_mm(stack)
            even = is_stack(stack)
            if not (even and high - low >= WHOLE_HEAD_MM):
                ends.append((low, high, i, even))
    ends.sort()
    lows = [low for low, *_ in ends]
    for low, high, i, even in ends:
        reach_mm = MAX_STEP_GAPS * (high - low) / (len(stacks[i]) - 1)
        for place in [high] if even else [high, low]:
            first = bisect_left(lows, place - reach_mm)
            last = bisect_right(lows, place + reach_mm)
            others = [j for _, _, j, _ in ends[first:last]]
            yield from ((i, j) for j in others if _lie_alike(stacks[i], stacks[j]))


def is_placed(plane: Plane) -> bool:
    """Whether its place is known in full."""
    return None not in (plane.position_mm, plane.facts.axes, plane.facts.pixel_mm)


def _lie_alike(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    """Whether others lie on the line along which some do, tilted or not, on the same grid."""
    one, other = some[0].facts, others[0].facts
    if not (one.same_grid(other) and one.nearly_parallel(other)):
        return False
    places = np.array(sorted((plane.position_mm for plane in some), key=lambda mm: (mm or ())[2:]))
    place = np.array(others[0].position_mm)
    along = (places[-1] - places[0]) / max(places[-1, 2] - places[0, 2], 1e-9)
    aside = place - places[0] - along * (place[2] - places[0, 2])
    return bool(np.abs(aside[:2]).max() < SAME_PLACE_MM)


def _fullest(several: Sequence[Originals], series: Mapping[Originals, list[Plane]]) -> Originals:
    """The ids of most images; before them those of which every one is an original."""
    return min(
        several, key=lambda one: (one[0] == one[1], one[1] == one[2], -len(series[one]), one)
    )


def _ids_conflict(planes: Iterable[Plane]) -> bool:
    patients, studies = n_ids(planes)
    return patients > 1 or studies > 1


def n_ids(planes: Iterable[Plane]) -> tuple[int, int]:
    """How many patients and studies; ids that are empty, or spelled otherwise, do not count."""
    facts = {id(plane.facts): plane.facts for plane in planes}.values()
    patients = {plain_id(one.patient) for one in facts} - {""}
    studies = {one.study for one in facts} - {""}
    return len(patients), len(studies)


def plain_id(text: str) -> str:
    """An id without what two systems spell otherwise: case, blanks, leading zeros."""
    return re.sub(r"\s+", "", text).casefold().lstrip("0")


def extent_mm(planes: Sequence[Plane]) -> tuple[float, float]:
    """Height of the middles of the lowest and the highest plane; all have a place."""
    heights = []
    for plane in planes:
        facts = plane.facts
        assert plane.position_mm is not None
        middle = facts.row_step_mm * (facts.rows - 1) + facts.column_step_mm * (facts.columns - 1)
        heights.append(plane.position_mm[2] + float(middle[2]) / 2)
    return min(heights), max(heights)
