"""Seals: from a file's bytes, to the same bytes with their own SHA-256 inside.

A sealed file holds `"seal":"…"` once, with 64 hexadecimal digits: the digest of the whole file with
zeros in their place. JSON records, Zarr's metadata and Parquet's footer all have room for that, so
a flipped bit anywhere in the file shows, and no second file has to be kept in step with the first.
"""

import hashlib
import re

from ctfm.store.errors import StoreError

OPEN_SEAL = "0" * 64
"""What `seal` fills in."""

_SEAL = re.compile(rb'"seal": ?"([0-9a-f]{64})"')


def seal(content: bytes) -> bytes:
    """Fill in the seal of a file that holds an open one.

    Raises:
        StoreError: If something else in the file looks like a seal.
    """
    found = list(_SEAL.finditer(content))
    if len(found) != 1 or found[0][1] != OPEN_SEAL.encode():
        raise StoreError(
            f"a file of a store needs one open seal, got {len(found)} texts that look like one: "
            "is `seal` part of an id?"
        )
    return _filled(content, found[0], hashlib.sha256(content).hexdigest())


def is_sealed(content: bytes) -> bool:
    """Whether a file is, to the bit, what `seal` returned."""
    found = list(_SEAL.finditer(content))
    if len(found) != 1:
        return False
    opened = _filled(content, found[0], OPEN_SEAL)
    return hashlib.sha256(opened).hexdigest().encode() == found[0][1]


def _filled(content: bytes, found: re.Match[bytes], digits: str) -> bytes:
    return content[: found.start(1)] + digits.encode() + content[found.end(1) :]
