"""
Results of a diagnosis: the numbers of each item, and the limits beyond which an embedding is flagged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sb3_mrq.diagnostics import measures

# Limits beyond which an embedding is flagged.
# Constant: root mean squared deviation divided by root mean square, at most
CONSTANT = 0.01
# One-dimensional: effective rank, below
LOW_RANK = 2.0
# Largely dormant: fraction of dormant units, above
DORMANT_SHARE = 0.25
# Vanishing or exploding: norm divided by sqrt(Z), outside
UNIT_NORM = (1e-3, 1e2)
# Returns in which a bootstrapped value has more than this weight are not compared with predictions
TAIL_WEIGHT = 0.7


@dataclass(frozen=True)
class ModelAccuracy:
    """
    Accuracy of the linear model, unrolled along the actions taken, for 1 to H steps ahead, (H,) each. R^2 is NaN if the target
    does not vary.

    :param reward_r2: R^2 of the expected reward
    :param reward_rmse: root mean squared error of the expected reward, in units of the training rewards
    :param termination_r2: R^2 of the predicted termination
    :param termination_rmse: root mean squared error of the predicted termination; its target is 0 or 1
    :param embedding_r2: R^2 of the next embedding, with the target encoder's embedding as target, over all dimensions
    :param embedding_r2_unchanged: R^2 of predicting no change of the embedding
    :param information: lower bound on the mutual information of predicted and next embedding, in nats, from InfoNCE in random
        batches of up to 256 (at most 5.5)
    :param n: number of predictions
    :param n_terminated: number of terminations among the targets
    """

    reward_r2: np.ndarray
    reward_rmse: np.ndarray
    termination_r2: np.ndarray
    termination_rmse: np.ndarray
    embedding_r2: np.ndarray
    embedding_r2_unchanged: np.ndarray
    information: np.ndarray
    n: np.ndarray
    n_terminated: np.ndarray


@dataclass(frozen=True)
class LinearProbe:
    """
    Linear probe of Q, evaluated on held-out segments of episodes.

    :param q: mean of the value heads, in units of the training rewards, (N,)
    :param z_sa_r2: R^2 of a linear function of z_sa
    :param z_sa_prediction: its held-out predictions, (N,)
    :param raw_r2: R^2 of a linear function of observation and action
    :param raw_prediction: its held-out predictions, (N,)
    """

    q: np.ndarray
    z_sa_r2: float
    z_sa_prediction: np.ndarray
    raw_r2: float
    raw_prediction: np.ndarray


@dataclass(frozen=True)
class EmbeddingHealth:
    """
    Indicators of a collapsed embedding.

    :param name: z_s or z_sa
    :param norms: Euclidean norm of each embedding, (N,)
    :param variation: root mean squared deviation from the mean embedding, divided by the root mean square
    :param spectrum: singular values of the centred embeddings as fractions of their sum, descending
    :param effective_rank: exponential of the entropy of the spectrum, 0 if nothing varies
    :param unit_deviations: standard deviation of each unit relative to the mean one, (Z,)
    :param dormant_share: fraction of units whose deviation is at most ``measures.DORMANT``
    """

    name: str
    norms: np.ndarray
    variation: float
    spectrum: np.ndarray
    effective_rank: float
    unit_deviations: np.ndarray
    dormant_share: float

    @property
    def dim(self) -> int:
        """Number of units."""
        return len(self.unit_deviations)

    @property
    def flags(self) -> list[str]:
        """A sentence for each exceeded limit."""
        flags = []
        if self.variation <= CONSTANT:
            flags.append(
                f"{self.name} is constant: it varies by {self.variation:.2g} of its size (limit {CONSTANT:g}), so it hardly "
                "distinguishes states."
            )
        elif self.effective_rank < LOW_RANK:
            flags.append(
                f"{self.name} varies along one direction: effective rank {self.effective_rank:.2f} (limit {LOW_RANK:g})."
            )
        if self.dormant_share > DORMANT_SHARE:
            flags.append(f"{self.name} has {self.dormant_share:.0%} dormant units (limit {DORMANT_SHARE:.0%}).")
        unit_norm = float(self.norms.mean()) / math.sqrt(self.dim)
        if not UNIT_NORM[0] <= unit_norm <= UNIT_NORM[1]:
            what = "vanishes" if unit_norm < UNIT_NORM[0] else "explodes"
            flags.append(
                f"{self.name} {what}: its norm is {unit_norm:.2g} per square root of a unit (limits {UNIT_NORM[0]:g} and "
                f"{UNIT_NORM[1]:g})."
            )
        return flags


@dataclass(frozen=True)
class EmbeddingMap:
    """
    State embeddings in the plane of their first two principal components.

    :param points: projected embeddings of all observations, in order of time, (M, 2)
    :param values: value of the policy's action in each state, in units of the training rewards, (M,)
    :param episode: slice of the episode of median return
    :param variance_shares: fractions of the variance that the two components explain, (2,)
    """

    points: np.ndarray
    values: np.ndarray
    episode: slice
    variance_shares: np.ndarray


@dataclass(frozen=True)
class ReturnComparison:
    """
    Predicted and realised discounted return of every step, in units of the training rewards, (N,) each.

    :param predicted: mean of the value heads times the reward scale
    :param realised: discounted return, bootstrapped from the predicted value of the last observation if the episode was
        truncated
    :param tail_weight: weight of the bootstrapped value, 0 in terminated episodes
    :param episode: slice of the episode of median return
    """

    predicted: np.ndarray
    realised: np.ndarray
    tail_weight: np.ndarray
    episode: slice

    @property
    def counted(self) -> np.ndarray:
        """Mask of the steps that count: the weight of the bootstrapped value is at most ``TAIL_WEIGHT``, (N,)."""
        return self.tail_weight <= TAIL_WEIGHT

    @property
    def bias(self) -> float:
        """Mean of predicted minus realised return, positive for overestimation."""
        errors = (self.predicted - self.realised)[self.counted]
        return float(errors.mean()) if len(errors) else float("nan")

    @property
    def rmse(self) -> float:
        """Root mean squared difference."""
        errors = (self.predicted - self.realised)[self.counted]
        return float(np.sqrt(np.square(errors).mean())) if len(errors) else float("nan")

    @property
    def r2(self) -> float:
        """Fraction of the variance of the realised returns that the predictions explain."""
        return measures.explained_variance(self.realised[self.counted], self.predicted[self.counted])

    @property
    def correlation(self) -> float:
        """Correlation of predicted and realised returns, NaN if one of them does not vary."""
        pairs = np.stack([self.predicted[self.counted], self.realised[self.counted]])
        if pairs.shape[1] < 2 or np.any(pairs.std(axis=1) <= 1e-6 * np.abs(pairs).max(axis=1)):
            return float("nan")
        return float(np.corrcoef(pairs)[0, 1])
