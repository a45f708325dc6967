"""Findings: from a taxonomy in YAML, to names with display name, category, parent and synonyms.

The packaged `findings.yaml` holds the 75 head CT findings in the six categories of Table 1 of the
paper. A taxonomy decides how a finding is shown and grouped, not which findings a head has: these
are the columns of the label table.
"""

import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctfm.store.errors import ConfigError

_PACKAGED = "findings.yaml"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One binary target."""

    name: str
    """snake_case, as in label tables."""
    display: str
    """For people."""
    category: str
    """Name of its category."""
    parent: str | None = None
    """A positive finding implies a positive parent."""
    synonyms: tuple[str, ...] = ()
    """Phrases of reports."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A taxonomy; iterating gives its findings in their fixed order."""

    entries: tuple[Finding, ...]
    categories: Mapping[str, str]
    """Display name of each category, in order."""

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all findings."""
        return tuple(finding.name for finding in self.entries)

    def get(self, name: str) -> Finding | None:
        """The finding of that name, None if the taxonomy has none."""
        return next((finding for finding in self.entries if finding.name == name), None)

    def display(self, name: str) -> str:
        """How a finding is shown; one that the taxonomy lacks by its own words."""
        finding = self.get(name)
        return finding.display if finding else _words(name)


def load_findings(path: Path | str | None = None) -> Findings:
    """Read a taxonomy.

    Args:
        path: A YAML file with a list `findings`, each with a `name` and optionally `display`,
            `category`, `parent` and `synonyms`, and optionally a list `categories`, each with
            `name` and `display`. None is the packaged one.

    Raises:
        ConfigError: If the file cannot be read or does not hold that.
    """
    if path is None:
        return _packaged()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read findings from {path}: {error}") from error
    return _parse(text, source=str(path))


@functools.cache
def _packaged() -> Findings:
    file = importlib.resources.files("ctfm.store") / _PACKAGED
    return _parse(file.read_text(encoding="utf-8"), source=_PACKAGED)


def _parse(text: str, *, source: str) -> Findings:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is no YAML: {error}") from error
    if not isinstance(content, Mapping) or not _is_list_of_mappings(content.get("findings")):
        raise ConfigError(f"{source} needs a list `findings`, each with a `name`")
    entries = tuple(_finding(item, source=source) for item in content["findings"])
    categories = _categories(content.get("categories"), entries=entries, source=source)
    _check(entries, categories=categories, source=source)
    return Findings(entries=entries, categories=categories)


def _finding(item: Mapping[str, Any], *, source: str) -> Finding:
    name, synonyms = item.get("name"), item.get("synonyms", [])
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"{source}: the name of a finding is snake_case, such as midline_shift, got {name!r}"
        )
    texts = {key: item.get(key) for key in ("display", "category", "parent")}
    if not all(value is None or isinstance(value, str) for value in texts.values()):
        raise ConfigError(f"{source}: display, category and parent of {name} must be text")
    if not isinstance(synonyms, list) or not all(isinstance(word, str) for word in synonyms):
        raise ConfigError(f"{source}: synonyms of {name} must be a list of text")
    return Finding(
        name=name,
        display=texts["display"] or _words(name),
        category=texts["category"] or "other",
        parent=texts["parent"],
        synonyms=tuple(synonyms),
    )


def _categories(listed: object, *, entries: tuple[Finding, ...], source: str) -> dict[str, str]:
    if listed is None:
        return {finding.category: _words(finding.category) for finding in entries}
    if not _is_list_of_mappings(listed):
        raise ConfigError(f"{source}: `categories` must be a list, each with a `name`")
    assert isinstance(listed, list)
    categories = {}
    for item in listed:
        name, count = str(item.get("name")), item.get("count")
        categories[name] = str(item.get("display") or _words(name))
        found = sum(finding.category == name for finding in entries)
        if count is not None and count != found:
            raise ConfigError(f"{source}: category {name} says {count} findings, and has {found}")
    return categories


def _check(entries: tuple[Finding, ...], *, categories: Mapping[str, str], source: str) -> None:
    parents = {finding.name: finding.parent for finding in entries}
    if len(parents) < len(entries):
        names = [finding.name for finding in entries]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{source}: finding {twice} is listed twice")
    for finding in entries:
        if finding.category not in categories:
            raise ConfigError(
                f"{source}: category {finding.category!r} of {finding.name} is not one of "
                f"{', '.join(categories)}"
            )
        seen, parent = {finding.name}, finding.parent
        while parent is not None:
            if parent not in parents:
                raise ConfigError(f"{source}: parent {parent!r} of {finding.name} is not a finding")
            if parent in seen:
                raise ConfigError(f"{source}: {finding.name} is its own ancestor")
            seen.add(parent)
            parent = parents[parent]


def _is_list_of_mappings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _words(name: str) -> str:
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]
