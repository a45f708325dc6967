"""Series passes: from the planes of one reconstruction, to those of each pass over the head.

Planes come in sweeps: an acquisition (AcquisitionNumber, PS3.3 C.7.10.1), or a part of one that
begins anew by AcquisitionTime, InstanceNumber or with finer slices. A sweep shows the places of its
slices and all between them, but for its holes: gaps larger than its slices are thick. Sweeps that
show none of the places of each other are one pass.

Places that two passes show, if fewer than half, were scanned again, mostly because the patient had
moved: the later images are used. With half or more, each pass is a scan. More than three passes are
a dynamic run, and nothing is chosen from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.dicom_values import as_number, as_whole
from ctfm.extract.geometry import SAME_POSITION_MM, lost_slices

MAX_PASSES = 3
"""More over one place are a dynamic run. Chosen: one of perfusion has 20 and more; a head that was
scanned again has two, seldom three."""
MAX_GAP_PER_THICKNESS = 1.5
"""A stack with larger gaps has holes, which another part of its series may fill. Chosen between 1,
slice beside slice, and 2, every other slice."""
SEAM = 0.1
"""Slices of two sweeps that lie closer than this part of their distance, or of their thickness if
that is less, show one place. Chosen: more than positions are rounded by; a seam of two blocks at
0.15 of it has been seen, and both of its slices are used."""
_CROWDED = 0.9
"""Slices closer than this part of their thickness overlap, as do those of two passes. Chosen: 1 but
for rounding."""
MIN_FINER = 1.2
"""Slices are finer than others if these are so many times as thick. Chosen: measured thicknesses
differ by less, chosen ones (5, 4, 3 mm …) by more."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Planes of a series that are one scan, or are none because later ones took their place."""

    planes: list[Plane]
    replaced: int = 0
    """Images of the same places that were scanned before and are not among the planes."""
    superseded: bool = False
    passes: int = 0
    """Over the same places, where none can be chosen from; else 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sweep:
    """Planes by their depth."""

    planes: Sequence[Plane]
    depth_mm: Float[np.ndarray, " z"]

    def take(self, index: Int[np.ndarray, " n"] | Bool[np.ndarray, " z"]) -> "_Sweep":
        """Some of the planes, in their order."""
        numbers = np.arange(len(self.planes))[index]
        return _Sweep(planes=[self.planes[i] for i in numbers], depth_mm=self.depth_mm[numbers])

    @cached_property
    def thickness_mm(self) -> Float[np.ndarray, " z"]:
        """NaN where the header has none."""
        return np.array([plane.thickness_mm or np.nan for plane in self.planes])

    @cached_property
    def usual_thickness_mm(self) -> float:
        """NaN if no header has one."""
        known_mm = self.thickness_mm[np.isfinite(self.thickness_mm)]
        return float(np.median(known_mm)) if known_mm.size else np.nan

    @cached_property
    def between(self) -> Bool[np.ndarray, " places"]:
        """Whether it shows the places below its first slice, between each two, above its last."""
        gap_mm = np.diff(self.depth_mm)
        reach_mm = MAX_GAP_PER_THICKNESS * (self.thickness_mm[1:] + self.thickness_mm[:-1]) / 2
        shown = ~(gap_mm > reach_mm)  # a thickness that is not known parts nothing
        shown[lost_slices(gap_mm) if gap_mm.size else []] = False
        return np.array([False, *shown.tolist(), False])

    @cached_property
    def seam_mm(self) -> float:
        """How far beside a slice its place reaches."""
        usual_mm = np.array([self.usual_thickness_mm, np.nan])
        if len(self.planes) > 1:
            usual_mm[1] = np.median(np.diff(self.depth_mm))
        return float(np.fmax(SAME_POSITION_MM, SEAM * np.fmin(usual_mm[0], usual_mm[1])))

    def shows(self, depth_mm: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of these places it shows."""
        after = np.searchsorted(self.depth_mm, depth_mm)
        edges_mm = np.array([-np.inf, *self.depth_mm, np.inf])
        nearest_mm = np.minimum(depth_mm - edges_mm[after], edges_mm[after + 1] - depth_mm)
        shown: Bool[np.ndarray, " n"] = self.between[after] | (nearest_mm < self.seam_mm)
        return shown


