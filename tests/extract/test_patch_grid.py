"""Which tokens are patches, from sizes alone."""

import pytest

from ctfm.extract.patch_grid import pair, place_counts, tokens_before_patches


@pytest.mark.parametrize(
    ("n_tokens", "size_px", "patch_px", "before"),
    [
        (1 + 5 * 6, (40, 48), (8, 8), 1),
        (1 + 4 * 8, (32, 64), (8, 8), 1),
        (4 * 8, (32, 64), (8, 8), 0),
        (1 + 4 + 2 * 2, (28, 28), (14, 14), 5),  # nine, a square
        (2 + 14 * 14, (224, 224), (16, 16), 2),
        (1 + 3 * 12, (48, 96), (16, 8), 1),
        (1 + 18 * 18, (256, 256), (14, 14), 1),  # a convolution leaves the rest of 4 pixels out
    ],
)
def test_before_the_patches_are_those_that_there_are_too_many(
    n_tokens: int, size_px: tuple[int, int], patch_px: tuple[int, int], before: int
) -> None:
    found = tokens_before_patches(n_tokens, size_px, patch_px=patch_px, special={1, 2, 5})
    assert found == before


@pytest.mark.parametrize(
    ("n_tokens", "size_px", "before"),
    [
        (7 * 7, (224, 224), 0),
        (1 + 7 * 7, (224, 224), 1),
        (4 * 2, (100, 40), 0),  # of 25 × 10 patches, halved three times and rounded up
        (1 + 16 * 16, (16, 16), 1),
    ],
)
def test_of_patches_that_were_merged_or_are_of_no_known_size_there_may_be_fewer(
    n_tokens: int, size_px: tuple[int, int], before: int
) -> None:
    patch_px = (4, 4) if n_tokens < 60 else None
    assert tokens_before_patches(n_tokens, size_px, patch_px=patch_px, special={1}) == before


@pytest.mark.parametrize(
    ("n_tokens", "size_px", "patch_px"),
    [
        (1 + 32 * 54 + 100, (512, 864), (16, 16)),  # YOLOS has 100 more, at the end
        (8, (224, 224), (16, 16)),  # GroupViT has groups and no places
        (100, (224, 224), None),  # DETR has queries
    ],
)
def test_other_numbers_cannot_be_told(
    n_tokens: int, size_px: tuple[int, int], patch_px: tuple[int, int] | None
) -> None:
    assert tokens_before_patches(n_tokens, size_px, patch_px=patch_px, special={1}) is None


def test_two_ways_to_divide_an_image_are_not_guessed_between() -> None:
    counts = place_counts((2, 1))
    assert counts == {1, 2}
    assert tokens_before_patches(2, (2, 1), patch_px=None, special={1}) is None


def test_a_patch_is_a_number_or_a_pair() -> None:
    assert pair(16) == (16, 16)
    assert pair([16, 8]) == (16, 8)
    assert pair(None) is None
    assert pair([4, 2, 2, 2]) is None
