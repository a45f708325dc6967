"""Scans that kill the Dask worker that reads, or embeds, them."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

from distributed import Worker, WorkerPlugin


class Crash(WorkerPlugin):  # type: ignore[misc]
    """Kills every worker, also one that is started later, that comes to a scan.

    Args:
        scan_ids: Which scans; `*` is any.
        where: `read`, in the process of the worker only; or `embed`.
        deaths: Folder in which each death leaves a file.
    """

    name = "crash"

    def __init__(self, scan_ids: set[str], where: str, deaths: Path) -> None:
        self._scan_ids, self._where, self._deaths = scan_ids, where, deaths
        self._patch: Any = None

    def setup(self, worker: Worker) -> None:
        from ctfm.extract.packing import Embedder
        from ctfm.extract.prepare import prepare

        def prepare_or_die(*arguments: Any, scan_id: str, **others: Any) -> Any:
            self._die_of(scan_id)
            return prepare(*arguments, scan_id=scan_id, **others)

        add = Embedder.add

        def add_or_die(embedder: Any, scan_id: str, scan: Any) -> None:
            if isinstance(scan, list):
                self._die_of(scan_id)
            add(embedder, scan_id, scan)

        if self._where == "read":
            self._patch = patch("ctfm.extract.readers.prepare", prepare_or_die)
        else:
            self._patch = patch("ctfm.extract.packing.Embedder.add", add_or_die)
        self._patch.start()

    def teardown(self, worker: Worker) -> None:
        self._patch.stop()

    def _die_of(self, scan_id: str) -> None:
        if scan_id in self._scan_ids or "*" in self._scan_ids:
            (self._deaths / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