def split_passes(planes: list[Plane]) -> list[Part]:
    """Part planes that all have a place, by the passes that show it."""
    if _is_plain(planes):
        return [Part(planes=planes)]
    sweeps = _sweeps(planes)
    if len(sweeps) == 1 or _are_stacked(sweeps) or any(map(_repeats, sweeps)):
        return [Part(planes=planes)]
    order = _passes_of(sweeps)
    n = max(order) + 1
    if n == 1 or n > MAX_PASSES:
        return [Part(planes=planes, passes=n if n > 1 else 0)]
    everything = _joined(sweeps)
    sweep_of = {id(one): i for i, sweep in enumerate(sweeps) for one in sweep.planes}
    number = np.array([sweep_of[id(plane)] for plane in everything.planes])
    return _parted(everything, number, np.array(order)[number])


def _is_plain(planes: Sequence[Plane]) -> bool:
    """Whether no slices overlap, and each acquisition is a block of its own: most series."""
    depth_mm = depth_of(planes, planes[0].facts)
    order = np.argsort(depth_mm, kind="stable")
    gap_mm = np.diff(depth_mm[order])
    if not gap_mm.size:
        return True
    thickest_mm = max(plane.thickness_mm or 0.0 for plane in planes)
    names = [planes[i].acquisition for i in order]
    changes = sum(one != other for one, other in pairwise(names))
    least_mm = max(SAME_POSITION_MM, _CROWDED * thickest_mm, SEAM * np.median(gap_mm))
    return bool(changes == len(set(names)) - 1 and gap_mm.min() >= least_mm)


def _parted(
    all_of_it: _Sweep, number: Int[np.ndarray, " z"], pass_of: Int[np.ndarray, " z"]
) -> list[Part]:
    """Part several passes.

    Args:
        all_of_it: The planes of all of them.
        number: The sweep of each plane, in their order of time.
        pass_of: The pass of each plane.
    """
    planes, n = list(all_of_it.planes), int(pass_of.max()) + 1
    again = np.zeros(len(planes), bool)
    for i, k in {(int(i), int(k)) for i, k in zip(number, pass_of, strict=True)}:
        own = number == i
        for other in set(range(n)) - {k}:
            later = all_of_it.take((number > i) & (pass_of == other))
            again[own] |= later.shows(all_of_it.depth_mm[own])
    most = max(int(again[pass_of == k].sum()) for k in range(n))
    if 2 * most >= len(planes) - again.sum():
        return [Part(planes=list(all_of_it.take(pass_of == k).planes)) for k in range(n)]
    _replace_single(all_of_it, number, again)
    left = [all_of_it.take((pass_of == k) & ~again) for k in range(n)]
    between = any(
        one.shows(other.depth_mm).any() for one in left for other in left if other is not one
    )
    if between or any(_number(plane) is None for plane in planes):
        return [Part(planes=planes, passes=n)]  # which is the later one cannot be known
    before = list(all_of_it.take(again).planes)
    return [
        Part(planes=list(all_of_it.take(~again).planes), replaced=len(before)),
        Part(planes=before, superseded=True),
    ]


def _replace_single(
    all_of_it: _Sweep, number: Int[np.ndarray, " z"], again: Bool[np.ndarray, " z"]
) -> None:
    """Mark what a sweep of one slice took the place of: the slice nearest to it."""
    for i in np.flatnonzero(np.bincount(number) == 1):
        at = int(np.flatnonzero(number == i)[0])
        earlier = np.flatnonzero((number < i) & ~again)
        if not earlier.size or not all_of_it.take(earlier).shows(all_of_it.depth_mm[[at]])[0]:
            continue
        apart_mm = np.abs(all_of_it.depth_mm[earlier] - all_of_it.depth_mm[at])
        again[earlier[apart_mm.argmin()]] = True


def _sweeps(planes: Sequence[Plane]) -> list[_Sweep]:
    """Acquisitions in their order, and those that begin anew in several."""
    groups: dict[str, list[Plane]] = {}
    for plane in planes:
        groups.setdefault(plane.acquisition, []).append(plane)
    order = sorted(groups, key=lambda name: (as_whole(name) or 0, name))
    along = planes[0].facts
    return [sweep for name in order for sweep in _begun_anew(_sweep(groups[name], along))]


def _sweep(planes: Sequence[Plane], along: SeriesFacts) -> _Sweep:
    depth_mm = depth_of(planes, along)
    order = np.argsort(depth_mm, kind="stable")
    return _Sweep(planes=[planes[i] for i in order], depth_mm=depth_mm[order])


def _begun_anew(sweep: _Sweep) -> list[_Sweep]:
    gap_mm = np.diff(sweep.depth_mm)
    if not (gap_mm < _CROWDED * sweep.usual_thickness_mm).any():
        return [sweep]
    for tell in (_time, _instance, _fineness):
        said = tell(sweep)
        run_of = None if said is None else _runs(said, sweep.depth_mm)
        if run_of is not None:
            return [sweep.take(run_of == k) for k in range(run_of.max() + 1)]
    return [sweep]


