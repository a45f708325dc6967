"""DICOM agent: from a parsed header, to what it codes of contrast medium.

Sources: PS3.3 C.7.6.4 (contrast/bolus), C.7.6.4b (enhanced, where each item of the sequence has its
route), C.7.6.16.2.12 (whether an agent was given before a frame). What follows from it is decided
in `series_kind`.
"""

from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.tag import Tag

from ctfm.extract.dicom_values import as_number, as_text, items_of, value_of

_SEQUENCE = "ContrastBolusAgentSequence"
_ROUTES = "ContrastBolusAdministrationRouteSequence"
_INJECTION = ("ContrastBolusTotalDose", "ContrastFlowRate", "ContrastFlowDuration")
AGENT_KEYWORDS = (
    _SEQUENCE,
    _ROUTES,
    "ContrastBolusRoute",
    "ContrastBolusVolume",
    *_INJECTION,
)
_TAGS = frozenset(map(Tag, AGENT_KEYWORDS))


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentFacts:
    """What is coded of an agent, beside its name in ContrastBolusAgent."""

    codes: tuple[str, ...] = ()
    """Meanings of the codes of agents; "" for a code without one."""
    given: bool | None = None
    """ContrastBolusAgentAdministered of the frame; None where the header has none."""
    routes: tuple[str, ...] = ()
    """ContrastBolusRoute, and meanings of the codes of routes."""
    volume_ml: float | None = None
    """ContrastBolusVolume."""
    injected: bool = False
    """Whether a dose, a flow rate or a duration of the flow is above zero."""


NO_AGENT = AgentFacts()


def agent_facts(dataset: Dataset, groups: Sequence[Dataset]) -> AgentFacts:
    """What a header says of agents; `groups` are the functional groups of the frame."""
    given = _given(groups)
    # Most headers have none of these, and a missing element is slow to ask for.
    if given is None and _TAGS.isdisjoint(dataset.keys()):
        return NO_AGENT
    agents = items_of(dataset, _SEQUENCE)
    routes = (code for item in (dataset, *agents) for code in items_of(item, _ROUTES))
    texts = (as_text(value_of(dataset, "ContrastBolusRoute")), *_meanings(routes))
    volume_ml = _number(dataset, "ContrastBolusVolume")
    return AgentFacts(
        codes=tuple(_meanings(agents)),
        given=given,
        routes=tuple(text for text in texts if text),
        volume_ml=None if volume_ml < 0 else volume_ml,
        injected=any(_number(dataset, keyword) > 0 for keyword in _INJECTION),
    )


def _given(groups: Iterable[Dataset]) -> bool | None:
    usages = (item for group in groups for item in items_of(group, "ContrastBolusUsageSequence"))
    said = {as_text(value_of(usage, "ContrastBolusAgentAdministered")) for usage in usages}
    return None if said <= {""} else "YES" in said


def _meanings(codes: Iterable[Dataset]) -> list[str]:
    return [as_text(value_of(code, "CodeMeaning")) for code in codes]


def _number(dataset: Dataset, keyword: str) -> float:
    """The first of its values, as there may be one for each injection; -1 if there is none."""
    value = value_of(dataset, keyword)
    return as_number(value[0] if isinstance(value, MutableSequence) else value, missing=-1.0)
