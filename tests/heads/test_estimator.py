"""The estimator keeps scikit-learn's contract, and is the head that a fit on a store gives."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ctfm.heads.config import FitConfig
from ctfm.heads.estimator import MoLREClassifier

N, S, D = 60, 4, 5


def quick(**settings: Any) -> MoLREClassifier:
    given = {"experts": 2, "rank": 1, "router_hidden": 3, "max_epochs": 40, "random_state": 0}
    return MoLREClassifier(**{**given, "lr_head": 0.01, **settings})


def slices() -> tuple[list[np.ndarray], np.ndarray]:
    """Ragged scans in which one bright number in one slice makes a scan positive."""
    random = np.random.default_rng(0)
    y = (random.random((N, 2)) < 0.5).astype(float)
    scans = []
    for labels in y:
        scan = random.normal(size=(random.integers(1, S + 1), D)).astype(np.float32)
        for c in np.flatnonzero(labels):
            scan[random.integers(len(scan)), c] += 8
        scans.append(scan)
    return scans, y


@parametrize_with_checks([quick()])  # type: ignore[untyped-decorator]
@pytest.mark.filterwarnings("ignore")
def test_passes_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def test_learns_from_ragged_slices_several_findings_and_unknown_labels() -> None:
    scans, y = slices()
    partly = y.copy()
    partly[::7, 0] = np.nan
    model = quick(input="slices", pool="max").fit(scans, partly)
    assert (model.predict(scans) == y).mean() > 0.9
    assert model.predict_proba(scans).shape == (N, 2)


def test_has_every_setting_of_a_head_and_its_optimiser() -> None:
    about_data = {
        "token", "findings", "join", "split_fractions", "split_salt", "split_method", "folds",
        "fold", "views", "repeat_threshold", "min_positives", "min_epochs", "patience", "precision",
        "seed", "order_seed",
    }  # fmt: skip
    given = set(MoLREClassifier().get_params()) - {"input", "random_state", "device"}
    assert given == {field.name for field in fields(FitConfig)} - about_data


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1, "router_noise": 0.3, "load_balance": 0.1},
        {"pool": "gated", "pool_hidden": 4, "ema": 0.8},
        {"schedule": "cosine", "warmup_epochs": 1, "clip_norm": 1.0},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_learns_whatever_is_set(settings: dict[str, Any]) -> None:
    scans, y = slices()
    model = quick(input="slices", **settings).fit(scans, y)
    plain = quick(input="slices", pool=settings.get("pool", "attention")).fit(scans, y)
    assert (model.predict(scans) == y).mean() > 0.75
    assert not np.allclose(model.decision_function(scans), plain.decision_function(scans))


def test_a_three_dimensional_array_is_scans_of_equal_length() -> None:
    random = np.random.default_rng(1)
    y = np.array([0, 1] * 20)
    x = random.normal(size=(40, S, D)).astype(np.float32)
    x[:, 2, 1] += 6 * y
    model = quick(input="slices").fit(x, y)
    assert (model.predict(x) == y).mean() > 0.9
    assert np.allclose(model.predict_proba(x), model.predict_proba(list(x)))


def test_works_in_a_pipeline_a_search_and_as_a_clone() -> None:
    random = np.random.default_rng(2)
    y = np.array(["absent", "present"] * 30)
    x = random.normal(size=(N, D)) + 3.0 * (y == "present")[:, None]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quick(max_epochs=10)),
        {"molreclassifier__experts": [0, 2]},
        cv=3,
        scoring="roc_auc",
    ).fit(x, y)
    assert search.best_score_ > 0.95
    assert set(search.predict(x)) == {"absent", "present"}
    assert clone(quick(pool="mean")).get_params() == quick(pool="mean").get_params()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([np.zeros((2, 3)), np.zeros((2, 4))], [0, 1], "as many numbers in all scans"),
        ([np.zeros((2, 3))] * 3, [0, 1], "X has 3 scans and y 2: inconsistent lengths"),
        ([np.zeros((2, 3))] * 2, [[0, 1], [2, 1]], "holds 1, 0 or NaN"),
    ],
)
def test_refuses_what_does_not_fit(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(input="slices").fit(x, y)
