"""Outcome: from a store after an extraction, to what its user has to know of the scans."""

from typing import TYPE_CHECKING

from ctfm.cli.console import err, print_table

if TYPE_CHECKING:
    from ctfm.extract.options import Options
    from ctfm.store.catalogue import Catalogue
    from ctfm.store.features import FeatureStore


def print_outcome(store: "FeatureStore", catalogue: "Catalogue", options: "Options") -> bool:
    """Print what failed, was left or is out of date; True if every scan is as it should be."""
    lacking = [
        print_failures(store),
        _print_scans_of_others(store, catalogue),
        _print_stale_scans(store, catalogue, options),
    ]
    _print_unused_scans(store, catalogue)
    _print_doubts(store)
    return not any(lacking)


def print_failures(store: "FeatureStore") -> int:
    """Print what failed and why, by reason with an example; the number of failed scans."""
    lines = store.scans.select(["scan_id", "status", "reason", "detail"]).to_pylist()
    by_reason: dict[str, dict[str, str]] = {}
    for line in lines:
        if line["status"] == "failed":
            by_reason.setdefault(line["reason"], {})[line["scan_id"]] = line["detail"]
    if by_reason:
        rows = [
            [reason, len(failed), *next(iter(failed.items()))]
            for reason, failed in sorted(by_reason.items())
        ]
        print_table("failed", ["reason", "scans", "for example", "why"], rows)
    return sum(map(len, by_reason.values()))


def _print_doubts(store: "FeatureStore") -> None:
    """Print how many scans have rows that there is something to know of, with an example."""
    lines = store.scans.select(["scan_id", "status", "detail"]).to_pylist()
    doubts = {
        line["scan_id"]: line["detail"]
        for line in lines
        if line["status"] == "ok" and line["detail"]
    }
    if doubts:
        scan_id, detail = next(iter(doubts.items()))
        err.print(
            f"{store.path}: {len(doubts)} scans have rows that may be misplaced (e.g. {scan_id}: "
            f"{detail}). The column `detail` of scans.parquet names them"
        )


def _print_scans_of_others(store: "FeatureStore", catalogue: "Catalogue") -> int:
    """Print what is left to other extractions; how many of these scans the catalogue lists."""
    from ctfm.extract.remaining import scans_of_others

    left = scans_of_others(store, catalogue)
    stuck = len(set(left) & set(catalogue.scans["scan_id"].to_pylist()))
    if left:
        err.print(
            f"{store.path}: {len(left)} scans are pending in shards with scans that this "
            f"catalogue does not list ({stuck} of the {len(left)} it does). They are left to the "
            "extraction that planned them; if the others are gone for good, "
            "--write-off-unlisted records those as vanished and does the rest"
        )
    return stuck


def _print_stale_scans(store: "FeatureStore", catalogue: "Catalogue", options: "Options") -> int:
    """Print which scans have other files by now and could not be done again; their number."""
    from ctfm.extract.remaining import stale_scans

    left = stale_scans(store, catalogue, options)
    if left:
        err.print(
            f"{store.path}: {len(left)} scans (e.g. {left[0]}) have other files now than those "
            "that their rows were made from. They are as they were, because they or others of "
            "their shards cannot be read, or are not in this catalogue: bring those back, and run "
            "it again"
        )
    return len(left)


def _print_unused_scans(store: "FeatureStore", catalogue: "Catalogue") -> None:
    """Print which scans of a store the catalogue does not use."""
    from ctfm.extract.remaining import unused_scans

    if unused := unused_scans(store, catalogue):
        err.print(
            f"{store.path}: {len(unused)} scans (e.g. {unused[0]}) are not used by this catalogue: "
            "they are from another one, or a better series of their study has arrived since. Heads "
            "are fitted on them as well; extract to a new store to leave them out"
        )
