"""The feature store: embeddings of every slice of every scan, in one folder of standard files.

    embeddings.zarr/   a plain Zarr v3 group: <token> (rows, d), position_mm (rows,)
    scans.parquet      one line a scan and view: ids, row_start, n_rows, status, reason, sha256
    plan/              which rows each scan gets; one part each time that scans are added
    commits/           one record a finished shard, written last
    adapter.json       only of a backbone with a LoRA adapter: what it was trained on
    ids.json           fingerprints of the keys that made the ids
    weights.json       only of weights from a hub, or of a part of a checkpoint: where from

A shard counts when its commit record exists, so extraction can be killed anywhere: what is not
committed is done again, to the same bytes. A failed scan is a line with a reason, never a row. The
store knows no backbone and no label, and of patients nothing but pseudonymous ids.

Axes: r rows (slices of many scans, packed), b scans, d embedding.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Shaped

from ctfm.store.commits import (
    add_commit,
    commit_name,
    committed,
    drop_commits,
    read_commits,
    sealed_json,
    unsealed_json,
)
from ctfm.store.embeddings import (
    decode,
    read_packed,
    write_chunks,
)
from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.growth import add_metadata, begin, claim_ids, extend
from ctfm.store.layout import (
    GROUP,
    POSITION,
    StoredDtype,
    StoreHeader,
    grow,
    metadata_name,
    read_header,
)
from ctfm.store.places import Place, Url, place_of
from ctfm.store.plan import (
    ScanToStore,
    Shard,
    planned_rows,
    shard_of_lines,
    shard_scans_for,
    shard_slices,
)
from ctfm.store.provenance import canonical_json
from ctfm.store.reasons import Reason
from ctfm.store.results import ScanResult, laid_out
from ctfm.store.shard_check import rows_sha256
from ctfm.store.tables import (
    SCANS,
    StoreTable,
    current_scans,
    is_begun,
    merged,
    part_name,
    publish_scans,
    read_part,
    read_plan,
    with_results,
)
from ctfm.store.verify import ADAPTER, IDS, WEIGHTS, VerifyReport, verify_store

if TYPE_CHECKING:
    import torch


class FeatureStore:
    """One feature store. `create` makes or extends one, `open` reads one.

    It holds no open file and can be sent to another process. Any number of processes may extend
    and write one store at once, also the same shards; `scans` shows what others committed after
    `finish` or a new `open`.
    """

    def __init__(self, place: Place, header: StoreHeader) -> None:
        self._place = place
        self._header = header

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        settings: Mapping[str, Any],
        tokens: Mapping[str, int],
        dtype: StoredDtype,
        scans: Sequence[ScanToStore],
        shard_scans: int | None = None,
        compress: bool = False,
        ids: str | None = None,
    ) -> "FeatureStore":
        """Make a store with its plan, or add scans to one with the same settings.

        Args:
            path: Folder of the store; the folders above it are made.
            settings: Everything that decides what a row means, as JSON values.
            tokens: Width d of each token.
            dtype: Type in which embeddings are kept.
            scans: What is to be stored. What the plan has already keeps its rows.
            shard_scans: Scans of a (new) shard; None is a sixteenth of `scans`, from 4 to 64.
            compress: Zstandard, for a new store: about 10% smaller at half the speed.
            ids: `Pseudonyms.fingerprint` of the ids of the scans; None is not compared.

        Raises:
            StoreError: If the store has other settings (each is named with both values), a scan
                is in it under another study or patient, its ids were made with other keys, or it
                cannot be written.
        """
        place = place_of(path)
        if shard_scans is None:
            shard_scans = shard_scans_for(len(scans))
        header = _header(settings, tokens, dtype)
        if not place.has(part_name(0)):
            begin(place, header, scans=scans, shard_scans=shard_scans, compress=compress, ids=ids)
        plan = read_plan(place)
        _refuse_other(place, plan.layout.header, header)
        if not place.has(metadata_name()):
            add_metadata(place, plan)
        claim_ids(place, ids)
        store = cls(place, header)
        store._catch_up(extend(place, plan, scans, shard_scans=shard_scans))
        return store

    @classmethod
    def open(cls, path: Path | str) -> "FeatureStore":
        """Open a store that exists.

        Raises:
            StoreError: If there is none, it is damaged, or a newer ctfm wrote it.
        """
        place = place_of(path)
        if place.has(metadata_name()):
            return cls(place, read_header(place))
        if is_begun(place):
            return cls(place, read_part(place, 0).layout.header)
        raise StoreError(
            f"{place.path} is not a feature store (it has no {GROUP}): `ctfm extract` makes one"
        )

    @staticmethod
    def exists(path: Path | str) -> bool:
        """Whether there is a store, whole or in the making: from the first part of its plan on."""
        place = place_of(path)
        return place.has(metadata_name()) or is_begun(place)

    def refuse_other(
        self, *, settings: Mapping[str, Any], tokens: Mapping[str, int], dtype: StoredDtype
    ) -> None:
        """Refuse what `create` would refuse to add to.

        Raises:
            StoreError: Naming each setting that differs, with both values.
        """
        _refuse_other(self._place, self._header, _header(settings, tokens, dtype))

    def differences(self, other: "FeatureStore") -> list[str]:
        """One phrase a setting in which another store differs; none if rows of both can mix."""
        return self._header.differences(other._header)

    @property
    def path(self) -> Path | Url:
        """Where it is: a folder, or a URL."""
        return self._place.path

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides what a row means."""
        return self._header.fingerprint

    @property
    def settings(self) -> dict[str, Any]:
        """What `create` was given."""
        return dict(self._header.settings)

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What `record_adapter` was given, or None."""
        return self._recorded(ADAPTER)

    @property
    def weights(self) -> dict[str, Any] | None:
        """What `record_weights` was given, or None."""
        return self._recorded(WEIGHTS)

    @property
    def ids(self) -> tuple[str, ...]:
        """`Pseudonyms.fingerprint` of what made the ids; several in a merged store."""
        record = self._recorded(IDS)
        return () if record is None else tuple(record["keys"])

    def record_ids(self, keys: Collection[str]) -> None:
        """Write down what made the ids of the scans.

        Args:
            keys: `Pseudonyms.fingerprint` of each.
        """
        self._place.publish(IDS, sealed_json({"keys": sorted(keys)}))

    def record_adapter(
        self, *, max_relative_error: float, scan_ids: Collection[str], patient_ids: Collection[str]
    ) -> None:
        """Write down what is known of the LoRA adapter that the backbone was merged with.

        Its digest is in the settings. Here is what does not decide a row. What was known before of
        its training stays: a folder that no longer tells does not make a test split clean.

        Args:
            max_relative_error: Of merged against unmerged tokens.
            scan_ids: Scans it was trained on.
            patient_ids: Patients it was trained on.
        """
        before: dict[str, Any] = {}
        with contextlib.suppress(StoreError):  # damaged: it is written anew
            before = self.adapter or {}
        record = {
            "max_relative_error": max_relative_error,
            "scan_ids": sorted({*scan_ids, *before.get("scan_ids", ())}),
            "patient_ids": sorted({*patient_ids, *before.get("patient_ids", ())}),
        }
        self._place.publish(ADAPTER, sealed_json(record))

    def record_weights(
        self, *, hub_id: str | None, commit: str | None, remarks: Sequence[str] = ()
    ) -> None:
        """Write down where the weights are from.

        Their digest is in the settings and decides; the same weights may lie in many places.

        Args:
            hub_id: Repository; None if they are not from a hub.
            commit: Of it.
            remarks: What of the checkpoint was cut off, left out or chosen.
        """
        record: dict[str, Any] = {"hub_id": hub_id, "commit": commit}
        if remarks:
            record["remarks"] = [*remarks]
        self._place.publish(WEIGHTS, sealed_json(record))

    def _recorded(self, name: str) -> dict[str, Any] | None:
        if not self._place.has(name):
            return None
        record = unsealed_json(self._place.read(name))
        if record is None:
            raise StoreError(
                f"{self.path}/{name} is damaged: `ctfm extract` with the options of before writes "
                "it anew"
            )
        return record

    @property
    def tokens(self) -> dict[str, int]:
        """Width d of each token."""
        return dict(self._header.tokens)

    @property
    def dtype(self) -> StoredDtype:
        """Type of the embeddings: float16, bfloat16 or float32."""
        return self._header.dtype

    @cached_property
    def scans(self) -> pa.Table:
        """One line a scan and view, in order of rows: `STORE_SCHEMA`, commit records merged in.

        Raises:
            StoreError: If `scans.parquet` or a commit record is damaged.
        """
        return self._table.lines

    @cached_property
    def _table(self) -> StoreTable:
        return current_scans(self._place)

    def finished_scans(self) -> pa.Table:
        """The lines of `scans` that have rows.

        Raises:
            StoreError: If any is still pending.
        """
        status = self.scans["status"]
        pending = pc.sum(pc.equal(status, "pending")).as_py() or 0
        if pending:
            raise StoreError(
                f"{pending} of {len(status)} scans of {self.path} are still pending: run "
                "`ctfm extract` again, which continues where it was stopped"
            )
        return self.scans.filter(pc.equal(status, "ok"))

    def pending_shards(self) -> tuple[Shard, ...]:
        """Shards without a commit record, whoever works on them now."""
        done = committed(self._place)
        return tuple(shard for shard in self.shards() if shard.index not in done)

    def shards(self) -> tuple[Shard, ...]:
        """All shards, in order of rows."""
        return tuple(
            shard_of_lines(self.scans[own], chunk_rows=self._chunk_rows)
            for own in shard_slices(self.scans).values()
        )

    def write_shard(self, shard: Shard, results: Sequence[ScanResult]) -> None:
        """Write the rows of a shard and commit it; killed before the end, it stays pending.

        A scan whose embeddings are too large for the store's type becomes a failed one.
        Committing the same results again changes nothing. Where another process commits the shard
        with other results while this one writes, its record stands if the rows are its rows; if
        they are of both, the shard is pending again.

        Args:
            shard: One of `pending_shards`.
            results: One for each scan and view of the shard, in any order.

        Raises:
            StoreError: If results are missing, do not fit the plan or hold NaN or infinity, if the
                shard is committed with other results, or the disk refuses.
        """
        blocks, columns = laid_out(shard, results, header=self._header)
        written = not self._place.has(commit_name(shard.index))
        if written:
            self._write(shard, blocks)
            added = add_commit(self._place, shard.index, columns)
            self._forget()
            if added:
                return
        record = read_commits(self._place, [shard.index]).get(shard.index)
        if record is None:  # taken back by another process meanwhile
            return self.write_shard(shard, results)
        if record == columns:
            return
        mixed = written and self._take_back_if_mixed(shard)
        raise StoreError(
            f"shard {shard.name} of {self.path} is committed with other results: the same scans "
            "gave other numbers in another process (another device or batch size rounds "
            f"otherwise). {'Rows of both were mixed, so it is pending again. ' if mixed else ''}"
            "Run one extraction at a time, or give all the same --device and --batch-size"
        )

    def _take_back_if_mixed(self, shard: Shard) -> bool:
        """Take back a shard whose record is another process's, unless so are its rows."""
        lines = self.scans.filter(pc.equal(self.scans["shard"], shard.index))
        try:
            self.checked_rows(lines.filter(pc.equal(lines["status"], "ok")))
        except PlaceError:
            raise
        except StoreError:
            self.take_back(shard.scan_ids())
            return True
        return False

    def write_again(self, shard: Shard, results: Sequence[ScanResult]) -> bool:
        """Write the rows of a committed shard anew, with those of some scans from elsewhere.

        Args:
            shard: One that has a commit record.
            results: Of the scans whose rows are damaged; those of the others are read.

        Returns:
            Whether all rows are those that were committed; if not, nothing is written.

        Raises:
            StoreError: If the rows of another scan are damaged, too, or the disk refuses.
        """
        given = {(result.scan_id, result.view): result for result in results}
        table = self.scans.filter(pc.equal(self.scans["shard"], shard.index))
        keys = list(zip(table["scan_id"].to_pylist(), table["view"].to_pylist(), strict=True))
        others = self.results(table.filter(pa.array([key not in given for key in keys])))
        again = [
            replace(given[key], source=source)
            for key, source in zip(keys, table["source"].to_pylist(), strict=True)
            if key in given
        ]
        blocks, columns = laid_out(shard, [*again, *others], header=self._header)
        if read_commits(self._place, [shard.index]).get(shard.index) != columns:
            return False
        self._write(shard, blocks)
        return True

    def finish(self) -> None:
        """Write `scans.parquet` anew from the plan and every commit record.

        To be called when shards were committed; again, or with shards pending, it does no harm.
        Of several processes that finish at once, the last one to write has what all committed.

        Raises:
            StoreError: If a commit record is damaged or belongs to another plan.
        """
        before = None
        while before != (table := merged(self._place, read_plan(self._place))):
            self._grow(table)
            publish_scans(self._place, table)
            before = table
        self._forget()

    def take_back(self, scan_ids: Collection[str]) -> int:
        """Take back the shards of some scans, so that the next extraction does them again.

        Args:
            scan_ids: Such as `VerifyReport.damaged_scans`; those that are not in the store do not
                matter.

        Returns:
            How many shards are pending now that were not before.
        """
        self._forget()
        asked = pa.array(list(scan_ids), pa.string())
        lines = self.scans.filter(pc.is_in(self.scans["scan_id"], value_set=asked))
        shards = set(lines.filter(pc.not_equal(lines["status"], "pending"))["shard"].to_pylist())
        if shards:
            # In this order: a kill in between leaves records that are merged in again.
            lines = with_results(self.scans, dict.fromkeys(shards))
            publish_scans(self._place, replace(self._table, lines=lines))
            drop_commits(self._place, shards)
        self._forget()
        return len(shards)

    def load(
        self,
        scan_ids: Sequence[str] | None = None,
        token: str = "cls",
        *,
        view: int = 0,
        device: "torch.device | str | None" = None,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read the embeddings of many scans at once.

        Args:
            scan_ids: Which, and in which order; None is every scan with status ok, in table order.
            token: Which embedding.
            view: Which view of each.
            device: Where the rows go; None is the CPU.

        Returns:
            rows (r, d) in the type of the store, and offsets (b + 1,) int64 on the CPU: scan i has
            `rows[offsets[i] : offsets[i + 1]]`.

        Raises:
            StoreError: If a scan has no embeddings, the store is unfinished and `scan_ids` is
                None, the token is not stored, or a chunk is damaged.
        """
        import torch

        if token not in self._header.tokens:
            raise StoreError(
                f"{self.path} has no token {token!r}: it holds {', '.join(self._header.tokens)}. "
                "Choose one of these, or extract again with the tokens that you need"
            )
        packed, offsets = self._read(scan_ids, token, view=view)
        rows = torch.from_numpy(packed)
        if self.dtype == "bfloat16":
            rows = rows.view(torch.bfloat16)
        return (rows if device is None else rows.to(device)), torch.from_numpy(offsets)

    def positions(
        self, scan_ids: Sequence[str] | None = None, *, view: int = 0
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Slice positions in mm along z (r,), packed like `load` packs the embeddings."""
        import torch

        packed, offsets = self._read(scan_ids, POSITION, view=view)
        return torch.from_numpy(packed), torch.from_numpy(offsets)

    def results(self, lines: pa.Table) -> list[ScanResult]:
        """What extraction made of some scans, as it is stored, compared with its digests.

        Args:
            lines: Of `scans`, none of them pending.

        Raises:
            StoreError: If a scan's rows are not those that were committed.
        """
        ok = lines.filter(pc.equal(lines["status"], "ok"))
        failed = lines.filter(pc.equal(lines["status"], "failed")).to_pylist()
        found = [
            ScanResult(
                scan_id=line["scan_id"],
                view=line["view"],
                reason=Reason(line["reason"]),
                detail=line["detail"],
                source=line["source"],
            )
            for line in failed
        ]
        columns = ok.select(["scan_id", "view", "detail", "source"]).to_pylist()
        for line, kept in zip(columns, self.checked_rows(ok), strict=True):
            position_mm = kept.pop(POSITION)
            rows = {name: decode(block, dtype=self.dtype) for name, block in kept.items()}
            found.append(ScanResult(**line, rows=rows, position_mm=position_mm))
        return found

    def checked_rows(self, lines: pa.Table) -> "list[dict[str, Shaped[np.ndarray, 'r ...']]]":
        """Read the rows of some scans as they are kept, and compare each with its digest.

        Args:
            lines: Of `scans`, with status ok.

        Returns:
            Of each scan every array by name, tokens and positions.

        Raises:
            StoreError: If a scan's rows are not those that were committed.
        """
        edges = np.cumsum(_counts(lines))[:-1]
        arrays = {
            name: np.split(self._packed(name, lines), edges) for name in [*self.tokens, POSITION]
        }
        found = [{name: rows[i] for name, rows in arrays.items()} for i in range(lines.num_rows)]
        for scan_id, sha256, kept in zip(
            lines["scan_id"].to_pylist(), lines["sha256"].to_pylist(), found, strict=True
        ):
            if rows_sha256(kept) != sha256:
                raise StoreError(
                    f"the rows of scan {scan_id!r} in {self.path} are not those that were "
                    "committed: `ctfm store verify --repair` takes them back"
                )
        return found

    def verify(self) -> VerifyReport:
        """Read everything again and compare it with what was committed."""
        return verify_store(self._place)

    def info(self) -> dict[str, Any]:
        """The store in a few figures: rows, bytes on disk, scans by status, failures by reason."""
        table = self.scans
        failed = table.filter(pc.equal(table["status"], "failed"))
        return {
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "shards": len(shard_slices(table)),
            "rows": pc.sum(table["n_rows"]).as_py() or 0,
            "bytes": sum(n_bytes for _, n_bytes in self._place.files()),
            "scans": dict(Counter(table["status"].to_pylist())),
            "failures": dict(Counter(failed["reason"].to_pylist()).most_common()),
        }

    @property
    def _chunk_rows(self) -> int:
        return self._table.layout.chunk_rows

    def _forget(self) -> None:
        self.__dict__.pop("scans", None)
        self.__dict__.pop("_table", None)

    def _catch_up(self, plan: StoreTable) -> None:
        """Bring the arrays and `scans.parquet` up to the plan and the records."""
        self._grow(plan)
        has_table = self._place.has(SCANS)
        publish_scans(
            self._place, current_scans(self._place) if has_table else merged(self._place, plan)
        )
        self._forget()

    def _grow(self, table: StoreTable) -> None:
        n_rows = planned_rows(table.lines, chunk_rows=table.layout.chunk_rows)
        grow(self._place, names=table.layout.arrays, n_rows=n_rows)

    def _write(self, shard: Shard, blocks: Mapping[str, Shaped[np.ndarray, "r ..."]]) -> None:
        grow(self._place, names=list(blocks), n_rows=shard.row_start + shard.n_rows)
        with self._place.writing():
            for name, block in blocks.items():
                write_chunks(self._place, name, block, start=shard.row_start)

    def _read(
        self, scan_ids: Sequence[str] | None, name: str, *, view: int
    ) -> tuple[Shaped[np.ndarray, "r ..."], Int64[np.ndarray, " b1"]]:
        lines = self._lines(scan_ids, view=view)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(_counts(lines))])
        return self._packed(name, lines), offsets

    def _packed(self, name: str, lines: pa.Table) -> Shaped[np.ndarray, "r ..."]:
        return read_packed(self._place, name, lines["row_start"].to_numpy(), counts=_counts(lines))

    def _lines(self, scan_ids: Sequence[str] | None, *, view: int) -> pa.Table:
        """Lines of the scans asked for, each of them ok, in the order asked for."""
        table = self.scans if scan_ids is not None else self.finished_scans()
        table = table.filter(pc.equal(table["view"], view))
        if scan_ids is None:
            return table
        asked = pa.array(scan_ids, type=pa.string())
        index = pc.index_in(asked, value_set=table["scan_id"])
        status = pc.fill_null(table["status"].take(index), "not in the store")
        bad = np.flatnonzero(pc.not_equal(status, "ok").to_numpy(zero_copy_only=False))
        if len(bad):
            raise StoreError(
                f"{len(bad)} of {len(asked)} scans asked for have no embeddings (view {view}) in "
                f"{self.path}, e.g. {asked[bad[0]].as_py()!r} ({status[int(bad[0])].as_py()}): ask "
                "for scans with status ok"
            )
        return table.take(index)


def _header(
    settings: Mapping[str, Any], tokens: Mapping[str, int], dtype: StoredDtype
) -> StoreHeader:
    plain = json.loads(canonical_json(settings))  # as it will be read: tuples are lists
    return StoreHeader(settings=plain, tokens=dict(tokens), dtype=dtype)


def _refuse_other(place: Place, stored: StoreHeader, wanted: StoreHeader) -> None:
    if differences := stored.differences(wanted):
        raise StoreError(
            f"{place.path} was made with other settings, and rows of two settings do not mix: "
            f"{'; '.join(differences)}. Extract to a new store, or with the store's settings"
        )


def _counts(lines: pa.Table) -> Int64[np.ndarray, " b"]:
    counts: Int64[np.ndarray, " b"] = lines["n_rows"].to_numpy().astype(np.int64)
    return counts
