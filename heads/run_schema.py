"""The schema of run files: parsed TOML, JSON and Parquet, to values of known types and ranges.

A run may be someone else's. Each file is checked where `ctfm.heads.runs` reads it, so that nothing
behind that has to ask again. What a file has beyond the schema is left as it is. Whether a digest
fits is not asked here, nor what the settings of a store mean (`ctfm.extract.recorded`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from ctfm.store.errors import RunError

MOST_NUMBERS = 1 << 20
"""Numbers of an embedding, findings, or heads that answer together: far above any that are used."""

Check = Callable[[Any, str], None]
"""Raises `ValueError` if a value is not as it must be; the text is where it stands."""


class Summary(dict[str, Any]):
    """The content of `summary.json`, checked; what is asked of it and is not there is an error."""

    def __missing__(self, name: str) -> Any:
        raise RunError(
            f"the summary of the run has no {name}: it was made by another version of ctfm, or "
            "changed since. Fit it again"
        )


def a_number(value: Any, where: str) -> None:
    """A finite number, or null, which stands for one that was not finite."""
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise ValueError(f"{where} must be a number, got {_brief(value)}")


def an_int(least: int, most: int = 2**63 - 1) -> Check:
    """A whole number within bounds."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"{where} must be a whole number from {least} to {most}, got {_brief(value)}"
            )

    return check


def a_positive(value: Any, where: str) -> None:
    """A finite number above zero."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where} must be a positive number, got {_brief(value)}")


def a_text(value: Any, where: str) -> None:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be text, got {_brief(value)}")


def a_bool(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {_brief(value)}")


def a_list(item: Check, *, least: int = 0, distinct: bool = False) -> Check:
    """A list of such values, at least so many."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= MOST_NUMBERS:
            raise ValueError(f"{where} must be a list of at least {least}, got {_brief(value)}")
        for index, one in enumerate(value):
            item(one, f"{where}[{index}]")
        if distinct and len(set(value)) < len(value):
            raise ValueError(f"{where} has a value twice")

    return check


def a_table(
    required: Mapping[str, Check] | None = None,
    optional: Mapping[str, Check] | None = None,
    *,
    of: Check | None = None,
) -> Check:
    """A table with these entries; `of` is what all others must be, None does not ask."""
    must, may = required or {}, optional or {}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a table, got {_brief(value)}")
        if absent := [name for name in must if name not in value]:
            raise ValueError(f"{where} has no {absent[0]}")
        for name, one in value.items():
            check_one = must.get(name) or may.get(name) or of
            if check_one is not None:
                check_one(one, f"{where}.{name}")

    return check


check_config = a_table(
    {
        "head": a_table(
            {
                "dims": a_list(an_int(1, MOST_NUMBERS), least=1),
                "findings": a_list(a_text, least=1, distinct=True),
            }
        ),
        "fit": a_table(),
        "stores": a_list(a_table({"fingerprint": a_text, "settings": a_table()}), least=1),
    },
    {"ensemble": a_table({"members": an_int(1, MOST_NUMBERS)})},
)
"""`config.toml`; what stands under [fit] is checked by `FitConfig.from_dict`."""

_COUNTS = a_table(of=an_int(0))
_WARNINGS = a_table({"warnings": a_list(a_text)})

check_summary = a_table(
    {"sha256": a_table(of=a_text)},
    {
        "best_epoch": an_int(0),
        "last_epoch": an_int(0),
        "seconds": a_number,
        "side_by_side": a_positive,
        "macro_auc": a_table(of=a_number),
        "macro_findings": _COUNTS,
        "scans": _COUNTS,
        "patients": _COUNTS,
        "parameters": a_table({"head": an_int(0), "adapter": an_int(0)}),
        "labels": a_table({"digest": a_text}),
        "stores": a_list(a_table()),
        "command": a_list(a_text),
        "repeats": a_table(of=a_number),
        "routing": a_list(_WARNINGS),
        "members": a_list(a_table({"name": a_text, "warnings": a_list(a_text)})),
        "findings": a_table(
            of=a_table(
                {
                    "positives": a_table({"train": an_int(0)}, of=an_int(0)),
                    "negatives": a_table({"train": an_int(0)}, of=an_int(0)),
                    "taught": a_bool,
                }
            )
        ),
        "versions": a_table(of=a_text),
        "machine": a_table(),
    },
)
"""`summary.json`."""

check_epoch = a_table({"epoch": an_int(0)}, {"best": a_bool, "member": a_text}, of=a_number)
"""One line of `metrics.jsonl`."""


def check_predictions(table: pa.Table, findings: Sequence[str]) -> None:
    """`predictions.parquet`: ids and split as text, and what is read of each finding.

    Raises:
        ValueError: If a column is missing or of another type.
    """
    for name in ("scan_id", "study_id", "patient_id", "split"):
        _check_column(table, name, _is_text, "text")
    for finding in findings:
        for kind in ("logit", "label"):
            _check_column(table, f"{kind}_{finding}", _is_number, "numbers")


def check_attention(table: pa.Table) -> None:
    """`attention.parquet`: scan and split as text, and lists of numbers of one length a scan.

    Raises:
        ValueError: If a column is missing or of another type, or lists differ in length.
    """
    for name in ("scan_id", "split"):
        _check_column(table, name, _is_text, "text")
    others = [one for one in table.column_names if one.startswith("attention_")]
    for name in ("position_mm", "attention", *others):
        _check_column(table, name, _is_list_of_numbers, "lists of numbers")
        lengths = (pc.list_value_length(table[one]) for one in (name, "position_mm"))
        if pc.any(pc.not_equal(*lengths)).as_py():
            raise ValueError(f"{name} and position_mm of a scan differ in length")


def _check_column(
    table: pa.Table, name: str, is_kind: Callable[[pa.DataType], bool], kind: str
) -> None:
    if table.column_names.count(name) != 1:
        raise ValueError(f"there must be one column {name}, got {table.column_names.count(name)}")
    if not is_kind(table.schema.field(name).type):
        raise ValueError(f"{name} must hold {kind}, got {table.schema.field(name).type}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_null(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_floating(kind) or pt.is_integer(kind) or pt.is_null(kind))


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    return (pt.is_list(kind) or pt.is_large_list(kind)) and _is_number(kind.value_type)


def _brief(value: Any) -> str:
    return "a table" if isinstance(value, dict) else repr(value)[:40]
