"""Kernels: from ConvolutionKernel, to what it is made for, and to a name that may be shared."""

import re
from typing import Protocol, runtime_checkable

_SHARP_WORDS = re.compile(r"bone|edge|lung|sharp|detail|ultra|knochen", re.IGNORECASE)
_SOFT_WORDS = re.compile(r"stand|std|stnd|soft|smooth|brain|routine|weich", re.IGNORECASE)
_SIEMENS_KERNEL = re.compile(r"[A-Z][a-z]?(\d\d)[a-z]*", re.IGNORECASE)
_CANON_KERNEL = re.compile(r"FC(\d\d)", re.IGNORECASE)
_PHILIPS_SOFT = {"A", "B", "C", "UA", "UB", "UC", "EB", "EC"}
_PHILIPS_SHARP = {"D", "E", "F", "L", "YA", "YB", "YC", "YD", "YE", "YL", "UD", "UE"}
_PHILIPS_LETTERS = _PHILIPS_SOFT | _PHILIPS_SHARP
_KERNEL_CODE = re.compile(r"[BHIJTU]\d\d[A-Za-z]?|[BHQ][a-z]\d\d[a-z]?|(?i:F[CL])\d\d[A-Za-z]?")
"""Codes of Siemens (H31s, J40s, Hr40f, Qr36d) and of Canon (FC26, FL03)."""
_UNITED_IMAGING = re.compile(r"[A-Z]_V?(SOFT|SHARP|STAND|SMOOTH)_[A-Z]")
_KERNEL_WORD = re.compile(
    r"stand(ard)?|std|stnd|v?soft|smooth|v?sharp|bone(plus)?|plus|lung|detail|edge|ultra|brain|head"
    r"|neuro|body|routine|chest|chst|medium|hd|knochen|weich",
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
    if kernel.upper() in _PHILIPS_LETTERS:
        return "soft-tissue" if kernel.upper() in _PHILIPS_SOFT else "sharp"
    for text in (kernel, facts.description):
        if _SHARP_WORDS.search(text):
            return "sharp"
        if _SOFT_WORDS.search(text):
            return "soft-tissue"
    return "unknown"


def kernel_name(text: str) -> str | None:
    """A ConvolutionKernel that reads like one, else None: the field is free text.

    At most three words that vendors use, of which one may be a code, and one a letter or two of
    Philips: too little for initials, a name that is spelled out, a date or a number of a patient.
    """
    if _UNITED_IMAGING.fullmatch(text.strip()):
        return text.strip()
    words = re.split(r"[ _.+-]+", text.strip(" _.+-"))
    others = [word for word in words if not _KERNEL_WORD.fullmatch(word)]
    codes = [word for word in others if _KERNEL_CODE.fullmatch(word)]
    letters = [word for word in others if word.upper() in _PHILIPS_LETTERS]
    known = len(others) == len(codes) + len(letters) and max(len(codes), len(letters)) <= 1
    return text.strip() if known and len(words) <= 3 else None
