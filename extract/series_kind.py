"""Series kind: from what a header says of a series, to why it is of no use, whatever its geometry.

A series is refused by the first of these that holds: no pixels; colour; not CT, or a secondary
capture; localizer; derived map; contrast; an encoding that nothing reads. Coded attributes come
before free text: ImageType and FrameType, RescaleType, VolumeBasedCalculationTechnique, then what
an object codes of its agent, then ContrastBolusAgent, then the words of SeriesDescription
(`series_text`). BodyPartExamined decides nothing, nor do StudyDescription and ProtocolName, which
are those of a whole examination: a CTA lies in a study named "CT HEAD W/O CONTRAST".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from ctfm.extract.dicom import SeriesFacts
from ctfm.extract.dicom_agent import NO_AGENT, AgentFacts
from ctfm.extract.dicom_pixels import encoding_fault
from ctfm.extract.series_text import is_enteral, read_agent, read_description
from ctfm.extract.series_words import sections, vocabulary
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_CT_CLASSES = {
    "",  # lost by some anonymisers
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
}
_COLOURS = ("RGB", "YBR", "PALETTE")
_KINDS = {
    Reason.LOCALIZER: "localizer",
    Reason.DERIVED: "derived",
    Reason.CONTRAST: "contrast",
}
"""The first of these that ImageType tells."""
_PLAIN_TECHNIQUES = {"", "NONE", "MPR", "MIXED"}
_HU = re.compile(r"|HU|US|UNSPECIFIED|UH|HE|HOUNSFIELD[\W_]*(UNITS?|EINHEIT(EN)?)?")
"""RescaleType; US is unspecified (PS3.3 C.11.1.1.2). HU_MOD, modified HU, is not among them."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a header, or the JSON beside a NIfTI file, says of the kind of its images."""

    image_type: tuple[str, ...] = ()
    """Every value of ImageType, or of an enhanced object's FrameType."""
    description: str = ""
    """SeriesDescription."""
    rescale_type: str = ""
    techniques: tuple[str, ...] = ()
    """VolumeBasedCalculationTechnique."""
    contrast_agent: str = ""
    """ContrastBolusAgent."""
    agent: AgentFacts = NO_AGENT
    """What is coded of it."""


def fault_of(facts: SeriesFacts) -> ScanError | None:
    """Why planes with these facts are of no use, whatever their geometry; None if they may be."""
    if not facts.has_pixels:
        return ScanError(Reason.NOT_AN_IMAGE, "a DICOM object without pixels")
    if facts.samples != 1 or facts.photometric.startswith(_COLOURS):
        return ScanError(Reason.COLOUR, "a colour image")
    told_by_class = not facts.modality and facts.sop_class in _CT_CLASSES - {""}
    if facts.modality != "CT" and not told_by_class:
        return ScanError(Reason.NOT_CT, "its modality is not CT")
    if facts.sop_class not in _CT_CLASSES:
        return ScanError(Reason.NOT_CT, "a secondary capture or another kind of object")
    return kind_fault(_described(facts)) or encoding_fault(facts)


@lru_cache(maxsize=4096)
def kind_of(facts: SeriesFacts) -> Reason:
    """The reason of `fault_of`, or `OK`."""
    fault = fault_of(facts)
    return Reason.OK if fault is None else fault.reason


def kind_fault(said: Described) -> ScanError | None:
    """Why images that are described so are no plain CT: localizer, derived, contrast; or None."""
    return next(_kind_faults(said), None)


def _kind_faults(said: Described) -> Iterator[ScanError]:
    told = read_description(said.description)
    kinds = _image_types(said.image_type)
    faults = {
        reason: ScanError(reason, f'the image type says "{kinds[name]}"')
        for reason, name in _KINDS.items()
        if name in kinds
    }
    if told and told.reason is not Reason.OK:
        detail = f'the series description says "{told.word}"'
        faults.setdefault(told.reason, ScanError(told.reason, detail))
    if Reason.LOCALIZER in faults:
        yield faults[Reason.LOCALIZER]
    if any(technique.upper() not in _PLAIN_TECHNIQUES for technique in said.techniques):
        yield ScanError(Reason.DERIVED, "its calculation technique is a projection or a rendering")
    if not _HU.fullmatch(said.rescale_type.strip().upper()):
        yield ScanError(Reason.DERIVED, "its rescale type says that its unit is not HU")
    if Reason.DERIVED in faults:
        yield faults[Reason.DERIVED]
    if detail := _coded_contrast(said):
        yield ScanError(Reason.CONTRAST, detail)
    if Reason.CONTRAST in faults:
        yield faults[Reason.CONTRAST]


@cache
def _image_types(values: tuple[str, ...]) -> dict[str, str]:
    """Kinds that the values tell, with the value as the vocabulary spells it."""
    kinds: dict[str, str] = {}
    for words in (sections("image_type"), vocabulary("derived")):
        for word in (word for value in values for word in words.words(value)):
            for kind in word.meanings:
                kinds.setdefault(kind, word.text)
    return kinds


def _coded_contrast(said: Described) -> str:
    """What the attributes of the agent say: why there is contrast medium, or nothing.

    An agent that is swallowed does not reach the vessels of the head. A volume says that there was
    one, a route only where nothing denies it: scanners leave that of a protocol in every series.
    """
    agent = said.agent
    if agent.given is not None:
        return "the header says that a contrast agent was given" if agent.given else ""
    routes = [route for route in agent.routes if is_enteral(route) or _is_some(route)]
    if routes and all(map(is_enteral, routes)):
        return ""
    names = [*agent.codes, *filter(None, [said.contrast_agent])]
    told = [read_agent(name) if name else None for name in names]
    for name, says in zip(names, told, strict=True):
        if not name or (says and says.reason is Reason.CONTRAST):
            named = f': "{says.word}"' if says and says.word else ""
            return f"the header names a contrast agent{named}"
    if agent.volume_ml:
        return "the header has a volume of contrast agent"
    if agent.injected:
        return "the header has a dose or a flow of contrast agent"
    denied = any(says and says.reason is Reason.OK for says in told) or agent.volume_ml == 0
    return "the header has a route of contrast agent" if routes and not denied else ""


def _is_some(route: str) -> bool:
    told = read_agent(route)
    return told is not None and told.reason is Reason.CONTRAST


def _described(facts: SeriesFacts) -> Described:
    return Described(
        image_type=facts.image_type,
        description=facts.description,
        rescale_type=facts.rescale_type,
        techniques=facts.techniques,
        contrast_agent=facts.contrast_agent,
        agent=facts.agent,
    )
