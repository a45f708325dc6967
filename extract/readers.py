"""Reader processes: source files in, prepared scans out, in the order asked for.

Each process holds one scan at a time, so that when one dies (a decoder that crashes on a hostile
file) or exceeds its time or memory, exactly that scan is lost, with a reason, and a fresh process
takes over. A thread keeps the processes fed while the caller computes. When the
caller is killed, the processes see their pipe close and end by themselves.

A process computes with one thread, at a lower priority than the caller, so that reading does not
take the cores that the backbone computes on. It returns one scan at a time through a pipe: about
4 MB of int16 HU, 3 ms. It is started as a command and not by `multiprocessing`: so it does not
import the caller's script again, which would need a guard there, and it can be started in a worker
of a cluster, which is a daemon.
"""

import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Literal

from ctfm.extract.config import ExtractConfig
from ctfm.extract.prepare import PreparedScan, prepare
from ctfm.extract.volume import Volume
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ScanError
from ctfm.store.isolation import isolate_children
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.reasons import Reason

MAX_SCAN_BYTES = 8 << 30
"""Memory that a reader process may take for a scan: 3 GB is usual for 2,000 slices of 512 x 512."""

DIED = "the process that read it died (a crashing decoder, or no memory left)"
"""The detail of a scan that `READER_CRASHED` stands for."""

_ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
    ),
    "1",
)
"""Of the environment: reader processes are many, and the backbone computes beside them."""

_NICE = 10  # a forward pass waits for the slowest of its threads; readers are scans ahead
_POLL_S = 0.5
_SERVE = "import sys; from ctfm.extract.readers import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class ReadJob:
    """One scan to prepare."""

    scan_id: str
    files: tuple[str, ...]
    digest: str | None = None
    """Of these files, as the catalogue has it."""
    source: str = ""
    """`Pseudonyms.files` of the digest."""
    given_up: bool = False
    """Whether reading it is known to kill who does."""


def read_jobs(scans: Catalogue, scan_ids: Iterable[str]) -> dict[str, ReadJob]:
    """The jobs of some scans, by id; a scan that the catalogue does not list has no file."""
    pseudonyms = Pseudonyms(scans.key)
    return {
        scan_id: ReadJob(
            scan_id,
            tuple(scans.files.get(scan_id, ())),
            digest=scans.digests.get(scan_id),
            source=pseudonyms.files(scans.digests.get(scan_id, "")),
        )
        for scan_id in scan_ids
    }


Prepared = list[PreparedScan] | ScanError
"""The views of a scan, or why there are none."""


def prepare_or_reason(job: ReadJob, config: ExtractConfig, template: Volume | None) -> Prepared:
    """Prepare one scan; whatever goes wrong with it comes back as a `ScanError`.

    The one place where any exception is caught: a file can break a decoder in more ways than can
    be listed, and must not stop the scans that follow. The message of an unforeseen exception may
    hold an identifier, so only its type is kept.
    """
    if job.given_up:
        return ScanError(Reason.READER_CRASHED, DIED)
    try:
        return prepare(job.files, config, scan_id=job.scan_id, template=template, digest=job.digest)
    except ScanError as error:
        return error
    except MemoryError:
        return ScanError(Reason.READER_CRASHED, "the scan did not fit into memory")
    except Exception as error:
        detail = f"reading it raised an unforeseen {type(error).__name__}"
        return ScanError(Reason.UNREADABLE, detail)


def read_ahead(
    jobs: Sequence[ReadJob],
    config: ExtractConfig,
    *,
    workers: int,
    template: Volume | None = None,
    timeout_s: float = 300.0,
    memory_bytes: int = MAX_SCAN_BYTES,
) -> Generator[Prepared, None, None]:
    """Prepare scans ahead of the caller, and yield them in the order of `jobs`.

    Args:
        jobs: The scans.
        config: Decides every byte of the result.
        workers: Reader processes; 0 reads in the calling thread, when asked for the next scan.
        template: The volume that `config.template` is the digest of.
        timeout_s: Seconds after which a scan counts as `READER_CRASHED`. Unused with 0 workers.
        memory_bytes: What a process may take for a scan, likewise; where the system can tell.

    Yields:
        One result a job; at most about three scans a process wait in memory.

    Raises:
        RuntimeError: If a reader process cannot start at all.
    """
    if workers == 0:
        for job in jobs:
            yield prepare_or_reason(job, config, template)
        return
    arguments = (config, template, memory_bytes)
    pool = _ReaderPool(jobs, arguments, workers=workers, timeout_s=timeout_s)
    try:
        yield from pool.results()
    finally:
        pool.close()


