"""Data of a fit: feature stores, labels and a config, to the batches that heads see.

Heads whose configs agree in their data settings see the same batches in the same order, and can be
fitted side by side.

Axes: n scans of a cohort, b scans of a batch, c findings.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctfm.heads.batches import Batch
from ctfm.heads.cohort import Labels, gather_cohort, selecting_findings, store_records
from ctfm.heads.config import FitConfig
from ctfm.heads.learner import Learner, new_learner
from ctfm.heads.losses import prevalence
from ctfm.heads.sampling import automatic_threshold, epoch_windows, repeat_factors
from ctfm.heads.streams import Branch, Stream
from ctfm.store.errors import ConfigError
from ctfm.store.features import FeatureStore
from ctfm.store.provenance import digest

PREDICT_SCANS = 128
"""Scans of a batch where nothing is learnt."""


class FitData:
    """What heads of one group see: scans, labels, splits and embeddings.

    Args:
        stores: Finished feature stores.
        labels: See `fit_head`.
        config: Its `data_settings` are those of every head that is fitted on the data.
        device: Where heads compute; None is the GPU if there is one, else the CPU.
        memory_bytes: What the embeddings may use; None is a share of what is free.
    """

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        labels: Labels,
        config: FitConfig,
        *,
        device: torch.device | str | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self.device = _device(device)
        self.stores, self.config = tuple(stores), config
        self.cohort = gather_cohort(stores, labels, config)
        self.branches = _branches(stores, config)
        self.views = self.cohort.views if config.views == "random" else 1
        self.stream = Stream(
            self.branches,
            self.cohort.scans["scan_id"].to_pylist(),
            views=self.views,
            precision=config.precision,
            device=self.device,
            memory_bytes=memory_bytes,
        )
        self.y = torch.from_numpy(self.cohort.y).to(self.device)
        self.train, self.validation = self.cohort.lines("train"), self.cohort.lines("validation")
        self.selecting = selecting_findings(self.cohort, min_positives=config.min_positives)
        labelled = self.cohort.y[self.train]
        self.threshold = (
            automatic_threshold(labelled)
            if config.repeat_threshold == "auto"
            else config.repeat_threshold
        )
        self.factors = repeat_factors(labelled, threshold=self.threshold)
        self.prevalence = prevalence(torch.from_numpy(labelled))
        self.known = (~torch.from_numpy(labelled).isnan()).sum(0)

    def identity(self, config: FitConfig) -> str:
        """Digest of all that decides the head of a config on these data."""
        return digest(
            {
                "fit": config.as_dict(),
                "stores": store_records(self.stores, self.cohort.scans),
                "labels": self.cohort.labels.digest,
                "scans": self.cohort.scans.select(["scan_id", "split"]).to_pydict(),
                # Scans are shuffled inside a window only.
                "window_bytes": self.stream.window_bytes,
            }
        )

    def epoch(self, epoch: int) -> Iterator[tuple[tuple[Batch, ...], Float[Tensor, "b c"], float]]:
        """The batches of an epoch: rows, labels, and the share of the epoch that is then done."""
        seed = self.config.order_seed
        random = np.random.default_rng([seed, epoch, 1])
        windows = self.stream.windows(self.train, seed=(seed, epoch))
        places = [np.searchsorted(self.train, window) for window in windows]
        orders = list(epoch_windows(self.factors, windows=places, seed=seed, epoch=epoch))
        visits, done = sum(len(order) for _, order in orders), 0
        opened = self.stream.open([windows[number] for number, _ in orders])
        for (_, order), window in zip(orders, opened, strict=True):
            for first in range(0, len(order), self.config.batch_size):
                chosen = self.train[order[first : first + self.config.batch_size]]
                view = random.integers(self.views, size=len(chosen))
                done += len(chosen)
                batches = window.batches(chosen, view=view, device=self.device)
                yield batches, self.y[torch.from_numpy(chosen).to(self.device)], done / visits

    def in_order(
        self, lines: Int64[np.ndarray, " n"]
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], tuple[Batch, ...]]]:
        """View 0 of scans, a batch after another, with the indices of its scans."""
        windows = self.stream.windows(lines)
        for inside, window in zip(windows, self.stream.open(windows), strict=True):
            for first in range(0, len(inside), PREDICT_SCANS):
                chosen = inside[first : first + PREDICT_SCANS]
                yield chosen, window.batches(chosen, view=np.zeros_like(chosen), device=self.device)

    def learner(self, config: FitConfig) -> Learner:
        """A head that has learnt nothing yet.

        Raises:
            ConfigError: If it would see other data than these.
        """
        if config.data_settings() != self.config.data_settings():
            raise ConfigError(
                "heads that are fitted side by side must agree on their data settings "
                f"({', '.join(self.config.data_settings())})"
            )
        return new_learner(
            config,
            dims=[branch.dim for branch in self.branches],
            prevalence=self.prevalence,
            known=self.known,
            device=self.device,
        )


def _branches(stores: Sequence[FeatureStore], config: FitConfig) -> tuple[Branch, ...]:
    """One branch for all stores, or one for each."""
    joined = [tuple(stores)] if config.join == "slices" else [(store,) for store in stores]
    return tuple(Branch(stores=one, token=config.token) for one in joined)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
