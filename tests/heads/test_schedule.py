"""Learning-rate factors at times whose value is known."""

import pytest

from ctfm.heads.schedule import rate_factor


@pytest.mark.parametrize(
    ("done", "schedule", "warmup", "factor"),
    [
        (0.0, "constant", 0.0, 1.0),
        (7.5, "constant", 0.0, 1.0),
        (0.5, "constant", 2.0, 0.25),
        (3.0, "constant", 2.0, 1.0),
        (0.0, "cosine", 0.0, 1.0),
        (5.0, "cosine", 0.0, 0.5),
        (10.0, "cosine", 0.0, 0.0),
        (12.0, "cosine", 0.0, 0.0),
        (2.5, "cosine", 5.0, 0.5 * (1 + 2**-0.5) / 2),
    ],
)
def test_the_factor_is_that_of_the_formula(
    done: float, schedule: str, warmup: float, factor: float
) -> None:
    found = rate_factor(done, schedule=schedule, warmup_epochs=warmup, max_epochs=10)
    assert found == pytest.approx(factor, abs=1e-12)
