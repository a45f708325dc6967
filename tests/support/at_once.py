"""Extractions that start at the same moment in processes of their own."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.options import Options
from ctfm.extract.pipeline import extract
from ctfm.store.catalogue import Catalogue


def extract_at_once(
    catalogues: Sequence[Catalogue], store: Path | str, config: ExtractConfig, *, options: Options
) -> list[int | None]:
    """Extract each catalogue into the same store, each in a process; their exit codes."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(len(catalogues))
    processes = [
        context.Process(target=_wait_and_extract, args=(start, catalogue, store, config, options))
        for catalogue in catalogues
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _wait_and_extract(
    start: Barrier, catalogue: Catalogue, store: Path | str, config: ExtractConfig, options: Options
) -> None:
    backbone = get_backbone(config.backbone)
    start.wait()
    extract(catalogue, store, backbone, config=config, options=options)
