"""What `fit-head` says about its labels before it fits."""

import pytest

from ctfm.cli.fit import note_near_names


def test_a_finding_that_is_almost_one_of_the_taxonomy_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note_near_names(["intraparenchymal_hemorhage", "midline_shift", "our_own_finding"])
    (note,) = capsys.readouterr().err.splitlines()
    assert note.endswith("hemorhage: did you mean intraparenchymal_hemorrhage?")