@dataclass
class _Reader:
    """A reader process, its end of the pipe, and what it is at work on."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    job: int | Literal["starting", "idle"] = "starting"
    since_s: float = field(default_factory=time.monotonic)

    def overdue(self, timeout_s: float) -> bool:
        return isinstance(self.job, int) and time.monotonic() - self.since_s > timeout_s

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def serve(file_descriptor: int) -> None:
    """The life of a reader process: until its pipe closes."""
    os.nice(_NICE)
    for number in (signal.SIGINT, signal.SIGTERM):
        # They reach every process of a terminal or a job, and are the main process's to handle: to
        # die of one before it does would look like a scan that crashes its reader.
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(file_descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        config, template, memory_bytes = pipe.recv()
        _limit_memory(memory_bytes)
        pipe.send("ready")
        while True:
            pipe.send(prepare_or_reason(pipe.recv(), config, template))


def _limit_memory(more_bytes: int) -> None:
    """Let this process take no more than it has and so much; what is beyond is a `MemoryError`."""
    with suppress(OSError, ValueError):  # no /proc, or a lower limit that is not to be raised
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _ReaderPool:
    """Processes, and the thread that hands them jobs and puts their results into order."""

    def __init__(
        self,
        jobs: Sequence[ReadJob],
        arguments: tuple[ExtractConfig, Volume | None, int],
        *,
        workers: int,
        timeout_s: float,
    ) -> None:
        self._jobs = jobs
        self._arguments = arguments
        self._timeout_s = timeout_s
        self._window = 3 * workers
        self._next_job = 0
        self._next_out = 0
        self._early: dict[int, Prepared] = {}  # finished before an earlier one
        self._ordered: queue.Queue[Prepared | BaseException] = queue.Queue(maxsize=workers)
        self._closing = threading.Event()
        self._readers = [self._start() for _ in range(min(workers, len(jobs)))]
        self._thread = threading.Thread(target=self._run, name="ctfm-readers", daemon=True)
        self._thread.start()

    def results(self) -> Iterator[Prepared]:
        for _ in self._jobs:
            result = self._ordered.get()
            if isinstance(result, BaseException) and not isinstance(result, ScanError):
                raise result
            yield result

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        for reader in self._readers:
            reader.stop()

    def _start(self) -> _Reader:
        ours, theirs = Pipe()
        isolate_children()
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                **_ONE_THREAD,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        theirs.close()
        with suppress(BrokenPipeError, ConnectionResetError):  # noticed when the pipe is read
            ours.send(self._arguments)
        return _Reader(process, ours)

    def _run(self) -> None:
        try:
            while self._next_out < len(self._jobs) and not self._closing.is_set():
                self._hand_out()
                self._collect()
                self._pass_on()
        except Exception as error:
            self._put(error)

    def _put(self, item: Prepared | BaseException) -> None:
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._ordered.put(item, timeout=_POLL_S)
                return

    def _hand_out(self) -> None:
        limit = min(len(self._jobs), self._next_out + self._window)
        for reader in self._readers:
            if reader.job == "idle" and self._next_job < limit:
                reader.job, reader.since_s = self._next_job, time.monotonic()
                self._next_job += 1
                # A process that just died is noticed when its pipe is read.
                with suppress(BrokenPipeError, ConnectionResetError):
                    reader.pipe.send(self._jobs[reader.job])

    def _collect(self) -> None:
        busy = {reader.pipe: i for i, reader in enumerate(self._readers) if reader.job != "idle"}
        for pipe in wait(list(busy), timeout=_POLL_S):
            assert isinstance(pipe, Connection)
            self._receive(busy[pipe])
        for i, reader in enumerate(self._readers):
            if reader.overdue(self._timeout_s):
                self._lose(i, f"reading it took longer than {self._timeout_s:g} s")

    def _receive(self, i: int) -> None:
        reader = self._readers[i]
        try:
            message = reader.pipe.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            self._lose(i, DIED)
            return
        if isinstance(reader.job, int):
            self._early[reader.job] = message
        reader.job = "idle"

    def _lose(self, i: int, detail: str) -> None:
        reader = self._readers[i]
        reader.stop()
        if not isinstance(reader.job, int):
            raise RuntimeError(
                f"a reader process ended with code {reader.process.returncode} before its first "
                "scan: what it printed says why"
            )
        self._early[reader.job] = ScanError(Reason.READER_CRASHED, detail)
        self._readers[i] = self._start()

    def _pass_on(self) -> None:
        while self._next_out in self._early:
            self._put(self._early.pop(self._next_out))
            self._next_out += 1
