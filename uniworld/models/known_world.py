"""Whether a picture is of the world that a small model was trained on.

It is where the mean of its semantic states lies near those of the training pictures, by the Mahalanobis distance.
Source: Lee et al., 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples", section 2.1.

Letters: N pictures, T tokens a picture, D width of a state.
"""

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KNOWN_WORLD_FILE = "known_world.safetensors"  # beside the weights of the semantic encoder
RIDGE = 1e-3  # of the mean variance, added to each: states may lie in fewer dimensions than they have
LIMIT_QUANTILE, LIMIT_FACTOR = 0.99, 1.2


class KnownWorld:
    """Mean [D] and precision [D, D] of pictures' mean states, and the distance from which on a picture is strange."""

    def __init__(self, mean: Tensor, precision: Tensor, limit: float):
        self.mean, self.precision, self.limit = mean, precision, limit

    @classmethod
    def of(cls, states: Tensor, others: Tensor) -> "KnownWorld":
        """From the states [N, T, D] of training pictures; the limit is 1.2 times the 99th percentile of `others`."""
        means = states.float().mean(1)
        mean = means.mean(0)
        covariance = (means - mean).T @ (means - mean) / len(means)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(mean))
        world = cls(mean, torch.linalg.inv(covariance).contiguous(), limit=0.0)
        world.limit = LIMIT_FACTOR * float(world.distances(others).quantile(LIMIT_QUANTILE))
        return world

    @classmethod
    def load(cls, folder: Path) -> "KnownWorld | None":
        """From the folder of the semantic encoder; None where it says nothing of a world, as published ones."""
        path = folder / KNOWN_WORLD_FILE
        if not path.is_file():
            return None
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["precision"], float(tensors["limit"]))

    def save(self, folder: Path) -> None:
        tensors = {"mean": self.mean, "precision": self.precision, "limit": torch.tensor(self.limit)}
        save_file(tensors, folder / KNOWN_WORLD_FILE)

    def distances(self, states: Tensor) -> Tensor:
        """[N, T, D] -> [N] on the CPU."""
        apart = states.float().cpu().mean(1) - self.mean
        return ((apart @ self.precision) * apart).sum(1).clamp(min=0).sqrt()

    def warn_of_strangers(self, states: Tensor, model: str) -> None:
        """A UserWarning for every picture that is not of this world, numbered from 1."""
        for number, distance in enumerate(self.distances(states).tolist(), 1):
            if distance > self.limit:
                warnings.warn(
                    f"picture {number}: is not like the scenes that {model} was trained on (distance {distance:.0f}, "
                    f"known ones up to {self.limit:.0f}); {model} knows only its own world, so expect little",
                    stacklevel=1,
                )
