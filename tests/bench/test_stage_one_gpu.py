"""The bench of stage one on a GPU, run on the CPU with a ViT of two layers.

It can be run at full size only where there is a GPU; here it is seen to measure what it says.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stage_one_gpu as bench
import torch
from measure import Seconds

from ctfm.extract import dinov3, pillar0
from ctfm.extract.atlas import Atlas
from ctfm.extract.backbone import BackboneEntry
from ctfm.extract.backbones import BACKBONES, get_entry
from ctfm.extract.config import ExtractConfig, Grid
from ctfm.extract.densenet3d import DenseNet3d, DenseShape

pytestmark = [
    # Of torch.compile: on Python 3.13.0 alone; of the annotations that only tests check.
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
]

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
    assert found["bytes_to_device_per_sample"] == 0  # the host is the device
    assert found["bytes_of_pixels_per_sample"] == 4 * 3 * SIZE_PX**2
    json.dumps(found)


def test_copies_to_the_device_are_counted_and_no_others() -> None:
    def copy(name: str, size_bytes: int) -> dict[str, Any]:
        return {"cat": "gpu_memcpy", "name": name, "args": {"bytes": size_bytes}}

    events = [
        copy("Memcpy HtoD (Pageable -> Device)", 512),
        copy("Memcpy HtoD (Pinned -> Device)", 40),
        copy("Memcpy DtoH (Device -> Pageable)", 7),
        {"cat": "kernel", "name": "gemm", "args": {}},
        {"ph": "M", "name": "process_name"},
    ]
    assert bench.copied_bytes(events) == 552


SMALL_ATLAS = replace(
    pillar0.INFERRED,
    image=(16, 32, 32),
    width=24,
    heads=3,
    mlp_width=48,
    depths=(1, 1),
    window=(2, 2, 2),
    pool=(2, 2, 2),
)
SMALL_DENSE = DenseShape(channels=3, blocks=(1, 1), growth=4, stem=6)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        pytest.param("pillar0-headct", partial(Atlas, SMALL_ATLAS), marks=pytest.mark.slow),
        ("deepcntd", partial(DenseNet3d, SMALL_DENSE)),
    ],
)
def test_a_volume_backbone_is_measured_by_scans(
    name: str, small: Callable[[], torch.nn.Module]
) -> None:
    found = bench.measure_backbone(
        replace(
            get_entry(name),
            skeleton=small,
            size_px=(16, 32, 32),
            grid=Grid(size_px=32, max_slices=16),
            batch_size=2,
        ),
        CPU,
        matrix_rate=1e9,
        n_scans=2,
        repeats=1,
        compiler="eager",
    )
    assert found["unit"] == "volume"
    assert found["extraction_of_bare"] > 0
    assert found["bytes_of_pixels_per_sample"] == 4 * (11 if "pillar" in name else 3) * 16 * 32**2


def test_all_backbones_of_the_paper_are_measured() -> None:
    names = [entry.name for entry in bench.measurable()]
    assert names == [name for name in BACKBONES if name != "intensity"]


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
