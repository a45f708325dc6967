"""Claim: extraction runs at nearly the speed of the bare forward pass of the same backbone.

Phantom series of 512 × 512 pixels are extracted with `dinov3-small` and `dinov3-base` (random
weights in the hub's layout), in float32 and, where the CPU has it, in bfloat16: slices a second
from DICOM on disk to committed rows, against the bare forward on pixels that are in memory, of the
same type and batch, timed before and after in the same run.

It is timed from its first forward pass, so that neither the start of the reader processes nor the
first scan's reading is in it, and so are the two ways in which such embeddings are made elsewhere,
on the same scans; `_with_start` is all of it, over 10 or 20 scans:

    loader     a DataLoader's worker reads, windows and resizes slice by slice in float32; batches
               of 32 slices of one scan; np.savez_compressed of each scan inside the loop
    per_scan   one scan after another is read, embedded in its own batches, and saved as one h5

Their embeddings must equal the store's before any ratio is taken.

There is a reader a core, as `ctfm extract` has it by default, and the DataLoader gets as many
workers. The batch is what `ctfm extract` takes on a CPU.

The readers share the cores with the forward, so extraction cannot reach it: the ceiling is that of
a machine whose cores did these two things and nothing else, 1 / (1 + seconds of a core to prepare a
scan / seconds of all cores to embed it).
"""

import logging
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import torch
from measure import main_with_out, median_seconds
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils.logging import disable_progress_bar

from ctfm.extract.backbone import Backbone, Precision
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.dinov3 import BASE, SMALL, Sizes
from ctfm.extract.index import index
from ctfm.extract.options import MOST_ON_A_CPU, Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import extract
from ctfm.extract.prepare import prepare
from ctfm.store.catalogue import Catalogue
from ctfm.store.features import FeatureStore
from ctfm.store.provenance import usable_cores

WEIGHTS: dict[str, Sizes] = {"dinov3-small": SMALL, "dinov3-base": BASE}
SCANS: dict[tuple[str, Precision], int] = {
    ("dinov3-small", "float32"): 10,
    ("dinov3-small", "bfloat16"): 20,
    ("dinov3-base", "float32"): 5,
    ("dinov3-base", "bfloat16"): 12,
}
WITH_OTHERS = "dinov3-small"
TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of a row's difference, as a share of the row's norm: batches are cut differently."""
BATCH, LOADER_BATCH, BARE_REPEATS = MOST_ON_A_CPU, 32, 4
WORKERS = usable_cores()

Rows = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A backbone in one type, and the scans it is to embed."""

    backbone: Backbone
    catalogue: Catalogue
    config: ExtractConfig


def random_weights(sizes: Sizes, folder: Path) -> Path:
    """A checkpoint of DINOv3 with random weights, as transformers writes it."""
    DINOv3ViTModel(DINOv3ViTConfig(**sizes)).save_pretrained(folder)
    return folder


def setting_of(catalogue: Catalogue, weights: Path, model: str, precision: Precision) -> Setting:
    """The first scans of the catalogue, as many as this model and type get."""
    backbone = get_backbone(model, weights, tokens=["cls"]).to("cpu", precision)
    keep = catalogue.scans.slice(0, SCANS[model, precision])
    files = {scan_id: catalogue.files[scan_id] for scan_id in keep["scan_id"].to_pylist()}
    return Setting(
        backbone=backbone,
        catalogue=Catalogue(scans=keep, files=files, key=None, digests=catalogue.digests),
        config=ExtractConfig(backbone=model, precision=precision, dtype="float32", tokens=("cls",)),
    )


def channels_of(setting: Setting, files: list[str]) -> Tensor:
    """A scan, read in this process, as channels."""
    (scan,) = prepare(files, setting.config, scan_id="")
    return setting.backbone.channels(torch.from_numpy(scan.hu), setting.config.windows_hu)


