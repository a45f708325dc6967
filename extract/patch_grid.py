"""Tokens of an image: from their number and the image's size, to which of them are patches.

A sequence of tokens begins with those that stand for no place (class, distillation and register
tokens); the patches follow, row by row. How many there are is known from the patch size, not from
whether a number is a square: an image may have 4 × 5 patches, and four patches with a class and
four register tokens make nine.

Axes: y rows, x columns.
"""

from collections.abc import Collection
from typing import Any

Size = tuple[int, int]


def tokens_before_patches(
    n_tokens: int, size_px: Size, *, patch_px: Size | None, special: Collection[int]
) -> int | None:
    """How many tokens come before those of the patches; None if that cannot be told.

    Args:
        n_tokens: All of one image.
        size_px: (y, x) of the image.
        patch_px: (y, x) of a patch; None if it is not known. Of a network that merges patches on
            its way, those at its start.
        special: How many tokens of no place the network may have, besides none.
    """
    allowed = {0, *special}
    if patch_px is not None:
        n_patches = (size_px[0] // patch_px[0]) * (size_px[1] // patch_px[1])
        if n_tokens >= n_patches:
            before = n_tokens - n_patches
            return before if before in allowed else None
    counts = place_counts(size_px, patch_px=patch_px)
    fitting = [before for before in allowed if n_tokens - before in counts]
    return fitting[0] if len(fitting) == 1 else None


def place_counts(size_px: Size, *, patch_px: Size | None = None) -> set[int]:
    """How many places a network may divide an image into.

    By steps of a whole number of pixels in both directions, or by halving again and again, rounded
    up, from its pixels or its patches.
    """
    y, x = size_px
    steps = (step for step in range(1, min(y, x) + 1) if y % step == x % step == 0)
    counts = {(y // step) * (x // step) for step in steps}
    for patch_y, patch_x in {patch_px or (1, 1), (1, 1)}:
        rows, columns = y // patch_y, x // patch_x
        while rows > 1 or columns > 1:
            counts.add(rows * columns)
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return counts | {1}


def pair(patch_size: Any) -> Size | None:
    """(y, x) of a patch from how a configuration has it: a number, a pair, or something else."""
    if isinstance(patch_size, int):
        return patch_size, patch_size
    if isinstance(patch_size, list | tuple) and len(patch_size) == 2:
        return int(patch_size[0]), int(patch_size[1])
    return None
