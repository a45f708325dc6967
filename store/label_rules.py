"""Label rules: from what a user says of a label table, typed or in TOML, to one set of rules.

`labels.toml` beside `labels.csv` (the table's name with another ending) keeps what would have to be
typed every time; what is typed comes over it, key by key.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ctfm.store.errors import LabelError

ID_COLUMNS = ("scan_id", "study_id", "patient_id")
"""From fine to coarse."""


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """How a label table is to be read; each rule is also a key of the TOML file."""

    findings: tuple[str, ...] | None = None
    """Columns that are findings, in this order; None is every column that holds labels."""
    ignore: tuple[str, ...] = ()
    """Columns that are left out."""
    id_column: str | None = None
    """Name of the column that joins, or NAME=KIND with one of `ID_COLUMNS` as the kind."""
    id_repair: str | None = None
    """What is done to ids that match no scan as they are (`ctfm.store.id_repairs`)."""
    positive: tuple[str, ...] = ()
    """Words that mean positive, beside the usual ones."""
    negative: tuple[str, ...] = ()
    """Words that mean negative."""
    uncertain: tuple[str, ...] = ()
    """Words that mean unknown."""
    sheet: str | None = None
    """Sheet of a workbook."""

    @classmethod
    def beside(cls, table: Path | str) -> "LabelRules":
        """The rules of the TOML file beside a table; none if there is no such file.

        Raises:
            LabelError: If there is one that cannot be read, or holds something else.
        """
        path = rules_path(table)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (FileNotFoundError, NotADirectoryError):
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise LabelError(f"cannot read {path}: {error}") from None
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise LabelError(f"{path} is no TOML: {error}") from None
        return cls().updated(values, source=str(path))

    def updated(self, values: Mapping[str, Any], *, source: str) -> "LabelRules":
        """These rules with some of them replaced.

        Args:
            values: By name; lists of text or numbers, or one text.
            source: Where they come from, for a message.

        Raises:
            LabelError: If there is no such rule, or a value is of another kind.
        """
        known = {field.name: field for field in fields(self)}
        if unknown := sorted(set(values) - set(known)):
            raise LabelError(
                f"{source} holds {unknown[0]!r}, which is no rule of a label table: those are "
                f"{', '.join(known)}"
            )
        changes: dict[str, Any] = {
            name: _rule(value, one="tuple" not in str(known[name].type), name=name, of=source)
            for name, value in values.items()
        }
        return replace(self, **changes)


def rules_path(table: Path | str) -> Path:
    """Where the rules of a table lie: beside it, with the ending `.toml`."""
    return Path(table).with_suffix(".toml")


def _rule(value: Any, *, one: bool, name: str, of: str) -> str | tuple[str, ...]:
    if one:
        if isinstance(value, str):
            return value
        raise LabelError(f"{of}: {name} must be one text, got {value!r}")
    listed = value if isinstance(value, list | tuple) else [value]
    # A word may be a number; TOML's true is none of the words of a table.
    if all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in listed):
        return tuple(str(item) for item in listed)
    raise LabelError(f'{of}: {name} must be a list such as ["a", "b"], got {value!r}')
