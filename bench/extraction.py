"""Claim: extraction runs at nearly the speed of the bare forward pass of the same backbone.

Phantom series of 512 × 512 pixels are extracted with `dinov3-small` and `dinov3-base` (random
weights in the hub's layout, float32) and with `intensity`: slices a second from DICOM on disk to
committed rows, against the bare forward on channels that are in memory, at the same batch size,
type and threads, in one run. Starting the reader process is part of the extraction.

With `dinov3-small`, two ways in which such embeddings are made elsewhere run on the same scans:

    per scan   one scan after another is read, embedded in its own batches, and saved with np.save
    loader     a DataLoader's worker reads, windows and resizes in float32; batches of 32 slices;
               np.savez_compressed inside the loop

Their embeddings must equal the store's before any ratio is taken.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from measure import main_with_out, median_seconds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils.logging import disable_progress_bar

from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.dinov3 import BASE, SMALL, Sizes
from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import Options, extract
from ctfm.extract.prepare import prepare
from ctfm.store.catalogue import Catalogue
from ctfm.store.features import FeatureStore

SCANS = {"intensity": 24, "dinov3-small": 20, "dinov3-base": 8}
WEIGHTS: dict[str, Sizes] = {"dinov3-small": SMALL, "dinov3-base": BASE}
BATCH, LOADER_BATCH, WORKERS = 64, 32, 1


def random_weights(sizes: Sizes, folder: Path) -> Path:
    """A checkpoint of DINOv3 with random weights, as transformers writes it."""
    DINOv3ViTModel(DINOv3ViTConfig(**sizes)).save_pretrained(folder)
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


def with_ctfm(backbone: Backbone, catalogue: Catalogue, folder: Path) -> dict[str, Tensor]:
    """The whole path: rows of each scan."""
    options = Options(batch_size=BATCH, workers=WORKERS, shard_scans=8)
    config = ExtractConfig(backbone=backbone.name, dtype="float32")
    extract(catalogue, folder / "store", backbone, config=config, options=options)
    return {}


def stored(folder: Path, scan_ids: list[str]) -> dict[str, Tensor]:
    """What `with_ctfm` wrote."""
    rows, offsets = FeatureStore.open(folder / "store").load(scan_ids)
    parts = torch.split(rows, (offsets[1:] - offsets[:-1]).tolist())
    return dict(zip(scan_ids, parts, strict=True))


def per_scan(backbone: Backbone, catalogue: Catalogue, folder: Path) -> dict[str, Tensor]:
    """One scan after another, in one process."""
    config = ExtractConfig(backbone=backbone.name)
    found = {}
    for scan_id, files in catalogue.files.items():
        (scan,) = prepare(files, config, scan_id=scan_id)
        channels = backbone.channels(torch.from_numpy(scan.hu), config.windows_hu)
        rows = [backbone.embed(batch)["cls"] for batch in torch.split(channels, BATCH)]
        found[scan_id] = torch.cat(rows)
        np.save(folder / f"{scan_id}.npy", found[scan_id].numpy())
    return found


class Scans(Dataset[tuple[str, Tensor]]):
    """Scans as pixels in float32, made in the worker slice by slice."""

    def __init__(self, backbone: Backbone, catalogue: Catalogue) -> None:
        self._backbone, self._files = backbone, list(catalogue.files.items())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> tuple[str, Tensor]:
        scan_id, files = self._files[i]
        config = ExtractConfig(backbone=self._backbone.name)
        (scan,) = prepare(files, config, scan_id=scan_id)
        channels = self._backbone.channels(torch.from_numpy(scan.hu), config.windows_hu)
        return scan_id, torch.cat([self._backbone.pixels(one[None]) for one in channels])


def loader(backbone: Backbone, catalogue: Catalogue, folder: Path) -> dict[str, Tensor]:
    """A DataLoader over scans, and a file a scan."""
    found = {}
    loaded: Iterator[tuple[str, Tensor]] = iter(
        DataLoader(Scans(backbone, catalogue), batch_size=None, num_workers=WORKERS)
    )
    with torch.inference_mode():
        for scan_id, pixels in loaded:
            batches = torch.split(pixels, LOADER_BATCH)
            found[scan_id] = torch.cat([backbone.module(batch)["cls"] for batch in batches])
            np.savez_compressed(folder / f"{scan_id}.npz", cls=found[scan_id].numpy())
    return found


Way = Callable[[Backbone, Catalogue, Path], dict[str, Tensor]]


def timed(
    way: Way, backbone: Backbone, catalogue: Catalogue, folder: Path
) -> tuple[float, dict[str, Tensor]]:
    """Seconds of one way, and what it gave."""
    folder.mkdir(parents=True)
    start_s = time.perf_counter()
    found = way(backbone, catalogue, folder)
    return time.perf_counter() - start_s, found


def measure_model(model: str, folder: Path, ways: Mapping[str, Way]) -> dict[str, float]:
    """Slices a second: bare, and of each way, whose embeddings are compared."""
    write_cohort(folder / "cohort", scans=SCANS[model], seed=0, matrix=512, extras=0.0)
    catalogue = index([folder / "cohort"], key=None)
    weights = random_weights(WEIGHTS[model], folder / "weights") if model in WEIGHTS else None
    backbone = get_backbone(model, weights, tokens=["cls"]).to("cpu")
    rates = {"bare": bare_slices_per_s(backbone, catalogue)}
    embeddings = {}
    for name, way in ways.items():
        seconds, embeddings[name] = timed(way, backbone, catalogue, folder / name)
        if name == "ctfm":
            embeddings[name] = stored(folder / name, list(catalogue.files))
        n_slices = sum(map(len, embeddings[name].values()))
        rates[name] = n_slices / seconds
        for scan_id, rows in embeddings[name].items():
            expected = embeddings["ctfm"][scan_id]
            torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)
    return rates


def measure() -> dict[str, object]:
    """Slices a second of every backbone and way, and their ratios."""
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    others: dict[str, Way] = {"per_scan": per_scan, "loader": loader}
    rates = {}
    for model in SCANS:
        ways = {"ctfm": with_ctfm, **(others if model == "dinov3-small" else {})}
        with tempfile.TemporaryDirectory() as name:
            rates[model] = measure_model(model, Path(name), ways)
    small = rates["dinov3-small"]
    return {
        "claim": "slices/s of extraction against the bare forward of the same backbone",
        "batch": BATCH,
        "reader_processes": WORKERS,
        "threads": torch.get_num_threads(),
        "scans": SCANS,
        "slices_per_s": rates,
        "ratio": rates["dinov3-base"]["ctfm"] / rates["dinov3-base"]["bare"],
        "ratio_to_bare": {model: rate["ctfm"] / rate["bare"] for model, rate in rates.items()},
        "ratio_to_others": {name: small["ctfm"] / small[name] for name in others},
    }


if __name__ == "__main__":
    main_with_out(measure)
