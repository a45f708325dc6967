"""Vendors: from Manufacturer, which is free text, to a name of a closed list."""

import re

_VENDORS = {
    "GE": r"\bge\b|general electric",
    "Siemens": r"siemens",
    "Philips": r"philips|picker|marconi|elscint",
    "Canon": r"canon|toshiba",
    "Hitachi": r"hitachi|fujifilm",
    "Neusoft": r"neusoft",
    "United Imaging": r"united imaging|\buih\b",
    "Samsung": r"samsung|neurologica",
    "Shimadzu": r"shimadzu",
}


def vendor_name(manufacturer: str) -> str | None:
    """A name from a closed list: the field is free text, and the catalogue may be shared."""
    if not manufacturer:
        return None
    return next(
        (v for v, words in _VENDORS.items() if re.search(words, manufacturer, re.I)), "other"
    )
