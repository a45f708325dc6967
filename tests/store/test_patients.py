"""Patients as the catalogue or the labels have them: no split may tear one that either has."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from ctfm.store.patients import patient_groups

IDS = st.sampled_from("abcd")


def linked(one: tuple[str, str], other: tuple[str, str]) -> bool:
    return not {*one, ""}.isdisjoint({*other} - {""})


def reached(pairs: list[tuple[str, str]], start: int) -> set[int]:
    """Scans that a chain of links joins to one, found by going on until nothing is new."""
    found = {start}
    while new := {
        j
        for i, j in product(found, range(len(pairs)))
        if j not in found and linked(pairs[i], pairs[j])
    }:
        found |= new
    return found


@given(st.lists(st.tuples(IDS, st.sampled_from(["", *"abcd"])), max_size=12))
def test_scans_are_of_one_patient_exactly_if_linked_on_either_side(
    pairs: list[tuple[str, str]],
) -> None:
    groups = patient_groups([own for own, _ in pairs], [said for _, said in pairs]).tolist()
    for i, group in enumerate(groups):
        assert {j for j, other in enumerate(groups) if other == group} == reached(pairs, i)


def test_the_patient_of_a_label_is_that_of_the_catalogue_of_the_same_id() -> None:
    assert len(set(patient_groups(["a", "b", "c"], ["b", "", ""]).tolist())) == 2
