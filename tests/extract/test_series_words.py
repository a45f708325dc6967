"""Texts of headers are cut into words of the vocabulary, whatever joins them."""

from pathlib import Path

import pytest

from ctfm.extract.series_text import description_words, read_description
from ctfm.extract.series_words import pieces_of, vocabulary, vocabulary_words

FOLDER = Path(__file__).parents[2] / "extract" / "vocabulary"
APART = ("image_type", "head", "other_part")
"""Files that are not sought together with the others."""
MAY_MEAN_BOTH = {
    frozenset({"not", "denied"}),  # `no contrast`, `contrast: no`
    frozenset({"contrast", "with"}),  # affirms, whatever was denied before
    frozenset({"view", "localizer_view"}),
    frozenset({"enteral", "neutral"}),
    frozenset({"enteral", "after"}),  # PO is by mouth, po is after
    frozenset({"unknown", "after"}),  # NA is not available, na is after
}


def meant(text: str, meaning: str) -> list[str]:
    return [word.text for word in description_words().words(text) if meaning in word.meanings]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("HEAD_CTA_0.6", ["head", "cta", "#"]),
        ("CTAHead", ["cta", "head"]),
        ("H31s", ["h", "#", "s"]),
        ("Schädel, ŁÓDŹ", ["schadel", ",", "lodz"]),
        ("før OG efter", ["foer", "og", "efter"]),
        ("C- C-Spine -C", ["c", "-", "c", "spine", "-", "c"]),
        ("", []),
        (" ._ ", []),
    ],
)
def test_a_text_is_cut_at_separators_digits_and_changes_of_case(
    text: str, pieces: list[str]
) -> None:
    assert [piece.text for piece in pieces_of(text)] == pieces


@pytest.mark.parametrize(
    "text", ["CTA", "cta_head", "AXCTA0.6", "HeadCTA", "CTAHead", "C.T.A.", "x-CTA-y", "CTAHEAD"]
)
def test_a_word_is_found_whatever_joins_it_to_others(text: str) -> None:
    assert meant(text, "procedure") == ["CTA"]


@pytest.mark.parametrize("text", ["octave", "lactation", "Actaea", "CT A", "C T Angle", "stactam"])
def test_a_word_is_not_found_inside_others(text: str) -> None:
    assert meant(text, "procedure") == []


def test_the_longest_words_are_found() -> None:
    assert meant("virtual non contrast", "derived") == ["virtual non contrast"]
    assert meant("post fossa", "with") == []
    assert meant("3D Vol 4D 40 keV", "derived") == ["# keV"]


@pytest.mark.parametrize("text", ["\x00", "Ω" * 3, "½", "²CTA", "\udcff CTA", "+-/-+", "((", "٣"])
def test_no_text_is_too_odd(text: str) -> None:
    read_description(text)


def test_a_text_is_read_as_far_as_a_description_can_be_long() -> None:
    words = description_words().words("contrastctahead " * 400)
    assert 20 <= len(words) <= 256


def test_every_word_has_one_meaning() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.toml") if file.stem not in APART)
    words = vocabulary(*names)
    found = {**words.exact, **words.prefixes, **words.parts}
    doubtful = {word.text: word.meanings for word in found.values() if len(word.meanings) > 1}
    assert {text for text, both in doubtful.items() if both not in MAY_MEAN_BOTH} == set()


def test_no_word_is_written_twice_in_a_list() -> None:
    for file in FOLDER.glob("*.toml"):
        words = vocabulary_words(file.stem)
        assert len(words) == len(set(words)), file.name
