"""Findings of the synthetic head: from prevalences, to lesions.

Findings come together as they do: trauma brings several, blood breaks into the ventricles and
blocks them, and a midline shift has a mass that pushes. The prevalence of each stays the one asked
for. A lesion knows the z-range of the head frame where it lies, so that attention can be checked
against the truth.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.random import Generator

from ctfm.extract.phantom import Lesion
from ctfm.extract.phantom_anatomy import Anatomy
from ctfm.extract.phantom_draws import DRAW, draw_shift
from ctfm.store.errors import ConfigError

PREVALENCE: dict[str, float] = {
    "intraparenchymal_hemorrhage": 0.12,
    "intraventricular_hemorrhage": 0.06,
    "subarachnoid_hemorrhage": 0.10,
    "subdural_hematoma": 0.12,
    "epidural_hematoma": 0.02,
    "acute_infarct": 0.15,
    "chronic_infarct": 0.20,
    "skull_fracture": 0.08,
    "pneumocephalus": 0.04,
    "scalp_hematoma": 0.15,
    "intracranial_tumor": 0.06,
    "hydrocephalus": 0.07,
    "midline_shift": 0.08,
    "intracranial_calcification": 0.30,
}
"""Share of studies with each finding, in the order of the taxonomy."""

FINDINGS = tuple(PREVALENCE)

LASTING = frozenset({"chronic_infarct", "intracranial_tumor", "intracranial_calcification"})
"""All studies of a patient share these."""

_TRAUMA = frozenset(
    {"subarachnoid_hemorrhage", "subdural_hematoma", "epidural_hematoma", "skull_fracture"}
    | {"pneumocephalus", "scalp_hematoma"}
)
_TRAUMA_SHARE = 0.25
_TOGETHER = 2.5
"""How much likelier a finding is together with what it goes with."""
_FOLLOWS = {
    "intraventricular_hemorrhage": "intraparenchymal_hemorrhage",
    "hydrocephalus": "intraventricular_hemorrhage",
}
_MASSES = (
    "epidural_hematoma",
    "subdural_hematoma",
    "intraparenchymal_hemorrhage",
    "intracranial_tumor",
    "acute_infarct",
)
"""What pushes the midline; the first that is there does."""


def draw_findings(
    rng: Generator,
    anatomy: Anatomy,
    prevalence: Mapping[str, float] = PREVALENCE,
    *,
    lasting_rng: Generator | None = None,
) -> tuple[Lesion, ...]:
    """Draw which findings a study has, and their lesions.

    Args:
        rng: Of the study.
        anatomy: Of the patient.
        prevalence: Of the findings to draw from; each of `FINDINGS`.
        lasting_rng: Of the patient, for what all studies share; None is `rng`.

    Returns:
        Lesions in the order in which they are painted.

    Raises:
        ConfigError: If a finding is unknown or a prevalence is not in 0..1.
    """
    lasting_rng = lasting_rng or rng
    names = draw_names(rng, prevalence, lasting_rng=lasting_rng)
    return draw_lesions(names, rng, anatomy, lasting_rng=lasting_rng)


def draw_names(
    rng: Generator, prevalence: Mapping[str, float], *, lasting_rng: Generator
) -> frozenset[str]:
    """Draw which findings a study has; see `draw_findings`."""
    check_findings(prevalence)
    for name, share in prevalence.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"the prevalence of {name} must lie in 0..1, got {share}")
    share_of = {name: prevalence.get(name, 0.0) for name in FINDINGS}
    lots = dict(zip(FINDINGS, rng.random(len(FINDINGS)).tolist(), strict=True))
    lasting = dict(zip(FINDINGS, lasting_rng.random(len(FINDINGS)).tolist(), strict=True))
    lots |= {name: lasting[name] for name in LASTING}
    trauma = rng.random() < _TRAUMA_SHARE
    present: set[str] = set()
    for name in FINDINGS:  # in this order, a cause comes before what it causes
        cause_share, caused = _cause(name, present, share_of=share_of, trauma=trauma)
        together = math.inf if name == "midline_shift" else _TOGETHER
        chance = _chance(share_of[name], cause_share=cause_share, caused=caused, together=together)
        if lots[name] < chance:
            present.add(name)
    return frozenset(present)


def draw_lesions(
    names: Collection[str], rng: Generator, anatomy: Anatomy, *, lasting_rng: Generator
) -> tuple[Lesion, ...]:
    """Draw the lesions of given findings; see `draw_findings`.

    A mass without the finding `midline_shift` may still push the midline by less than
    `SHIFT_LABEL_MM`: that is a lesion without a finding.
    """
    check_findings(names)
    seeds = dict(zip(FINDINGS, _seeds(rng), strict=True))
    lasting = dict(zip(FINDINGS, _seeds(lasting_rng), strict=True))
    seeds |= {name: lasting[name] for name in LASTING}
    pushing = next((name for name in _MASSES if name in names), None)
    lesions: list[Lesion] = []
    push_side = 1
    for name, draw in DRAW.items():
        if name not in names:
            continue
        own_rng = np.random.default_rng(seeds[name])
        side = 1 if own_rng.random() < 0.5 else -1
        large = name == pushing and "midline_shift" in names
        push_side = side if name == pushing else push_side
        lesion = draw(own_rng, anatomy, side=side, large=large)
        anatomy = lesion.reshape(anatomy)
        lesions.append(lesion)
    if pushing or "midline_shift" in names:
        own_rng = np.random.default_rng(seeds["midline_shift"])
        called = "midline_shift" in names
        lesions.insert(0, draw_shift(own_rng, anatomy, away_from=push_side, called=called))
    return tuple(lesions)


def check_findings(names: Collection[str]) -> None:
    """Refuse names that the phantom cannot draw.

    Raises:
        ConfigError: If there are any.
    """
    unknown = sorted(set(names) - set(FINDINGS))
    if unknown:
        raise ConfigError(
            f"the phantom has no finding {', '.join(unknown)}: it draws {', '.join(FINDINGS)}"
        )


def _seeds(rng: Generator) -> list[int]:
    seeds: list[int] = rng.integers(1 << 63, size=len(FINDINGS)).tolist()
    return seeds


def _cause(
    name: str, present: Collection[str], *, share_of: Mapping[str, float], trauma: bool
) -> tuple[float, bool]:
    """Share of studies with what a finding goes with, and whether this one is one of them."""
    if name in _TRAUMA:
        return _TRAUMA_SHARE, trauma
    if name in _FOLLOWS:
        return share_of[_FOLLOWS[name]], _FOLLOWS[name] in present
    if name == "midline_shift":
        return _mass_share(share_of), any(mass in present for mass in _MASSES)
    return 0.0, False


def _chance(
    share: float, *, cause_share: float, caused: bool, together: float = _TOGETHER
) -> float:
    """Chance of a finding with, or without, its cause, so that its share stays what it is."""
    if not 0 < cause_share < 1:
        return share
    with_cause = max(share, min(together * share, 0.9, share / cause_share))
    if caused:
        return with_cause
    return (share - cause_share * with_cause) / (1 - cause_share)


def _mass_share(share_of: Mapping[str, float]) -> float:
    """Share of studies that have any of `_MASSES`."""
    none = 0.0
    for trauma, weight in ((True, _TRAUMA_SHARE), (False, 1 - _TRAUMA_SHARE)):
        chances = [
            _chance(share_of[name], cause_share=_TRAUMA_SHARE, caused=trauma)
            if name in _TRAUMA
            else share_of[name]
            for name in _MASSES
        ]
        none += weight * math.prod(1 - chance for chance in chances)
    return 1 - none
