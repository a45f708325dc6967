"""Shares: how much of the patients train, validation and test get.

Apart from `ctfm.store.splits`, so that settings can be checked without importing numpy.
"""

import math

from ctfm.store.errors import ConfigError

FRACTIONS = (0.8, 0.1, 0.1)
"""Shares of train, validation and test."""


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Refuse shares that cannot be.

    Raises:
        ConfigError: If they are negative, do not add up to 1, or leave nothing to train.
    """
    numbers = all(isinstance(share, float | int) for share in fractions)
    usable = numbers and len(fractions) == 3 and all(0 <= share <= 1 for share in fractions)
    if not usable or fractions[0] == 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ConfigError(
            "fractions are the shares of train, validation and test, such as 0.8, 0.1, 0.1: from "
            f"0 to 1, adding up to 1, some for train; got {', '.join(map(str, fractions))}"
        )
