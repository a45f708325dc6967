"""Seals: whichever bit of a sealed file is flipped, it shows."""

import pytest

from ctfm.store.errors import StoreError
from ctfm.store.seals import OPEN_SEAL, is_sealed, seal

CONTENT = b'{"scan_id": "a", "seal": "%s", "rows": [1, 2]}' % OPEN_SEAL.encode()


def test_every_bit_counts() -> None:
    sealed = seal(CONTENT)
    assert is_sealed(sealed)
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not is_sealed(bytes(flipped)), bit


def test_changes_nothing_but_the_seal() -> None:
    sealed = seal(CONTENT)
    assert len(sealed) == len(CONTENT)
    assert sealed[:26] + OPEN_SEAL.encode() + sealed[90:] == CONTENT


@pytest.mark.parametrize("content", [b"", b"{}", CONTENT])
def test_what_was_never_sealed_is_not(content: bytes) -> None:
    assert not is_sealed(content)


@pytest.mark.parametrize("content", [b"{}", CONTENT + CONTENT, seal(CONTENT)])
def test_refuses_to_seal_without_exactly_one_open_seal(content: bytes) -> None:
    with pytest.raises(StoreError, match="needs one open seal"):
        seal(content)
