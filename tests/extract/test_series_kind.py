"""What is no plain head CT is refused, and why, from its header alone."""

from dataclasses import replace
from typing import Any

import pytest
from dicom_series import FACTS

from ctfm.extract.series_kind import fault_of
from ctfm.store.reasons import Reason


@pytest.mark.parametrize(
    ("reason", "facts"),
    [
        (Reason.NOT_AN_IMAGE, {"has_pixels": False, "modality": "SR"}),
        (Reason.COLOUR, {"samples": 3}),
        (Reason.COLOUR, {"photometric": "PALETTE COLOR"}),
        (Reason.NOT_CT, {"modality": "MR"}),
        (Reason.NOT_CT, {"sop_class": "1.2.840.10008.5.1.4.1.1.7"}),
        (Reason.LOCALIZER, {"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}),
        (Reason.LOCALIZER, {"description": "Topogram  0.6  T20s"}),
        (Reason.DERIVED, {"image_type": ("DERIVED", "SECONDARY", "MIP")}),
        (Reason.DERIVED, {"image_type": ("DERIVED", "PRIMARY", "PERFUSION", "RCBF")}),
        (Reason.DERIVED, {"rescale_type": "MGML"}),
        (Reason.CONTRAST, {"contrast_agent": "Iomeron 400"}),
        (Reason.CONTRAST, {"description": "CTA Head 0.75"}),
        (Reason.CONTRAST, {"description": "Head with contrast"}),
        (Reason.CONTRAST, {"description": "HEAD W CONTRAST"}),
        (Reason.CONTRAST, {"description": "HEAD W CONTRAST 0.625"}),
        (Reason.CONTRAST, {"description": "POST CONTRAST NO 2"}),
        (Reason.UNSUPPORTED_ENCODING, {"transfer_syntax": "1.2.840.10008.1.2.4.53"}),
        (Reason.UNSUPPORTED_ENCODING, {"unplaced_frames": 20}),
    ],
)
def test_what_is_no_head_ct_is_refused_with_its_reason(
    reason: Reason, facts: dict[str, Any]
) -> None:
    fault = fault_of(replace(FACTS, **facts))
    assert fault is not None
    assert fault.reason is reason


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"sop_class": ""},  # lost by an anonymiser
        {"image_type": ("DERIVED", "SECONDARY", "MPR")},
        {"image_type": ()},
        {"rescale_type": "US"},
        {"contrast_agent": "NONE"},
        {"description": "HEAD W/O CONTRAST 5mm"},
        {"description": "Brain non-contrast"},
        {"description": "HEAD W O CONTRAST"},
        {"description": "Head contrast: none"},
        {"description": "Brain, contrast-free"},
        {"description": "Head, contrast: NO"},
        {"description": "CCT nativ ohne KM"},
        {"description": "NCCT head"},
    ],
)
def test_a_plain_head_ct_is_not_refused(facts: dict[str, Any]) -> None:
    assert fault_of(replace(FACTS, **facts)) is None
