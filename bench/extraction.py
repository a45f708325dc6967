"""Claim: extraction runs at nearly the speed of the bare forward pass of the same backbone.

Phantom series of 512 × 512 pixels are extracted with `dinov3-base` (random weights in the hub's
layout) and with `intensity`: slices a second from DICOM on disk to committed rows, against the
bare forward on channels that are in memory, at the same batch size, type and threads, in one run.
"""

import logging
import tempfile
import time
from pathlib import Path

import torch
from measure import main_with_out, median_seconds
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import Options, extract
from ctfm.extract.prepare import prepare
from ctfm.store.catalogue import Catalogue

SCANS, BATCH, WORKERS = {"intensity": 24, "dinov3-base": 6}, 64, 1


def random_weights(folder: Path) -> Path:
    """A checkpoint of DINOv3 ViT-B/16 with random weights, as transformers writes it."""
    config = DINOv3ViTConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        num_register_tokens=4,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def bare_slices_per_s(backbone: Backbone, catalogue: Catalogue) -> float:
    """Slices a second of `embed` alone, on a full batch of channels in memory."""
    config = ExtractConfig(backbone=backbone.name)
    files = next(iter(catalogue.files.values()))
    (scan,) = prepare(files, config, scan_id="")
    channels = backbone.channels(torch.from_numpy(scan.hu), config.windows_hu)
    batch = channels.repeat(-(-BATCH // len(channels)), 1, 1, 1)[:BATCH]
    seconds = median_seconds({"bare": lambda: backbone.embed(batch)}, repeats=3)
    return BATCH / seconds["bare"].median


def extraction_slices_per_s(backbone: Backbone, catalogue: Catalogue, store: Path) -> float:
    """Slices a second of the whole path; starting the reader process is part of it."""
    config = ExtractConfig(backbone=backbone.name)
    start = time.perf_counter()
    done = extract(
        catalogue,
        store,
        backbone,
        config=config,
        options=Options(batch_size=BATCH, workers=WORKERS, shard_scans=8),
    )
    seconds = time.perf_counter() - start
    n_slices: int = done.store.info()["rows"]
    return n_slices / seconds


def measure() -> dict[str, object]:
    """Slices a second of both backbones, whole path and bare forward."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = random_weights(folder / "weights")
        for model, scans in SCANS.items():
            cohort = folder / f"cohort-{scans}"
            write_cohort(cohort, scans=scans, seed=0, matrix=512, extras=0.0)
            catalogue = index([cohort], key=None)
            backbone = get_backbone(model, weights if model == "dinov3-base" else None)
            backbone = backbone.to("cpu")
            bare = bare_slices_per_s(backbone, catalogue)
            whole = extraction_slices_per_s(backbone, catalogue, folder / model)
            rates[model] = {"bare": bare, "whole": whole, "ratio": whole / bare}
    return {
        "claim": "slices/s of extraction with dinov3-base against its bare forward",
        "batch": BATCH,
        "reader_processes": WORKERS,
        "threads": torch.get_num_threads(),
        "slices_per_s": rates,
        "ratio": rates["dinov3-base"]["ratio"],
    }


if __name__ == "__main__":
    main_with_out(measure)
