"""Errors that a user can mend: what is wrong, what was got, what to do.

    CtfmError
    ├── ConfigError       (ValueError)    a setting or an argument is out of its range
    ├── LabelError        (ValueError)    a label table does not fit the scans or the findings
    ├── StoreError        (ValueError)    a feature store is missing, damaged or made otherwise
    │   └── PlaceError                    the place of one refuses, or does not answer
    ├── RunError          (ValueError)    a run folder is missing, unfinished or another's
    ├── BackboneError     (LookupError)   no such backbone, or its weights do not load completely
    │   └── ChoiceError                   a checkpoint holds several parts that could be meant
    ├── ClusterError      (RuntimeError)  the workers of a cluster died
    └── ScanError         (ValueError)    one scan cannot be used; carries a `Reason`

The command line prints a `CtfmError` without a traceback and exits with 1. A `ScanError` never
stops a batch: its scan is recorded as failed with the reason, and the rest goes on.
"""

from collections.abc import Iterable

from ctfm.store.reasons import Reason

LISTED = 3
"""Names of many that a message lists."""


class CtfmError(Exception):
    """Something the user can mend; its message says what, what was got and what to do."""


class ConfigError(CtfmError, ValueError):
    """A setting or an argument is out of its range."""


class LabelError(CtfmError, ValueError):
    """A label table does not fit the scans or the findings."""


class StoreError(CtfmError, ValueError):
    """A feature store is missing, unfinished, damaged, or was made with other settings."""


class PlaceError(StoreError):
    """A folder may not be read, or object storage does not answer: that says nothing of a store."""


class RunError(CtfmError, ValueError):
    """A run folder is missing, unfinished, or does not fit what it is used with."""


class BackboneError(CtfmError, LookupError):
    """No backbone has that name, or its weights do not load completely."""


class ChoiceError(BackboneError):
    """A checkpoint holds more than the one network that is wanted: a key has to say which part.

    Args:
        message: For the user.
        keys: Each of them names a part with the network in it.
    """

    def __init__(self, message: str, keys: Iterable[str]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)

    def __reduce__(self) -> tuple[type["ChoiceError"], tuple[str, tuple[str, ...]]]:
        """Survive the way from a worker to the main process."""
        return type(self), (str(self), self.keys)


class ClusterError(CtfmError, RuntimeError):
    """The workers of a cluster died, or cannot be reached."""


class ScanError(CtfmError, ValueError):
    """One scan cannot be used.

    Args:
        reason: The code that goes into the catalogue or the store.
        detail: One sentence for a person. It must not hold a name, date, id or path.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ScanError"], tuple[Reason, str]]:
        """Survive the way from a reader process to the main one."""
        return type(self), (self.reason, self.detail)


def some(values: Iterable[object]) -> str:
    """The first few of many, for a message: `a, b, c and 4 more`."""
    listed = list(map(str, values))
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more
