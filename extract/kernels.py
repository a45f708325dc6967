"""Kernels: from ConvolutionKernel, to what it is made for, and to a name that may be shared."""

import re
from typing import Protocol, runtime_checkable

_SHARP_WORDS = re.compile(r"bone|edge|lung|sharp|detail|ultra|knochen", re.IGNORECASE)
_SOFT_WORDS = re.compile(r"stand|std|stnd|soft|smooth|brain|routine|weich", re.IGNORECASE)
_SIEMENS_KERNEL = re.compile(r"[A-Z][a-z]?(\d\d)[a-z]*", re.IGNORECASE)
_CANON_KERNEL = re.compile(r"FC(\d\d)", re.IGNORECASE)
_PHILIPS_SOFT = {"A", "B", "C", "UA", "UB", "UC", "EB", "EC"}
_PHILIPS_SHARP = {"D", "E", "F", "L", "YA", "YB", "YC", "YD", "YE", "YL", "UD", "UE"}
_KERNEL_CODE = re.compile(r"[A-Z]{1,2}\d\d[A-Z]{0,2}", re.IGNORECASE)  # H31s, Hr40f, FC26
_KERNEL_WORD = re.compile(
    r"stand(ard)?|std|stnd|v?soft|smooth|v?sharp|bone(plus)?|plus|lung|detail|edge|ultra|brain|head"
    r"|neuro|body|routine|chest|chst|medium|hd|knochen|weich|[A-Z]",
    re.IGNORECASE,
)


@runtime_checkable
class HasKernel(Protocol):
    """What says of which kernel a scan is."""

    @property
    def kernel(self) -> str:
        """ConvolutionKernel."""

    @property
    def description(self) -> str:
        """SeriesDescription, where the kernel often stands, too."""


def kernel_kind(facts: HasKernel) -> str:
    """What the reconstruction kernel is made for: `soft-tissue`, `unknown` or `sharp`."""
    kernel = facts.kernel.strip()
    canon, siemens = _CANON_KERNEL.match(kernel), _SIEMENS_KERNEL.fullmatch(kernel)
    if canon:
        number = int(canon[1])
        soft = number < 30 or 40 <= number < 50 or 60 <= number < 70
        return "soft-tissue" if soft else "sharp"
    if siemens:
        return "soft-tissue" if int(siemens[1]) < 50 else "sharp"
    if kernel.upper() in _PHILIPS_SOFT | _PHILIPS_SHARP:
        return "soft-tissue" if kernel.upper() in _PHILIPS_SOFT else "sharp"
    for text in (kernel, facts.description):
        if _SHARP_WORDS.search(text):
            return "sharp"
        if _SOFT_WORDS.search(text):
            return "soft-tissue"
    return "unknown"


def kernel_name(text: str) -> str | None:
    """A ConvolutionKernel that reads like one, else None: the field is free text.

    At most three words that vendors use, one of them a code of a letter or two and two digits: too
    little for a name, also one that is spelled out, a date or a number of a patient.
    """
    words = re.split(r"[ _.+-]+", text.strip(" _.+-"))
    codes = [word for word in words if _KERNEL_CODE.fullmatch(word)]
    others = [word for word in words if word not in codes]
    philips = _PHILIPS_SOFT | _PHILIPS_SHARP
    known = all(_KERNEL_WORD.fullmatch(word) or word.upper() in philips for word in others)
    return text.strip() if known and len(codes) <= 1 and len(words) <= 3 else None
