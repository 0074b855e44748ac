"""FID while training: samples of the averaged weights against a reference that is loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import load_reference, score_images, share
from diffit.training.config import EvaluationConfig
from diffit.training.samples import TrainingSampler


class Scorer:
    """Scores a network against the same reference, with the same noise and labels, again and again.

    Args:
        config: reference, features and the number of samples.
        sampler: draws the samples.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or features cannot be had.
    """

    def __init__(self, config: EvaluationConfig, sampler: TrainingSampler) -> None:
        self.config, self.sampler = config, sampler
        self.backend = create_backend("torch", features=config.features, device=sampler.device)
        self.reference = load_reference(config.reference or "", self.backend, manifold=False)

    def score(self, model: nn.Module) -> dict[str, float]:
        """FID and Inception Score of `samples` samples; every process draws its share and gets the scores of all."""
        scores = score_images(self._batches(model), self.reference, self.backend, manifold=False)
        return {"fid": scores.fid, "inception_score": scores.inception_score}

    def _batches(self, model: nn.Module) -> Iterator[NDArray[np.uint8]]:
        """This process's samples, uint8 [B, H, W, C]."""
        start, stop = share(self.config.samples)
        for first in range(start, stop, self.config.batch_size):
            images = self.sampler.draw(model, range(first, min(first + self.config.batch_size, stop)))
            yield images.cpu().numpy()
