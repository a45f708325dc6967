"""Claim: the validation AUC of 75 findings over 7,291 scans takes at most 20 ms.

That is the validation split of the paper, at prevalences between those of its rarest and its
commonest finding; one label in twenty is unknown. Beside it the average precision, which every
epoch has too, and scikit-learn, finding after finding. The two agree, which is checked first.
"""

import numpy as np
from measure import main_with_out, median_seconds
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ctfm.heads.metrics import auc_per_finding, average_precision_per_finding

SCANS, FINDINGS, UNKNOWN, REPEATS = 7291, 75, 0.05, 21
RAREST, COMMONEST = 0.00079, 0.296

Matrix = NDArray[np.float32]


def cohort() -> tuple[Matrix, Matrix]:
    """Labels, and scores that know a little of them."""
    random = np.random.default_rng(0)
    labels = (random.random((SCANS, FINDINGS)) < np.geomspace(RAREST, COMMONEST, FINDINGS)) * 1.0
    scores = random.standard_normal((SCANS, FINDINGS)) + 1.5 * labels
    labels[random.random((SCANS, FINDINGS)) < UNKNOWN] = np.nan
    return labels.astype(np.float32), scores.astype(np.float32)


def sklearn_auc(labels: Matrix, scores: Matrix) -> list[float]:
    """The AUCs as scikit-learn gives them."""
    found = []
    for label, score in zip(labels.T, scores.T, strict=True):
        known = ~np.isnan(label)
        found.append(float(roc_auc_score(label[known], score[known])))
    return found


def measure() -> dict[str, object]:
    """Seconds of each, and how often ours fits into scikit-learn's."""
    labels, scores = cohort()
    np.testing.assert_allclose(
        auc_per_finding(labels, scores), sklearn_auc(labels, scores), rtol=0, atol=1e-12
    )
    seconds = median_seconds(
        {
            "auc": lambda: auc_per_finding(labels, scores),
            "average_precision": lambda: average_precision_per_finding(labels, scores),
            "sklearn_auc": lambda: sklearn_auc(labels, scores),
        },
        repeats=REPEATS,
    )
    median = {name: times.median for name, times in seconds.items()}
    took = ", ".join(f"{name} {1000 * time:.1f} ms" for name, time in median.items())
    return {
        "claim": f"scikit-learn's loop / validation AUC ({took})",
        "ratio": median["sklearn_auc"] / median["auc"],
        "shape": {"scans": SCANS, "findings": FINDINGS, "unknown": UNKNOWN},
        "seconds": seconds,
    }


if __name__ == "__main__":
    main_with_out(measure)
