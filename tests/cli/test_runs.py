"""What the commands on runs print of results that are known."""

import numpy as np
import pytest

from ctfm.cli.runs import print_prediction
from ctfm.heads.predict import ScanPrediction


def prediction() -> ScanPrediction:
    """Two slices, 42 and 46 mm below the vertex, that speak for `air` and for `mass`."""
    return ScanPrediction(
        findings=("mass", "atrophy", "air"),
        logits=np.array([-1.0, 3.0, 1.0], np.float32),
        probabilities=np.array([0.269, 0.953, 0.731], np.float32),
        position_mm=np.array([-42.0, -46.0], np.float32),
        attention=np.array([0.75, 0.25], np.float32),
        contributions=np.array([[0.1, 0.3, 0.5], [0.2, 0.1, 0.4]], np.float32),
        untaught={"atrophy": "no positive in train"},
    )


def test_a_finding_that_train_never_taught_gets_no_probability(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_prediction(prediction(), title="scan", slices=1)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[-1] == "atrophy not taught: no positive in train"
    assert len(lines) == 3


def test_the_slices_that_add_most_are_named_with_their_attention(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_prediction(prediction(), title="scan", slices=2)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[:2] == ["air 0.731 42 (75%), 46 (25%)", "mass 0.269 46 (25%), 42 (75%)"]
