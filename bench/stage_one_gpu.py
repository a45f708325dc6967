"""Claim: on a GPU, extraction is limited by the forward pass of the backbone and by nothing else.

Every backbone of the registry at full size, with random weights, in bfloat16.
Scans lie in the memory of the host as int16 HU, as reader processes deliver them; a shard of them
goes through the same `Embedder` as in an extraction: over to the device, windows, resize,
normalisation, forward, rows back to the host. Against it, in the same run, the bare forward on a
batch of pixels that is on the device, plain and compiled.

Beside the ratio: the share of the card's own rate of bfloat16 matrix products (8192³, measured
here) that the forward reaches, counting its multiplications by `FlopCounterMode`; and the bytes
that went to the device for each sample, summed from the copies in the profiler's trace, beside
those of the float32 pixels that the int16 HU stand for.

Without a CUDA device the script says so and ends; the tests run all else of it on a CPU, at a tiny
size.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from measure import median_seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctfm.extract.backbone import Backbone, BackboneEntry, default_settings
from ctfm.extract.backbones import BACKBONES
from ctfm.extract.config import ExtractConfig
from ctfm.extract.packing import Embedder
from ctfm.extract.prepare import PreparedScan
from ctfm.store.provenance import machine, versions

SCANS, REPEATS = 24, 5
MATRIX = 8192
COMPILER = "inductor"


def random_module(entry: BackboneEntry, device: torch.device) -> nn.Module:
    """The module of an entry at full size, normal weights of sd 0.02, in evaluation mode."""
    assert entry.skeleton is not None
    module = entry.skeleton().to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
        for name, buffer in module.named_buffers():
            buffer.fill_(name.endswith("running_var"))
    return module.eval().requires_grad_(False)


def random_backbone(entry: BackboneEntry, device: torch.device) -> Backbone:
    """A backbone with random weights that gives the first token of its entry."""
    token = next(iter(entry.tokens))
    backbone = Backbone(
        entry=entry,
        module=random_module(entry, device),
        digest="random",
        tokens={token: entry.tokens[token]},
        device=device,
    )
    return backbone.to(device, "bfloat16")


def scans_in_memory(config: ExtractConfig, count: int) -> list[PreparedScan]:
    """Scans as readers deliver them: noise about the HU of brain on the grid of the config."""
    rng = np.random.default_rng(0)
    shape = (config.max_slices, config.size_px, config.size_px)
    hu = rng.normal(35, 20, shape).astype(np.int16)
    positions = -(np.arange(shape[0], dtype=np.float32) + 0.5) * config.slice_mm
    return [
        PreparedScan(
            hu=hu.copy(), position_mm=positions, jitter=None, world_from_head=np.eye(4), quality={}
        )
        for _ in range(count)
    ]


def synchronised(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The same, waiting for the device at its end."""

    def waits() -> None:
        run()
        torch.get_device_module(device).synchronize()

    return waits


def embed_shard(backbone: Backbone, config: ExtractConfig, scans: list[PreparedScan]) -> int:
    """What an extraction does with a shard between readers and writer; the number of rows."""
    embedder = Embedder(backbone, config, batch_size=backbone.entry.batch_size)
    for number, scan in enumerate(scans):
        embedder.add(str(number), [scan])
    token = next(iter(backbone.tokens))
    results = embedder.finish_shard().results()
    return sum(len(one.rows[token]) for one in results if one.rows is not None)


def bytes_to_device(run: Callable[[], object]) -> int:
    """What copies from the host to the device moved; 0 where there is no device."""
    with torch.profiler.profile() as record:
        run()
    with TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        return copied_bytes(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])


