"""Prediction for one scan: logits, attention, and the slices behind each finding."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.testing import assert_close

from ctfm.heads.branches import build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.pooling import POOLS
from ctfm.heads.predict import predict
from ctfm.heads.runs import Run, RunWriter, StoreRecord
from ctfm.store.errors import RunError

S, D, FINDINGS = 6, 4, ("mass", "air", "atrophy")
POSITION_MM = -4.0 * np.arange(S) - 2


@pytest.fixture(scope="module", params=POOLS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose head has random parameters everywhere, and `air` hanging on the last number."""
    config = FitConfig(experts=3, rank=2, router_hidden=5, pool=request.param, expert_bias=True)
    (head,) = build_branches(config, dims=[D], findings=len(FINDINGS))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        head.classifier.weight[1] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    path = tmp_path_factory.mktemp("runs") / request.param
    writer = RunWriter(path)
    writer.start()
    record = StoreRecord(fingerprint="f", settings={"backbone": "x"})
    writer.write_config(config, dims=[D], findings=FINDINGS, stores=[record])
    empty = pa.table({"scan_id": pa.array([], pa.string())})
    writer.write_epochs([], checkpoint=b"")
    counts = {"positives": {"train": 0}, "negatives": {"train": 9}, "taught": False}
    summary = {"findings": {"atrophy": counts}}
    writer.finish(head.state_dict(), predictions=empty, attention=empty, summary=summary)
    return Run.open(path)


def embeddings() -> torch.Tensor:
    rows = 0.1 * torch.randn(S, D, generator=torch.Generator().manual_seed(6))
    rows[4, 3] += 3
    return rows


def test_gives_the_logits_of_the_head(run: Run) -> None:
    found = predict(run, embeddings(), POSITION_MM)
    expected = run.head()(embeddings().unsqueeze(0), torch.ones(1, S, dtype=torch.bool))[0]
    assert_close(torch.from_numpy(found.logits), expected.detach())
    assert found.findings == FINDINGS
    assert found.probabilities.tolist() == pytest.approx(
        [1 / (1 + math.exp(-z)) for z in found.logits.tolist()]
    )
    assert found.attention.sum() == pytest.approx(1)


def test_contributions_and_bias_add_up_to_the_logits(run: Run) -> None:
    found = predict(run, embeddings(), POSITION_MM)
    assert found.contributions.shape == (S, len(FINDINGS))
    bias = run.head().classifier.bias.detach().numpy()
    np.testing.assert_allclose(found.contributions.sum(0) + bias, found.logits, atol=1e-5)


def test_top_slices_are_those_that_add_most_to_their_finding(run: Run) -> None:
    found = predict(run, embeddings(), POSITION_MM)
    top = found.top_slices("air", count=2)
    assert len(top) == 2
    assert (top[0].slice_index, top[0].position_mm) == (4, -18.0)
    assert top[0].contribution == pytest.approx(found.contributions[:, 1].max())
    assert top[0].contribution >= top[1].contribution
    assert top[0].attention == pytest.approx(found.attention[4])
    assert len(found.top_slices("air", count=99)) == S


def test_speaks_json(run: Run) -> None:
    found = predict(run, embeddings(), POSITION_MM)
    values = json.loads(json.dumps(found.to_json(count=2)))
    assert [finding["name"] for finding in values["findings"]] == list(FINDINGS)
    assert values["findings"][1]["top_slices"][0]["slice_index"] == 4
    assert len(values["findings"][1]["top_slices"]) == 2
    assert values["attention"] == pytest.approx(found.attention.tolist())


def test_a_finding_that_train_never_taught_is_marked(run: Run) -> None:
    found = predict(run, embeddings(), POSITION_MM)
    assert found.untaught == {"atrophy": "no positive in train"}
    statuses = [finding["status"] for finding in found.to_json()["findings"]]
    assert statuses == ["ok", "ok", "not taught: no positive in train"]


def test_takes_rows_in_the_type_of_any_store(run: Run) -> None:
    exact = predict(run, embeddings(), POSITION_MM)
    for dtype, far in ((torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        near = predict(run, embeddings().to(dtype), POSITION_MM)
        np.testing.assert_allclose(near.logits, exact.logits, atol=far)


def test_refuses_what_the_head_cannot_take(run: Run) -> None:
    with pytest.raises(RunError, match=r"takes slices of 4 numbers, .*got \(6, 3\)"):
        predict(run, embeddings()[:, :3], POSITION_MM)
    with pytest.raises(RunError, match=r"at least one, and got \(0, 4\)"):
        predict(run, embeddings()[:0], POSITION_MM[:0])
    with pytest.raises(RunError, match="not all finite"):
        predict(run, embeddings() / 0, POSITION_MM)
    with pytest.raises(RunError, match="no finding 'gas'"):
        predict(run, embeddings(), POSITION_MM).top_slices("gas")
