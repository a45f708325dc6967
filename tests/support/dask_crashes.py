"""Scans that kill the Dask worker that reads, or embeds, them."""

import os
import signal
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin


class Crash(WorkerPlugin):  # type: ignore[misc]
    """Kills every worker, also one that is started later, that comes to a scan.

    Args:
        scan_ids: Which scans.
        where: `read`, in the process of the worker only; or `embed`.
        deaths: Folder in which each death leaves a file.
    """

    name = "crash"

    def __init__(self, scan_ids: set[str], where: str, deaths: Path) -> None:
        self._scan_ids, self._where, self._deaths = scan_ids, where, deaths
        self._real: Any = None

    def setup(self, worker: Worker) -> None:
        from ctfm.extract import readers
        from ctfm.extract.packing import Embedder

        if self._where == "read":
            self._real = real = readers.prepare

            def prepare(files: Any, config: Any, *, scan_id: str, **others: Any) -> Any:
                self._die_of(scan_id)
                return real(files, config, scan_id=scan_id, **others)

            readers.prepare = prepare
            return
        self._real = add = Embedder.add

        def add_or_die(self_: Any, scan_id: str, scan: Any) -> None:
            if isinstance(scan, list):
                self._die_of(scan_id)
            add(self_, scan_id, scan)

        Embedder.add = add_or_die  # type: ignore[method-assign]

    def teardown(self, worker: Worker) -> None:
        from ctfm.extract import readers
        from ctfm.extract.packing import Embedder

        if self._where == "read":
            readers.prepare = self._real
        else:
            Embedder.add = self._real  # type: ignore[method-assign]

    def _die_of(self, scan_id: str) -> None:
        if scan_id in self._scan_ids or "*" in self._scan_ids:
            (self._deaths / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
