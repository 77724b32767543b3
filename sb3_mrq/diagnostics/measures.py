"""
What the diagnostics measure, as functions on arrays: explained variance, a held-out linear probe, the state of an embedding,
discounted returns.

Shapes: ``N`` transitions, ``D`` dimensions of an embedding or of features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A unit is dormant where its standard deviation is at most this part of the mean one (the threshold of Sokar et al.,
# "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", ICML 2023, who measure activity instead)
DORMANT = 0.025
# Strengths of the ridge regression's regularisation, relative to the variance of a feature, which is one
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Consecutive samples that are held out together
STRETCH = 20
# Of the variance of single precision numbers around their mean nothing is known below this part of their square
ROUNDING = 1e-10


def explained_variance(true: np.ndarray, predicted: np.ndarray) -> float:
    """
    R^2 against the trivial prediction, the mean: one minus the squared error over that of the mean. Several dimensions are
    added up before they are divided, so that those that hardly vary count little.

    :param true: (N,) or (N, D)
    :param predicted: same shape
    :return: 1 for a perfect prediction, 0 for one as good as the mean, negative for a worse one; NaN where nothing varies
    """
    if len(true) == 0:
        return float("nan")
    true = np.asarray(true, dtype=np.float64)
    baseline = np.square(true - true.mean(axis=0)).sum()
    if baseline <= ROUNDING * np.square(true).sum():
        return float("nan")
    return float(1 - np.square(predicted - true).sum() / baseline)


class RidgeProbe(NamedTuple):
    """
    :param r2: explained variance of the held-out predictions, NaN where it cannot be told
    :param predictions: for each sample, by a regression that has not seen its fold, (N,)
    """

    r2: float
    predictions: np.ndarray


class _Sums(NamedTuple):
    """What a ridge regression needs of its samples; sums of several folds add up."""

    n: float
    x: np.ndarray
    y: float
    xx: np.ndarray
    xy: np.ndarray


def _solve(sums: _Sums, ridges: Sequence[float]) -> list[tuple[np.ndarray, float]]:
    """
    :param sums: of the samples to fit
    :param ridges: strengths of the regularisation
    :return: weights (D,) and intercept for each
    """
    mean_x, mean_y = sums.x / sums.n, sums.y / sums.n
    values, vectors = np.linalg.eigh(sums.xx / sums.n - np.outer(mean_x, mean_x))
    projected = vectors.T @ (sums.xy / sums.n - mean_x * mean_y)
    solutions = []
    for ridge in ridges:
        weights = vectors @ (projected / (np.clip(values, 0, None) + ridge))
        solutions.append((weights, float(mean_y - mean_x @ weights)))
    return solutions


def _standardize(features: np.ndarray) -> np.ndarray:
    """
    :param features: (N, D)
    :return: the same with mean 0 and variance 1, zeros where nothing varies; where there are more features than samples,
        rotated to as many, which is all the same to a ridge regression
    """
    scale = np.square(features).mean(axis=0)
    # Products of numbers far from zero would lose digits
    features = features - features.mean(axis=0)
    variance = np.square(features).mean(axis=0)
    features /= np.sqrt(np.where(variance <= ROUNDING * scale, np.inf, variance))
    if features.shape[1] > features.shape[0]:
        u, s, _ = np.linalg.svd(features, full_matrices=False)
        return u * s
    return features


def folds(episodes: np.ndarray, n_folds: int = 5) -> np.ndarray:
    """
    Folds for cross-validation: stretches of ``STRETCH`` consecutive samples of an episode (fewer where there are not enough),
    dealt out at random. Neighbours in time are nearly the same, so single samples would not be held out from what is like
    them; whole episodes may have been nowhere near each other, and what a function is beyond its data is not asked for.

    :param episodes: ascending number of the episode of each sample, (N,)
    :param n_folds: number of folds
    :return: number of the fold of each sample, (N,)
    """
    n = len(episodes)
    length = max(1, min(STRETCH, n // (5 * n_folds)))
    first = np.flatnonzero(np.diff(episodes, prepend=-1))
    step = np.arange(n) - np.repeat(first, np.diff(np.append(first, n)))
    stretch = np.cumsum(step % length == 0) - 1
    n_stretches = int(stretch[-1]) + 1 if n else 0
    order = np.random.default_rng(0).permutation(n_stretches)
    return (order % n_folds)[stretch]


def ridge_probe(features: np.ndarray, targets: np.ndarray, episodes: np.ndarray, n_folds: int = 5) -> RidgeProbe:
    """
    How much of the targets a linear function of the features explains on samples that it was not fitted to: ridge regression
    on standardised features, cross-validated. For each fold, the strength of the regularisation is the one that is best on
    another fold after a fit without both.

    :param features: (N, D)
    :param targets: (N,)
    :param episodes: ascending number of the episode of each sample, (N,)
    :param n_folds: number of folds, at least three
    :return: explained variance and predictions on held-out samples
    """
    features, targets = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if len(targets) < 2 * n_folds:
        return RidgeProbe(float("nan"), np.full(len(targets), np.nan))
    features = _standardize(features)
    offset = targets.mean()
    fold = folds(episodes, n_folds)
    parts = []
    for k in range(n_folds):
        x, y = features[fold == k], targets[fold == k] - offset
        parts.append(_Sums(float(len(x)), x.sum(0), float(y.sum()), x.T @ x, x.T @ y))

    def without(*left_out: int) -> _Sums:
        kept = [part for k, part in enumerate(parts) if k not in left_out]
        return _Sums(*(sum(column) for column in zip(*kept, strict=True)))  # type: ignore[arg-type]

    predictions = np.empty(len(targets))
    for k in range(n_folds):
        validation = (k + 1) % n_folds
        x, y = features[fold == validation], targets[fold == validation] - offset
        errors = [np.square(x @ w + b - y).sum() for w, b in _solve(without(k, validation), RIDGES)]
        ridge = RIDGES[int(np.argmin(errors))]
        ((weights, intercept),) = _solve(without(k), [ridge])
        predictions[fold == k] = features[fold == k] @ weights + intercept + offset
    return RidgeProbe(explained_variance(targets, predictions), predictions)


def singular_values(embeddings: np.ndarray) -> np.ndarray:
    """
    :param embeddings: (N, D)
    :return: singular values of the embeddings less their mean, descending, in parts of their sum; zeros where nothing varies
    """
    centred = np.asarray(embeddings, dtype=np.float64)
    scale = np.square(centred).sum()
    centred = centred - centred.mean(axis=0)
    # From the eigenvalues of the smaller product: there may be many more samples than dimensions
    product = centred.T @ centred if centred.shape[0] >= centred.shape[1] else centred @ centred.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(product)[::-1], 0, None))
    if np.square(values).sum() <= ROUNDING * scale:
        return np.zeros_like(values)
    values[np.square(values) <= ROUNDING * scale] = 0
    return values / values.sum()


def effective_rank(shares: np.ndarray) -> float:
    """
    Exponential of the entropy of the normalised singular values (Roy and Vetterli, "The effective rank", EUSIPCO 2007).

    :param shares: singular values in parts of their sum, (D,)
    :return: between 1 and D, 0 where nothing varies
    """
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def relative_deviations(embeddings: np.ndarray) -> np.ndarray:
    """
    :param embeddings: (N, D)
    :return: standard deviation of each unit in parts of the mean one, zeros where nothing varies, (D,)
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    std = embeddings.std(axis=0)
    if np.square(std).sum() <= ROUNDING * np.square(embeddings).mean(axis=0).sum():
        return np.zeros_like(std)
    return std / std.mean()


