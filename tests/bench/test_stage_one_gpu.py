"""The bench of stage one on a GPU, run on the CPU with a ViT of two layers.

It can be run at full size only where there is a GPU; here it is seen to measure what it says.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stage_one_gpu as bench
import torch
from measure import Seconds

from ctfm.extract import dinov3
from ctfm.extract.backbone import BackboneEntry
from ctfm.extract.backbones import get_entry
from ctfm.extract.config import ExtractConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Guards may run slower:RuntimeWarning"  # of torch.compile, on Python 3.13.0 alone
)

CPU = torch.device("cpu")
SIZE_PX, PATCH_PX, WIDTH, MLP, LAYERS = 48, 16, 24, 56, 2
SCANS, BATCH = 2, 16


@pytest.fixture(scope="module")
def entry() -> BackboneEntry:
    sizes = {
        **dinov3.SMALL,
        **{"hidden_size": WIDTH, "intermediate_size": MLP},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": 3},
    }
    return replace(
        get_entry("dinov3-small"),
        skeleton=dinov3.tower(sizes).build,
        tokens={"cls": WIDTH},
        size_px=(SIZE_PX, SIZE_PX),
        batch_size=BATCH,
    )


def flop_by_hand() -> int:
    """Of one slice: twice the multiplications of every matrix product of the ViT."""
    patches = (SIZE_PX // PATCH_PX) ** 2
    tokens = patches + 1 + int(dinov3.SMALL["num_register_tokens"])
    projections = tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP)
    attention = 2 * tokens * tokens * WIDTH
    embedding = patches * 3 * PATCH_PX**2 * WIDTH
    return 2 * (LAYERS * (projections + attention) + embedding)


def test_a_backbone_is_measured_with_and_without_its_embedder(entry: BackboneEntry) -> None:
    found = bench.measure_backbone(
        entry, CPU, matrix_rate=1e9, n_scans=SCANS, repeats=1, compiler="eager"
    )
    rates = found["samples_per_s"]
    assert set(rates) == {"bare", "compiled", "extraction", "extraction_compiled"}
    assert all(0 < rate < math.inf for rate in rates.values())
    assert found["extraction_of_bare"] == pytest.approx(rates["extraction"] / rates["bare"])
    assert found["gflop_per_sample"] == pytest.approx(flop_by_hand() / 1e9)
    share = flop_by_hand() * rates["bare"] / 1e9
    assert found["share_of_matrix_rate"] == pytest.approx(share)
    assert found["bytes_to_device_per_sample"] == 2 * ExtractConfig.size_px**2
    assert found["bytes_of_pixels_per_sample"] == 4 * 3 * SIZE_PX**2
    json.dumps(found)


def test_every_slice_of_every_scan_is_embedded(entry: BackboneEntry) -> None:
    config = ExtractConfig(backbone=entry.name, precision="bfloat16", max_slices=11, size_px=32)
    backbone = bench.random_backbone(entry, CPU)
    scans = bench.scans_in_memory(config, 3)
    assert bench.embed_shard(backbone, config, scans) == 33


def test_the_rate_of_a_matrix_product_counts_its_multiplications_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = Seconds(1.0, [1.0])
    monkeypatch.setattr(bench, "median_seconds", lambda timed, **_: dict.fromkeys(timed, second))
    assert bench.matrix_flop_per_s(CPU, size=8) == 2 * 8 * 8 * 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["stage_one_gpu.py", "--out", str(tmp_path / "raw.json")])
    bench.main()
    assert "no CUDA device here, nothing measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