def _runs(
    said: Float[np.ndarray, " z"], depth_mm: Float[np.ndarray, " z"]
) -> Int[np.ndarray, " z"] | None:
    """Part planes where the way along what is said of them turns back.

    Returns:
        The number of the run of each plane; None if nothing is told, or too much.
    """
    values, value_of = np.unique(said, return_inverse=True)
    if len(values) == 1:
        return None
    if len(values) <= MAX_PASSES:
        return np.asarray(value_of)
    way_mm = np.diff(np.bincount(value_of, weights=depth_mm) / np.bincount(value_of))
    unusual_mm = np.abs(np.abs(way_mm) - np.median(np.abs(way_mm)))
    run_of_value = [0, 0]
    for i in range(1, len(way_mm)):
        run = run_of_value[-1]
        if way_mm[i - 1] * way_mm[i] < 0 and run_of_value[i - 1] == run:
            run += 1
            if unusual_mm[i - 1] > unusual_mm[i]:
                run_of_value[i] = run  # the turn is the first of the way back
        run_of_value.append(run)
    runs = np.array(run_of_value)[value_of]
    return runs if runs.max() < MAX_PASSES else None


def _time(sweep: _Sweep) -> Float[np.ndarray, " z"] | None:
    texts = [plane.acquisition_time.replace(":", "") for plane in sweep.planes]
    said = np.array([as_number(text, missing=np.nan) for text in texts])
    return None if np.isnan(said).any() else said


def _instance(sweep: _Sweep) -> Float[np.ndarray, " z"] | None:
    """InstanceNumber, but not of two images of most places: they may be two reconstructions."""
    said = np.array([as_number(plane.instance, missing=np.nan) for plane in sweep.planes])
    gap_mm = np.diff(sweep.depth_mm)
    repeats = int((gap_mm < SAME_POSITION_MM).sum())
    if np.isnan(said).any() or len(np.unique(said)) < len(said):
        return None
    return None if 2 * repeats >= len(said) - repeats else said


def _fineness(sweep: _Sweep) -> Float[np.ndarray, " z"] | None:
    values = np.unique(sweep.thickness_mm)
    told = np.isfinite(values).all() and (values[1:] >= MIN_FINER * values[:-1]).all()
    return -sweep.thickness_mm if told else None


def _joined(sweeps: Sequence[_Sweep]) -> _Sweep:
    planes = [plane for sweep in sweeps for plane in sweep.planes]
    depth_mm = np.concatenate([sweep.depth_mm for sweep in sweeps])
    order = np.argsort(depth_mm, kind="stable")
    return _Sweep(planes=[planes[i] for i in order], depth_mm=depth_mm[order])


def _are_stacked(sweeps: Sequence[_Sweep]) -> bool:
    """Whether each begins above the end of the one below it, as most do."""
    ends_mm = sorted((sweep.depth_mm[0], sweep.depth_mm[-1]) for sweep in sweeps)
    reach_mm = max(sweep.seam_mm for sweep in sweeps)
    return all(high + reach_mm <= low for (_, high), (low, _) in pairwise(ends_mm))


def _repeats(sweep: _Sweep) -> bool:
    return bool((np.diff(sweep.depth_mm) < SAME_POSITION_MM).any())


def _passes_of(sweeps: Sequence[_Sweep]) -> list[int]:
    """The pass of each: the last one that shows none of its places; no more once too many."""
    passes: list[_Sweep] = []
    found: list[int] = []
    for sweep in sweeps:
        free = (k for k in reversed(range(len(passes))) if not _share(passes[k], sweep))
        k = next(free, len(passes))
        if k == len(passes):
            passes.append(sweep)
        else:
            passes[k] = _joined([passes[k], sweep])
        found.append(k)
        if len(passes) > MAX_PASSES:
            break
    return found


def _share(one: _Sweep, other: _Sweep) -> bool:
    return bool(one.shows(other.depth_mm).any() or other.shows(one.depth_mm).any())


def _number(plane: Plane) -> int | None:
    return as_whole(plane.acquisition or "0")


def depth_of(planes: Sequence[Plane], along: SeriesFacts) -> Float[np.ndarray, " z"]:
    """Where planes lie along the normal of some, which must have axes."""
    assert along.axes is not None
    normal = np.cross(along.axes[:3], along.axes[3:])
    positions = np.array([plane.position_mm for plane in planes], dtype=float)
    depth_mm: Float[np.ndarray, " z"] = positions @ normal
    return depth_mm