def bare_seconds(setting: Setting) -> list[float]:
    """Seconds of the module alone, on a full batch of pixels in memory."""
    channels = channels_of(setting, next(iter(setting.catalogue.files.values())))
    batch = channels.repeat(-(-BATCH // len(channels)), 1, 1, 1)[:BATCH]
    pixels = setting.backbone.pixels(batch)

    def forward() -> None:
        with torch.inference_mode():
            setting.backbone.module(pixels)

    return median_seconds({"bare": forward}, repeats=BARE_REPEATS)["bare"].raw


def reading_seconds(setting: Setting) -> float:
    """Seconds of one core to prepare a scan: read, align, resample."""
    files = list(setting.catalogue.files.values())[:3]

    def read() -> None:
        for one in files:
            prepare(one, setting.config, scan_id="")

    with threadpool_limits(1):
        seconds = median_seconds({"read": read}, repeats=3, clock=time.process_time)
    return seconds["read"].median / len(files)


def timed(name: str, setting: Setting, folder: Path) -> tuple[Rows, dict[str, float]]:
    """The rows of one way; its seconds from its first forward pass, and from its start."""
    forwards_s: list[float] = []
    module = setting.backbone.module
    hook = module.register_forward_pre_hook(lambda *_: forwards_s.append(time.perf_counter()))
    start_s = time.perf_counter()
    rows = WAYS[name](setting, folder)
    end_s = time.perf_counter()
    hook.remove()
    return rows, {name: end_s - forwards_s[0], f"{name}_with_start": end_s - start_s}


def ctfm(setting: Setting, folder: Path) -> Rows:
    """The whole path."""
    extract(
        setting.catalogue,
        folder,
        setting.backbone,
        config=setting.config,
        options=Options(batch_size=BATCH, workers=WORKERS, shard_scans=8),
    )
    scan_ids = list(setting.catalogue.files)
    rows, offsets = FeatureStore.open(folder).load(scan_ids)
    return dict(zip(scan_ids, torch.split(rows, offsets.diff().tolist()), strict=True))


def per_scan(setting: Setting, folder: Path) -> Rows:
    """One scan after another, in one process, one h5 a scan."""
    found = {}
    for scan_id, files in setting.catalogue.files.items():
        batches = torch.split(channels_of(setting, files), BATCH)
        rows = [setting.backbone.embed(batch)["cls"] for batch in batches]
        found[scan_id] = torch.cat(rows)
        with h5py.File(folder / f"{scan_id}.h5", "w") as file:
            file.create_dataset("features", data=found[scan_id].numpy())
    return found


class Scans(Dataset[tuple[str, Tensor]]):
    """Scans as pixels, made in the worker slice by slice."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._files = setting, list(setting.catalogue.files.items())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> tuple[str, Tensor]:
        scan_id, files = self._files[i]
        channels = channels_of(self._setting, files)
        return scan_id, torch.cat([self._setting.backbone.pixels(one[None]) for one in channels])


def loader(setting: Setting, folder: Path) -> Rows:
    """A DataLoader over scans, and one npz a scan."""
    found = {}
    loaded: Iterator[tuple[str, Tensor]] = iter(
        DataLoader(Scans(setting), batch_size=None, num_workers=WORKERS)
    )
    with torch.inference_mode():
        for scan_id, pixels in loaded:
            batches = torch.split(pixels, LOADER_BATCH)
            rows = [setting.backbone.module(batch)["cls"].float() for batch in batches]
            found[scan_id] = torch.cat(rows)
            np.savez_compressed(folder / f"{scan_id}.npz", cls=found[scan_id].numpy())
    return found


WAYS: dict[str, Callable[[Setting, Path], Rows]] = {
    "ctfm": ctfm,
    "loader": loader,
    "per_scan": per_scan,
}


def difference(found: Rows, expected: Rows) -> float:
    """The largest difference of two rows, as a share of the row's norm."""
    return max(
        float(((found[scan_id] - rows).norm(dim=1) / rows.norm(dim=1)).max())
        for scan_id, rows in expected.items()
    )


def measure_setting(setting: Setting, folder: Path) -> dict[str, object]:
    """Slices a second: bare, of extraction, and of the other ways; their ratios; the ceiling."""
    names = list(WAYS) if setting.backbone.name == WITH_OTHERS else ["ctfm"]
    rows: dict[str, Rows] = {}
    seconds: dict[str, float] = {}
    bare_s = bare_seconds(setting)
    for name in names:
        (folder / name).mkdir()
        rows[name], took_s = timed(name, setting, folder / name)
        seconds |= took_s
        bare_s += bare_seconds(setting)
    expected = rows.pop("ctfm")
    differences = {name: difference(found, expected) for name, found in rows.items()}
    for name, found in differences.items():
        if found > TOLERANCE[setting.config.precision]:
            raise RuntimeError(f"the embeddings of {name} differ by {found:.2g}")
    n_slices = sum(map(len, expected.values()))
    rates = {"bare": BATCH / median(bare_s), **{way: n_slices / s for way, s in seconds.items()}}
    read_s = reading_seconds(setting)
    forward_s = n_slices / len(expected) / rates["bare"] * torch.get_num_threads()
    return {
        "scans": len(expected),
        "slices": n_slices,
        "slices_per_s": rates,
        "bare_seconds": bare_s,
        "core_s_per_scan": {"prepare": read_s, "forward": forward_s},
        "ratio_to_bare": rates["ctfm"] / rates["bare"],
        "ceiling": 1 / (1 + read_s / forward_s),
        "ratio_to_others": {name: rates["ctfm"] / rates[name] for name in differences},
        "differences": differences,
    }


def described(name: str, result: dict[str, object]) -> str:
    """One line of a setting."""
    others = result["ratio_to_others"]
    assert isinstance(others, dict)
    against = "".join(f", {ratio:.2f}x {other}" for other, ratio in others.items())
    return (
        f"{name}: {result['ratio_to_bare']:.2f} of its forward "
        f"(ceiling {result['ceiling']:.2f}){against}"
    )


def measure(parts: Collection[str]) -> dict[str, object]:
    """Every backbone in every type that is asked for."""
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cohort(folder / "cohort", scans=max(SCANS.values()), matrix=512, extras=0.0)
        catalogue = index([folder / "cohort"], key=None)
        weights = {model: random_weights(sizes, folder / model) for model, sizes in WEIGHTS.items()}
        for model, precision in SCANS:
            if f"{model}-{precision}" in parts and (precision == "float32" or has_bfloat16):
                setting = setting_of(catalogue, weights[model], model, precision)
                own = folder / f"{model}-{precision}"
                own.mkdir()
                results[own.name] = measure_setting(setting, own)
                print(described(own.name, results[own.name]), flush=True)
    return {
        "claim": "slices/s of extraction against the bare forward, from its first pass, "
        "of the largest that was asked for",
        "batch": BATCH,
        "reader_processes": WORKERS,
        "threads": torch.get_num_threads(),
        "settings": results,
        "ratio": list(results.values())[-1]["ratio_to_bare"],
    }


if __name__ == "__main__":
    main_with_out(measure, parts=tuple(f"{model}-{precision}" for model, precision in SCANS))
