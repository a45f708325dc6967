"""The scikit-learn estimator: arrays of embeddings and labels, to a fitted head.

    MoLREClassifier().fit(X, y)                          X (n, d): a scan is one row
    MoLREClassifier(input="slices").fit(X, y)            X (n, s, d), or a list of (s_i, d) arrays

y holds one label a scan (two classes), or 0/1 for each of several findings (n, c). The estimator
does what a fit on a store does, without a store: the same heads, losses and optimiser. It has no
validation split and so no early stopping: choose `max_epochs` by a search, as any other parameter.

Axes: n scans, s slices, d embedding, c findings.
"""

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data

from ctfm.heads.batches import PackedScans
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.heads.learner import new_learner
from ctfm.heads.losses import prevalence
from ctfm.heads.outputs import group_outputs, head_groups

PREDICT_SCANS = 1024
"""Scans of a batch where nothing is learnt."""


class MoLREClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A MoLRE head as a scikit-learn classifier, for two classes or several findings at once.

    Parameters are those of `FitConfig` that are not about stores, splits or stopping, with its
    defaults, and these. `fit` checks them, as scikit-learn wants it, so they have no types here:

    Args:
        input: `row`, X is (n, d) and a scan is one row; `slices`, X is (n, s, d) or a list of
            (s_i, d) arrays, and the pool weighs the slices of a scan.
        max_epochs: Passes over the scans.
        random_state: Of the first parameters and the order of scans.
        device: Where it computes.

    Attributes:
        classes_: The two classes, or the numbers of the findings.
        head_: The fitted `Head`.
        n_features_in_: d.
    """

    def __init__(
        self,
        *,
        input: Any = "row",
        adapter: Any = FitConfig.adapter,
        experts: Any = FitConfig.experts,
        rank: Any = FitConfig.rank,
        router_hidden: Any = FitConfig.router_hidden,
        expert_bias: Any = FitConfig.expert_bias,
        top_k: Any = FitConfig.top_k,
        router_temperature: Any = FitConfig.router_temperature,
        router_noise: Any = FitConfig.router_noise,
        load_balance: Any = FitConfig.load_balance,
        router_z: Any = FitConfig.router_z,
        router_entropy: Any = FitConfig.router_entropy,
        pool: Any = FitConfig.pool,
        pool_heads: Any = FitConfig.pool_heads,
        pool_hidden: Any = FitConfig.pool_hidden,
        loss: Any = FitConfig.loss,
        gamma: Any = FitConfig.gamma,
        gamma_positive: Any = FitConfig.gamma_positive,
        gamma_negative: Any = FitConfig.gamma_negative,
        margin: Any = FitConfig.margin,
        alpha: Any = FitConfig.alpha,
        lr_head: Any = FitConfig.lr_head,
        lr_molre: Any = FitConfig.lr_molre,
        weight_decay: Any = FitConfig.weight_decay,
        schedule: Any = FitConfig.schedule,
        warmup_epochs: Any = FitConfig.warmup_epochs,
        ema: Any = FitConfig.ema,
        clip_norm: Any = FitConfig.clip_norm,
        batch_size: Any = FitConfig.batch_size,
        max_epochs: Any = FitConfig.max_epochs,
        random_state: Any = None,
        device: Any = "cpu",
    ) -> None:
        self.input = input
        self.adapter = adapter
        self.experts = experts
        self.rank = rank
        self.router_hidden = router_hidden
        self.expert_bias = expert_bias
        self.top_k = top_k
        self.router_temperature = router_temperature
        self.router_noise = router_noise
        self.load_balance = load_balance
        self.router_z = router_z
        self.router_entropy = router_entropy
        self.pool = pool
        self.pool_heads = pool_heads
        self.pool_hidden = pool_hidden
        self.loss = loss
        self.gamma = gamma
        self.gamma_positive = gamma_positive
        self.gamma_negative = gamma_negative
        self.margin = margin
        self.alpha = alpha
        self.lr_head = lr_head
        self.lr_molre = lr_molre
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.ema = ema
        self.clip_norm = clip_norm
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> "MoLREClassifier":
        """Fit the head.

        Args:
            X: Embeddings; see `input`.
            y: Labels of two classes (n,), or 1, 0 or NaN (unknown) of several findings (n, c).

        Raises:
            ValueError: If X or y cannot be used, or y has not two classes.
        """
        scans = self._scans(X, reset=True)
        targets = self._targets(y, n_scans=len(scans))
        random = check_random_state(self.random_state)
        config = self._config(seed=int(random.randint(2**31 - 1)))
        device, labels = torch.device(self.device), torch.from_numpy(targets)
        learner = new_learner(
            config,
            dims=[scans.dim],
            prevalence=prevalence(labels),
            known=(~labels.isnan()).sum(0),
            device=device,
        )
        labels, groups = labels.to(device), head_groups([learner.branches])
        for epoch in range(1, config.max_epochs + 1):
            learner.begin_epoch(epoch)
            order = torch.from_numpy(random.permutation(len(scans)))
            done = 0
            for chosen in torch.split(order, config.batch_size):
                batch = scans.batch(chosen, device=device)
                (outputs,) = group_outputs(groups, [batch], noise=[learner.noise([batch])])
                loss = learner.loss(outputs, labels[chosen.to(device)], batches=[batch])
                torch.autograd.backward(loss)
                done += len(chosen)
                learner.step(epochs_done=epoch - 1 + done / len(scans))
        self.head_: Head = learner.judged[0].eval()
        self.n_iter_ = config.max_epochs
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits: (n,) for two classes, (n, c) for several findings."""
        check_is_fitted(self)
        scans, device = self._scans(X, reset=False), torch.device(self.device)
        logits = []
        with torch.inference_mode():
            for chosen in torch.split(torch.arange(len(scans)), PREDICT_SCANS):
                batch = scans.batch(chosen, device=device)
                logits.append(self.head_.of_rows(batch.x, batch.layout).logits.cpu())
        found: np.ndarray = torch.cat(logits).numpy()
        return found if self._multilabel else found[:, 0]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, not calibrated: (n, 2) for two classes, (n, c) for several findings."""
        positive = 1 / (1 + np.exp(-self.decision_function(X).astype(np.float64)))
        return positive if self._multilabel else np.stack([1 - positive, positive], axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The more probable class of each scan, or 0 and 1 for each finding."""
        positive = self.decision_function(X) > 0
        if self._multilabel:
            return positive.astype(np.int64)
        classes: np.ndarray = self.classes_[positive.astype(np.int64)]
        return classes

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        tags.input_tags.three_d_array = self.input == "slices"
        return tags

    def _config(self, *, seed: int) -> FitConfig:
        parameters = self.get_params()
        for name in ("input", "random_state", "device"):
            del parameters[name]
        return FitConfig.from_dict({**parameters, "min_epochs": 1, "seed": seed})

    def _scans(self, X: Any, *, reset: bool) -> PackedScans:
        if self.input == "row":
            checked = validate_data(self, X, dtype=np.float32, reset=reset)
            rows = torch.from_numpy(np.ascontiguousarray(checked))
            return PackedScans(rows=rows, offsets=torch.arange(len(rows) + 1))
        return self._slices(X, reset=reset)

    def _slices(self, X: Any, *, reset: bool) -> PackedScans:
        """Slices of scans, packed."""
        each = [check_array(scan, dtype=np.float32) for scan in X]
        widths = {scan.shape[1] for scan in each}
        if len(widths) != 1:
            raise ValueError(f"slices must have as many numbers in all scans, got {sorted(widths)}")
        (width,) = widths
        if reset:
            self.n_features_in_ = width
        elif width != self.n_features_in_:
            raise ValueError(
                f"X has {width} features, but MoLREClassifier is expecting {self.n_features_in_} "
                "features as input"
            )
        counts = torch.tensor([0, *(len(scan) for scan in each)])
        return PackedScans(rows=torch.from_numpy(np.concatenate(each)), offsets=counts.cumsum(0))

    def _targets(self, y: Any, *, n_scans: int) -> np.ndarray:
        """0, 1 or NaN for each scan and finding."""
        if y is None:
            raise ValueError("MoLREClassifier requires y to be passed, but the target y is None")
        values = np.asarray(y)
        if len(values) != n_scans:
            raise ValueError(f"X has {n_scans} scans and y {len(values)}: inconsistent lengths")
        self._multilabel = values.ndim == 2 and values.shape[1] > 1
        if self._multilabel:
            numbers = values.astype(np.float32)
            if not np.isin(numbers[~np.isnan(numbers)], (0, 1)).all():
                raise ValueError("y of several findings holds 1, 0 or NaN, got other values")
            self.classes_ = np.arange(values.shape[1])
            return numbers
        column = column_or_1d(values, warn=True)
        check_classification_targets(column)
        self.classes_ = unique_labels(column)
        if len(self.classes_) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass: "
                f"got {len(self.classes_)} classes"
            )
        if len(self.classes_) < 2:
            raise ValueError(
                f"y must have two classes, got {len(self.classes_)} class: {self.classes_}"
            )
        targets: np.ndarray = (column == self.classes_[1]).astype(np.float32)[:, None]
        return targets
