"""Options: how an extraction runs; nothing of it decides what a row means."""

from dataclasses import dataclass

from ctfm.store.errors import ConfigError

MOST_ON_A_CPU = 16
"""Samples a forward pass on a CPU where none are asked for: what larger batches make between layers
leaves its caches (`docs/decisions.md`)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an extraction runs: nothing here decides what a row means."""

    device: str = "cpu"
    """A torch device."""

    batch_size: int | None = None
    """Samples a forward pass, None: what the backbone's entry says, and at most `MOST_ON_A_CPU`
    there. Another size may round the last bit differently."""

    workers: int = 1
    """Reader processes; 0 reads in the calling one."""

    shard_scans: int | None = None
    """Scans of a shard: what a kill can cost. Only for scans new to a store. None: by their
    number, as `FeatureStore.create` says."""

    compress: bool = False
    """zstd; only of effect when a store is made."""

    task: tuple[int, int] = (0, 1)
    """(i, n): do only the shards whose number leaves rest i when divided by n."""

    write_off_unlisted: bool = False
    """Record pending scans that the catalogue does not list as `vanished`. Otherwise their shards
    are left to the extraction that planned them, from another catalogue."""

    def __post_init__(self) -> None:
        number, count = self.task
        if not 0 <= number < count:
            raise ConfigError(
                f"task must be i/n with i from 0 to n - 1, got {number}/{count}: the tasks of an "
                "array of 4 are 0/4, 1/4, 2/4 and 3/4"
            )

    def owns(self, shard: int) -> bool:
        """Whether a shard is this task's to do."""
        number, count = self.task
        return shard % count == number
