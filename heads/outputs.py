"""Outputs: heads and the scans of a cohort, to logits, attention and routing, in one pass.

Axes: n scans, r rows of them (slices, packed), b scans of a batch, k experts, c findings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from ctfm.heads.batches import Batch, Layout
from ctfm.heads.data import FitData
from ctfm.heads.head import Head, RowOutput
from ctfm.heads.learner import Learner, Validation
from ctfm.heads.metrics import auc_per_finding, average_precision_per_finding
from ctfm.heads.stack import HeadGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanOutputs:
    """What a head says of the scans of a cohort."""

    logits: Float32[np.ndarray, "n c"]

    attention: list[Float32[np.ndarray, " _"]]
    """Of each scan, one number a slice summing to 1, the mean over the groups of the pool; with
    several branches the slices of one follow those of the other, each summing to its share."""

    by_finding: list[dict[int, Float32[np.ndarray, " _"]]]
    """Of each scan, where the pool has a group a finding: the attention of the findings that it is
    known to have. Of all findings it would be larger than the embeddings' catalogue is worth."""

    gates: list[Float32[np.ndarray, "n k"]]
    """Of each branch, routing of each scan: the mean over its slices, weighted by attention."""

    entropy: list[Float32[np.ndarray, " n"]]
    """Of each branch, entropy of the routing of a slice in nats, averaged likewise."""


def outputs_of(
    data: FitData, heads: Sequence[Sequence[Head]], lines: Int64[np.ndarray, " n"]
) -> list[ScanOutputs]:
    """What each of some heads says of scans, all from one pass.

    Args:
        data: Where the scans are from.
        heads: Of each head its branches.
        lines: Indices of the scans, rising.
    """
    gathered = [
        _Gathered(per_finding=all(branch.pool.per_finding for branch in head)) for head in heads
    ]
    for chosen, batches, outputs in _passed(data, heads, lines):
        present = data.cohort.y[chosen] == 1
        for one, own in zip(gathered, outputs, strict=True):
            one.add(own, [batch.layout for batch in batches], present=present)
    return [one.joined() for one in gathered]


class _Gathered:
    """The outputs of one head, batch by batch.

    Args:
        per_finding: Whether its pool has a group of weights for each finding.
    """

    def __init__(self, *, per_finding: bool) -> None:
        self._per_finding = per_finding
        self._logits: list[Tensor] = []
        self._attention: list[Float32[np.ndarray, " _"]] = []
        self._by_finding: list[dict[int, Float32[np.ndarray, " _"]]] = []
        self._routing: list[list[Tensor]] = []

    def add(
        self,
        outputs: Sequence[RowOutput],
        layouts: Sequence[Layout],
        *,
        present: Bool[np.ndarray, "b c"],
    ) -> None:
        self._logits.append(torch.stack([one.logits for one in outputs]).sum(0).float().cpu())
        shares = [
            _per_scan(one.attention.float() / len(outputs), layout)
            for one, layout in zip(outputs, layouts, strict=True)
        ]
        for i, own in enumerate(zip(*shares, strict=True)):
            joined = np.concatenate(own)
            self._attention.append(joined.mean(1))
            has = np.flatnonzero(present[i]).tolist() if self._per_finding else []
            self._by_finding.append({c: joined[:, c] for c in has})
        self._routing.append(
            [_routing(one, layout).cpu() for one, layout in zip(outputs, layouts, strict=True)]
        )

    def joined(self) -> ScanOutputs:
        routing = [torch.cat(one).numpy() for one in zip(*self._routing, strict=True)]
        return ScanOutputs(
            logits=torch.cat(self._logits).numpy(),
            attention=self._attention,
            by_finding=self._by_finding,
            gates=[one[:, :-1] for one in routing],
            entropy=[one[:, -1] for one in routing],
        )


def attention_table(data: FitData, outputs: ScanOutputs) -> pa.Table:
    """One line a scan: position_mm and attention (lists, one number a slice).

    Where the pool weighs slices for each finding, `attention_<finding>` holds those weights for
    the scans that are known to have it, and null for the others.
    """
    cohort = data.cohort
    ids = cohort.scans["scan_id"].to_pylist()
    position_mm = [np.split(*_packed(branch.positions(ids), branch.rows_of(ids)))
                   for branch in data.branches]  # fmt: skip
    joined = [np.concatenate(own) for own in zip(*position_mm, strict=True)]
    columns = {
        "scan_id": cohort.scans["scan_id"],
        "split": cohort.scans["split"],
        "position_mm": _lists(joined),
        "attention": _lists(outputs.attention),
    }
    for c in sorted({c for own in outputs.by_finding for c in own}):
        columns[f"attention_{cohort.findings[c]}"] = _lists(
            [own.get(c) for own in outputs.by_finding]
        )
    return pa.table(columns)