def copied_bytes(events: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the copies to the device among the events of a trace."""
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    return sum(event["args"]["bytes"] for event in copies if "HtoD" in event["name"])


def matrix_flop_per_s(device: torch.device, *, size: int = MATRIX) -> float:
    """Rate of a large bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds({"matmul": synchronised(lambda: a @ b, device)}, repeats=20, warm_up=3)
    return 2 * size**3 / seconds["matmul"].median


def flop_of(module: nn.Module, pixels: Tensor) -> int:
    """Floating-point operations of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(pixels)
    return int(counter.get_total_flops())


def shares(rates: dict[str, float], *, flop: float, matrix_rate: float) -> dict[str, float]:
    """What extraction keeps of the bare forward, and that of the card's matrix products."""
    return {
        "extraction_of_bare": rates["extraction"] / rates["bare"],
        "extraction_of_compiled": rates["extraction_compiled"] / rates["compiled"],
        "share_of_matrix_rate": flop * rates["bare"] / matrix_rate,
        "share_of_matrix_rate_compiled": flop * rates["compiled"] / matrix_rate,
    }


def rates_of(
    backbone: Backbone,
    config: ExtractConfig,
    scans: list[PreparedScan],
    *,
    pixels: Tensor,
    repeats: int,
    compiler: str,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Samples a second, and raw seconds, of the bare and the compiled forward and of extraction."""
    compiled = cast(nn.Module, torch.compile(backbone.module, backend=compiler))
    faster = replace(backbone, module=compiled)
    in_scans = len(scans) * (1 if backbone.entry.unit == "volume" else len(scans[0].hu))
    batches = max(1, in_scans // len(pixels))

    def bare(module: Callable[[Tensor], object]) -> Callable[[], None]:
        def forward() -> None:
            with torch.inference_mode():
                for _ in range(batches):
                    module(pixels)

        return synchronised(forward, backbone.device)

    seconds = median_seconds(
        {
            "bare": bare(backbone.module),
            "compiled": bare(compiled),
            "extraction": lambda: embed_shard(backbone, config, scans),
            "extraction_compiled": lambda: embed_shard(faster, config, scans),
        },
        repeats=repeats,
        warm_up=2,
    )
    in_batches = batches * len(pixels)
    counts = {"bare": in_batches, "compiled": in_batches}
    rates = {name: counts.get(name, in_scans) / time.median for name, time in seconds.items()}
    return rates, {name: time.raw for name, time in seconds.items()}


def measure_backbone(
    entry: BackboneEntry,
    device: torch.device,
    *,
    matrix_rate: float,
    n_scans: int = SCANS,
    repeats: int = REPEATS,
    compiler: str = COMPILER,
) -> dict[str, Any]:
    """Rates of one backbone: bare, compiled, and through the embedder; and what they mean."""
    backbone = random_backbone(entry, device)
    config = ExtractConfig(
        backbone=entry.name,
        precision="bfloat16",
        tokens=tuple(backbone.tokens),
        **default_settings(entry),
    )
    scans = scans_in_memory(config, n_scans)
    one = backbone.channels(torch.from_numpy(scans[0].hu), config.windows_hu)
    samples = one.repeat(-(-entry.batch_size // len(one)), *(1,) * (one.ndim - 1))
    pixels = backbone.pixels(samples[: entry.batch_size])
    rates, raw = rates_of(
        backbone, config, scans, pixels=pixels, repeats=repeats, compiler=compiler
    )
    flop = flop_of(backbone.module, pixels) / len(pixels)
    copied = bytes_to_device(lambda: embed_shard(backbone, config, scans))
    return {
        "unit": entry.unit,
        "batch": entry.batch_size,
        "samples_per_s": rates,
        "raw_seconds": raw,
        "gflop_per_sample": flop / 1e9,
        **shares(rates, flop=flop, matrix_rate=matrix_rate),
        "bytes_to_device_per_sample": copied / (len(one) * n_scans),
        "bytes_of_pixels_per_sample": pixels[0].numel() * 4,
        "peak_device_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def measurable() -> list[BackboneEntry]:
    """Those of the registry that have weights, and compute in bfloat16."""
    return [
        entry
        for entry in BACKBONES.values()
        if entry.skeleton is not None and "bfloat16" in entry.precisions
    ]


def main() -> None:
    """Measure every backbone asked for; write the record after each, so that a stop costs one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    parser.add_argument("--model", action="append", help="default: all; repeatable")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("stage_one_gpu: no CUDA device here, nothing measured")
        return
    device = torch.device("cuda")
    matrix_rate = matrix_flop_per_s(device)
    entries = [
        entry for entry in measurable() if arguments.model is None or entry.name in arguments.model
    ]
    record = {
        "claim": "samples/s of extraction on a GPU against the bare forward",
        "gpu": torch.cuda.get_device_name(),
        "matrix_tflop_per_s": matrix_rate / 1e12,
        "backbones": (found := {}),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
    }
    for entry in entries:
        torch.cuda.reset_peak_memory_stats()
        found[entry.name] = result = measure_backbone(entry, device, matrix_rate=matrix_rate)
        print(f"stage_one_gpu: {entry.name}: {result['extraction_of_bare']:.2f}x of its forward")
        torch.cuda.empty_cache()
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
