"""Packing: the prepared scans of a shard, in full batches through the backbone, back to scans.

Slices of many scans share a batch; batches never span shards, so that the bytes of a shard depend
on its scans and on the batch size alone. Nothing here waits for the device: what comes back to
the host does so in `EmbeddedShard.results`, which the writer thread calls.

A sample is what one embedding is of: a slice, or the whole scan for a volume backbone.

Axes: s samples, m channels, d embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16
from torch import Tensor

from ctfm.extract.align import frame_doubt
from ctfm.extract.augment import Jitter
from ctfm.extract.backbone import Backbone, sample_positions
from ctfm.extract.config import ExtractConfig
from ctfm.extract.readers import Prepared
from ctfm.store.errors import BackboneError, ScanError
from ctfm.store.reasons import Reason
from ctfm.store.results import ScanResult

Tokens = Mapping[str, Float[Tensor, "_ _"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What will be kept of one view of a scan beside its embeddings."""

    scan_id: str
    view: int
    made: Float32[np.ndarray, "..."] | ScanError
    """Positions of its samples, or why it has none."""
    doubt: str = ""
    """Sentence on what is uncertain of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedShard:
    """The embeddings of a shard, still on the device, and which scan each belongs to."""

    outcomes: Sequence[Outcome]
    batches: Sequence[Tokens]

    def results(self) -> list[ScanResult]:
        """One result a scan and view, on the host; waits for the device."""
        rows = {
            token: torch.cat([batch[token] for batch in self.batches]).cpu().numpy()
            for token in (self.batches[0] if self.batches else {})
        }
        return list(self._split(rows))

    def _split(self, rows: Mapping[str, Float32[np.ndarray, "s _"]]) -> Iterator[ScanResult]:
        start = 0
        for outcome in self.outcomes:
            if isinstance(outcome.made, ScanError):
                yield _failure(outcome, outcome.made)
                continue
            stop = start + len(outcome.made)
            own = {token: values[start:stop] for token, values in rows.items()}
            start = stop
            if all(np.isfinite(values).all() for values in own.values()):
                yield ScanResult(
                    scan_id=outcome.scan_id,
                    view=outcome.view,
                    rows=own,
                    position_mm=outcome.made,
                    detail=outcome.doubt,
                )
            else:
                detail = "the backbone returned NaN or infinity"
                yield _failure(outcome, ScanError(Reason.NOT_FINITE_EMBEDDING, detail))


class Embedder:
    """Takes the prepared scans of one shard after another, and embeds them batch by batch."""

    def __init__(self, backbone: Backbone, config: ExtractConfig, *, batch_size: int) -> None:
        self.batch_size = batch_size
        """Samples a forward pass; halved for good whenever the device runs out of memory."""
        self._backbone = backbone
        self._config = config
        self._start_shard()

    def add(self, scan_id: str, prepared: Prepared) -> None:
        """Take the views of a scan, or why it has none, and run every batch that is now full."""
        for view in range(self._config.views):
            if isinstance(prepared, ScanError):
                self._outcomes.append(Outcome(scan_id=scan_id, view=view, made=prepared))
                continue
            scan = prepared[view]
            self._take(torch.from_numpy(scan.hu), scan.jitter)
            positions = sample_positions(self._backbone.entry, scan.position_mm)
            doubt = frame_doubt(scan.quality)
            self._outcomes.append(Outcome(scan_id=scan_id, view=view, made=positions, doubt=doubt))
        self._run_full_batches()

    def add_blank(self, scan_id: str, *, rows: Sequence[int]) -> None:
        """Take samples of nothing in place of a scan, so that those after it share their batches.

        Args:
            scan_id: Of the scan.
            rows: Samples of each of its views.
        """
        size_px = self._config.size_px
        for view, n_rows in enumerate(rows):
            hu = torch.zeros((n_rows, size_px, size_px), dtype=torch.int16)
            if n_rows:
                self._take(hu)
            blank = np.zeros(n_rows, np.float32)
            self._outcomes.append(Outcome(scan_id=scan_id, view=view, made=blank))
        self._run_full_batches()

    def finish_shard(self) -> EmbeddedShard:
        """Run what is left, and begin the next shard."""
        for samples in self._together() if self._waiting else ():
            self._run(samples)
        shard = EmbeddedShard(outcomes=self._outcomes, batches=self._done)
        self._start_shard()
        return shard

    def _start_shard(self) -> None:
        self._outcomes: list[Outcome] = []
        self._waiting: list[Float[Tensor, "s m *size"]] = []
        self._done: list[Tokens] = []

    def _take(self, hu: Int16[Tensor, "z y x"], jitter: Jitter | None = None) -> None:
        channels = self._channels(hu, jitter)
        if channels is None:
            self._make_room()
            channels = self._channels(hu, jitter)
        if channels is None:
            raise BackboneError(
                f"one scan does not fit into the memory of the device beside "
                f"{self._backbone.name}: use a larger device"
            )
        self._waiting.append(channels)

    def _channels(
        self, hu: Int16[Tensor, "z y x"], jitter: Jitter | None
    ) -> Float[Tensor, "s m *size"] | None:
        """The channels of a scan; None if they do not fit into the memory of the device."""
        try:
            return self._backbone.channels(hu, self._config.windows_hu, jitter)
        except torch.OutOfMemoryError:
            return None

    def _together(self) -> list[Float[Tensor, "s m *size"]]:
        """What waits as one tensor; as it is where that does not fit."""
        try:
            return [torch.cat(self._waiting)]
        except torch.OutOfMemoryError:
            return self._waiting

    def _make_room(self) -> None:
        """Run what waits, whatever its number, and let less wait from now on."""
        waiting, self._waiting = self._waiting, []
        torch.cuda.empty_cache()
        for samples in waiting:
            self._run(samples)
        self.batch_size = max(1, self.batch_size // 2)

    def _run_full_batches(self) -> None:
        if (n_waiting := sum(map(len, self._waiting))) >= self.batch_size:
            self._waiting = self._together()
            if len(self._waiting) > 1:
                self._make_room()
                return
            (samples,) = self._waiting
            full = n_waiting // self.batch_size * self.batch_size
            self._run(samples[:full])
            self._waiting = [samples[full:]]

    def _run(self, samples: Float[Tensor, "s m *size"]) -> None:
        while len(samples):
            batch = samples[: self.batch_size]
            if (tokens := self._forward(batch)) is None:
                # Not in the handler: the traceback keeps the tensors of the failed pass alive.
                torch.cuda.empty_cache()
                self.batch_size = len(batch) // 2
            else:
                self._done.append(tokens)
                samples = samples[len(batch) :]

    def _forward(self, batch: Float[Tensor, "s m *size"]) -> Tokens | None:
        """The tokens of a batch; None if it does not fit into the memory of the device."""
        try:
            tokens = self._backbone.embed(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise BackboneError(
                    f"{self._backbone.name} does not fit into the memory of the device, even with "
                    f"one {self._backbone.entry.unit} at a time: use a larger device, bfloat16, or "
                    "another backbone"
                ) from error
            return None
        return {name: tokens[name] for name in self._config.tokens}


def _failure(outcome: Outcome, error: ScanError) -> ScanResult:
    return ScanResult(
        scan_id=outcome.scan_id,
        view=outcome.view,
        rows=None,
        reason=error.reason,
        detail=error.detail,
    )