def discounted_returns(rewards: np.ndarray, gamma: float, last_value: float = 0.0) -> np.ndarray:
    """
    :param rewards: of one episode, (m,)
    :param gamma: discount factor
    :param last_value: value of the last observation, 0 where the episode terminated
    :return: for each step the discounted sum of its reward and those after it, and the value behind them, (m,)
    """
    returns = np.empty(len(rewards))
    value = last_value
    for t in range(len(rewards) - 1, -1, -1):
        value = float(rewards[t]) + gamma * value
        returns[t] = value
    return returns


def principal_components(points: np.ndarray, n: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Principal components by singular value decomposition. The sign of each is such that its largest entry is positive.

    :param points: (N, D)
    :param n: number of components
    :return: mean (D,), components (n, D), zeros where there are fewer, and their shares of the variance (n,)
    """
    points = np.asarray(points, dtype=np.float64)
    mean = points.mean(axis=0)
    _, values, vectors = np.linalg.svd(points - mean, full_matrices=False)
    variances = np.square(values)
    components, shares = np.zeros((n, points.shape[1])), np.zeros(n)
    found = min(n, len(values))
    if variances.sum() > ROUNDING * np.square(points).sum():
        largest = np.abs(vectors[:found]).argmax(axis=1)
        signs = np.sign(vectors[np.arange(found), largest])
        components[:found] = vectors[:found] * signs[:, None]
        shares[:found] = variances[:found] / variances.sum()
    return mean, components, shares