def validate(data: FitData, learners: Sequence[Learner]) -> list[Validation]:
    """Loss, macro AUC and macro average precision of each head on the validation split."""
    heads = [learner.judged for learner in learners]
    logits = logits_of(data, heads, data.validation)
    y = data.cohort.y[data.validation]
    found = []
    for learner, own in zip(learners, logits, strict=True):
        on_device = torch.from_numpy(own).to(data.device)
        with torch.inference_mode():
            loss = float(learner.label_loss(on_device, data.y[data.validation]))
        auc = auc_per_finding(y, own)[data.selecting]
        precision = average_precision_per_finding(y, own)[data.selecting]
        found.append(
            Validation(loss=loss, macro_auc=float(auc.mean()), macro_ap=float(precision.mean()))
        )
    return found


def logits_of(
    data: FitData, heads: Sequence[Sequence[Head]], lines: Int64[np.ndarray, " n"]
) -> list[Float32[np.ndarray, "n c"]]:
    """Logits of scans from each of some heads, all from one pass; arguments as `outputs_of`."""
    logits = []
    for _, _, outputs in _passed(data, heads, lines):
        per_head = [torch.stack([one.logits for one in own]).sum(0) for own in outputs]
        logits.append(torch.stack(per_head).float().cpu())
    return list(torch.cat(logits, dim=1).numpy())


def head_groups(heads: Sequence[Sequence[Head]]) -> list[HeadGroup]:
    """Of each branch the heads that read it, side by side."""
    return [HeadGroup(branch) for branch in zip(*heads, strict=True)]


def group_outputs(
    groups: Sequence[HeadGroup],
    batches: Sequence[Batch],
    *,
    noise: Sequence[Sequence[Float32[Tensor, "_ _"] | None]],
) -> list[tuple[RowOutput, ...]]:
    """Of each head the outputs of its branches.

    Args:
        groups: Of each branch, as `head_groups` makes them.
        batches: Of each branch.
        noise: Of each head and branch, for noisy routing.
    """
    by_branch = [
        group(batch.x, batch.layout, noise=[own[branch] for own in noise])
        for branch, (group, batch) in enumerate(zip(groups, batches, strict=True))
    ]
    return list(zip(*by_branch, strict=True))


def _passed(
    data: FitData, heads: Sequence[Sequence[Head]], lines: Int64[np.ndarray, " n"]
) -> Iterator[tuple[Int64[np.ndarray, " b"], tuple[Batch, ...], list[tuple[RowOutput, ...]]]]:
    """Scans a batch at a time, and what each head makes of them."""
    groups = head_groups(heads)
    quiet = [[None] * len(groups)] * len(heads)
    for chosen, batches in data.in_order(lines):
        with torch.inference_mode():
            outputs = group_outputs(groups, batches, noise=quiet)
        yield chosen, batches, outputs


def _per_scan(rows: Float32[Tensor, "r g"], layout: Layout) -> list[Float32[np.ndarray, "_ g"]]:
    """The rows of each scan, without padding, in the order in which scans were asked for."""
    in_blocks: list[Float32[np.ndarray, "_ g"]] = []
    for part, mask in zip(layout.split(rows.cpu()), layout.masks(), strict=True):
        values = part.numpy()
        shown = None if mask is None else mask.cpu().numpy()
        in_blocks += [one if shown is None else one[shown[i]] for i, one in enumerate(values)]
    order = range(len(in_blocks)) if layout.order is None else layout.order.tolist()
    return [in_blocks[place] for place in order]


def _routing(output: RowOutput, layout: Layout) -> Float32[Tensor, "b k1"]:
    """Routing of each scan and, last, its entropy: means over slices weighted by attention."""
    gates = output.routed.gates.float()
    entropy = -torch.special.xlogy(gates, gates).sum(-1, keepdim=True)
    weights = output.attention.float().mean(-1, keepdim=True)
    weighted = weights * torch.cat([gates, entropy], -1)
    sums = torch.cat([part.sum(-2) for part in layout.split(weighted)])
    return layout.restore(sums)


def _packed(
    values: Float32[Tensor, " r"], counts: Int64[np.ndarray, " n"]
) -> tuple[Float32[np.ndarray, " r"], Int64[np.ndarray, " _"]]:
    return values.numpy(), np.cumsum(counts)[:-1]


def _lists(values: Sequence[Float32[np.ndarray, " _"] | None]) -> pa.Array:
    """A column of lists; None is null."""
    lengths = [0 if one is None else len(one) for one in values]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    present = [one for one in values if one is not None]
    flat = np.concatenate(present) if present else np.empty(0, np.float32)
    missing = pa.array([one is None for one in values])
    return pa.ListArray.from_arrays(offsets, pa.array(flat, pa.float32()), mask=missing)
