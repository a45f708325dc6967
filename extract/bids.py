"""BIDS: from the names of files and folders, to subjects, data sets, and files that are no scan.

Names as in BIDS 1.10: `sub-01_ses-2_ct.nii.gz`, entities and then a suffix. A data set is a folder
with `dataset_description.json`, together with what lies in `derivatives` in it or beside its
`rawdata`; where no folder has one, it is the path that was given to `ctfm index`. A description
whose DatasetType is "derivative" makes none: its subjects are those of the data set around it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set

from ctfm.extract.json_files import read_object
from ctfm.extract.sources import Opener, Source, folder_of
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_SUBJECT = re.compile(r"(?:^|::|[/_])(sub-[A-Za-z0-9]+)")
_NAME = re.compile(
    r"sub-[A-Za-z0-9]+(?P<entities>(?:_[a-z]+-[A-Za-z0-9+]+)*)_(?P<suffix>[A-Za-z0-9]+)"
)
_NO_SCANS = ("mask", "dseg", "probseg")
_OF_A_COPY = re.compile(r"_(?:desc|space|res|den)-[A-Za-z0-9+]+")
_CONTRAST = re.compile(r"_ce-(?!none(?:_|$))[A-Za-z0-9]+", re.IGNORECASE)
_STRIPPED = re.compile(r"_desc-brain(?=_)")
_PARTS_OF_A_SET = re.compile("derivatives|rawdata|sourcedata")


def subjects_of(name: str) -> list[str]:
    """The labels `sub-…` in a path, the nearest to the file last."""
    return _SUBJECT.findall(name)


def name_fault(stem: str, stems: Set[str]) -> ScanError | None:
    """Why a file is no scan, or is a processed copy of one, by its name; None if it may be one.

    Args:
        stem: Of the file.
        stems: Of all files of its subject.
    """
    match = _NAME.fullmatch(stem)
    if match is None:
        return None
    if match["suffix"] in _NO_SCANS:
        return ScanError(Reason.DERIVED, f"the BIDS suffix of its name is {match['suffix']}")
    if _CONTRAST.search(stem):
        return ScanError(Reason.CONTRAST, "its BIDS name names a contrast agent (ce-)")
    if _STRIPPED.search(stem):
        return ScanError(Reason.DERIVED, "its BIDS name says that it is a stripped brain")
    raw = _OF_A_COPY.sub("", stem)
    if raw != stem and raw in stems:
        return ScanError(Reason.DERIVED, "its BIDS name says that it was made from another file")
    return None


def described_folders(descriptions: Iterable[str]) -> frozenset[str]:
    """The folders of the descriptions that make a data set."""
    with Opener() as opener:
        return frozenset(_folder(file) for file in descriptions if not _is_derivative(opener, file))


def patients(sources: Sequence[Source], described: Set[str]) -> list[str]:
    """The subject of each file, after folders of its data set where another has one of its name.

    Args:
        sources: The files.
        described: `described_folders`.

    Returns:
        "" where no name tells it.
    """
    whose: list[tuple[str, tuple[str, ...]]] = []
    sets: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for source in sources:
        labels = subjects_of(source.relative())
        label, data_set = (labels[-1], _data_set(source, described)) if labels else ("", ())
        whose.append((label, data_set))
        sets[label].add(data_set)
    levels = {label: _levels_that_differ(own) for label, own in sets.items()}
    return ["/".join((*_tail(own, levels[label]), label)) for label, own in whose]


def possible_patients(source: Source) -> Iterator[str]:
    """Whatever `patients` may have called that of a file, whatever else was there."""
    folders = _parts(source.file)[:-1]
    labels = list(dict.fromkeys(reversed(subjects_of(source.file))))
    yield from labels
    for label in labels:
        for stop in range(1, len(folders) + 1):
            for start in range(stop):
                yield "/".join((*folders[start:stop], label))


def _is_derivative(opener: Opener, file: str) -> bool:
    said = read_object(opener, file)
    return said is not None and said.get("DatasetType") == "derivative"


def _data_set(source: Source, described: Set[str]) -> tuple[str, ...]:
    folder = _folder(source.file)
    within = _without(_parts(folder), _PARTS_OF_A_SET)
    while described and folder not in described and (above := _folder(folder)) != folder:
        folder = above
    if folder in described:
        base = _without(_parts(folder), _PARTS_OF_A_SET)
    else:
        # Where a folder of one subject was given, its data set is the folder above.
        base = _without(_parts(source.root), re.compile("sub-.+"))
    is_part = len(within) < len(_parts(_folder(source.file)))
    return within if is_part and len(within) > len(base) else base


def _without(parts: tuple[str, ...], inner: re.Pattern[str]) -> tuple[str, ...]:
    """Folders above the innermost that has such a name; all if none has."""
    at = max((i for i, part in enumerate(parts) if inner.fullmatch(part)), default=len(parts))
    return parts[:at]


def _folder(file: str) -> str:
    """What a file or folder, also of an archive, lies in; itself at the top."""
    return re.sub(r"(?:[/\\]|::)\Z", "", folder_of(file))


def _parts(file: str) -> tuple[str, ...]:
    return tuple(re.split(r"[/\\]|::", file))


def _levels_that_differ(paths: Set[tuple[str, ...]]) -> int:
    if len(paths) < 2:
        return 0
    levels = range(1, max(map(len, paths)) + 1)
    return next((n for n in levels if len({_tail(one, n) for one in paths}) == len(paths)), 1)


def _tail(path: tuple[str, ...], levels: int) -> tuple[str, ...]:
    return path[len(path) - levels :] if levels else ()
