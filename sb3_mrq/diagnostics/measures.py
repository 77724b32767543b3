"""
Measures of the diagnostics as functions on arrays: explained variance, a held-out linear probe, spectrum and rank of an
embedding, discounted returns.

Shapes: ``N`` transitions, ``D`` dimensions of an embedding or of features. scikit-learn is imported when it is needed.
"""

import importlib.util
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mrq import learner

# A unit is dormant if its standard deviation is at most this fraction of the mean one (the threshold of Sokar et al.,
# "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", ICML 2023, who measure activity instead)
DORMANT = 0.025
# Candidates for the regularisation of the ridge regression, per sample
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Consecutive samples that are held out together
SEGMENT = 20
# A variance below this fraction of the mean square is rounding error of single precision
ROUNDING = 1e-10


def explained_variance(true: np.ndarray, predicted: np.ndarray) -> float:
    """
    R^2: one minus the squared error divided by the squared error of predicting the mean. Both are summed over dimensions,
    so that dimensions that hardly vary count little.

    :param true: (N,) or (N, D)
    :param predicted: same shape
    :return: 1 for a perfect prediction, 0 for one as good as the mean, negative for a worse one; NaN if nothing varies
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
    :param r2: explained variance of the held-out predictions, NaN if it is undefined
    :param predictions: prediction for each sample by a regression that was not fitted to its fold, (N,)
    """

    r2: float
    predictions: np.ndarray


def check_sklearn() -> None:
    """
    :raises ImportError: if scikit-learn is not installed
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError('The diagnostics need scikit-learn. Install it with: pip install "sb3-mrq[train]"')


def folds(episodes: np.ndarray, n_folds: int = 5) -> np.ndarray:
    """
    Folds for cross-validation, made of segments of ``SEGMENT`` consecutive samples of an episode (fewer for small data sets),
    assigned at random. Single samples would leak into the training set through their neighbours in time; whole episodes
    would test extrapolation.

    :param episodes: ascending episode number of each sample, (N,)
    :param n_folds: number of folds
    :return: fold of each sample, (N,)
    """
    from sklearn.model_selection import GroupKFold

    n = len(episodes)
    length = max(1, min(SEGMENT, n // (5 * n_folds)))
    first = np.flatnonzero(np.diff(episodes, prepend=-1))
    step = np.arange(n) - np.repeat(first, np.diff(np.append(first, n)))
    segments = np.cumsum(step % length == 0)
    fold = np.empty(n, dtype=int)
    splits = GroupKFold(n_folds, shuffle=True, random_state=0).split(segments, groups=segments)
    for k, (_, held_out) in enumerate(splits):
        fold[held_out] = k
    return fold


def ridge_probe(features: np.ndarray, targets: np.ndarray, episodes: np.ndarray, n_folds: int = 5) -> RidgeProbe:
    """
    Cross-validated ridge regression on standardised features. The regularisation of each fold is selected on another fold,
    by a fit without both.

    :param features: (N, D)
    :param targets: (N,)
    :param episodes: ascending episode number of each sample, (N,)
    :param n_folds: number of folds, at least three
    :return: explained variance and predictions on held-out samples
    """
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    targets = np.asarray(targets, dtype=np.float64)
    if len(targets) < 2 * n_folds:
        return RidgeProbe(float("nan"), np.full(len(targets), np.nan))
    scaler = StandardScaler()
    features = scaler.fit_transform(np.asarray(features, dtype=np.float64))
    # Scaling to unit variance turns the rounding errors of a constant feature into noise
    features[:, scaler.var_ <= ROUNDING * (scaler.var_ + np.square(scaler.mean_))] = 0
    fold = folds(episodes, n_folds)
    predictions = np.empty(len(targets))
    for k in range(n_folds):
        kept, validation = fold != k, fold == (k + 1) % n_folds
        train = kept & ~validation
        # One output for each regularisation: RidgeCV would compute the product of the features again for each
        candidates = Ridge(train.sum() * np.array(RIDGES)).fit(features[train], np.tile(targets[train, None], len(RIDGES)))
        predicted = candidates.predict(features[validation]).reshape(-1, len(RIDGES))
        errors = np.square(predicted - targets[validation, None]).sum(axis=0)
        best = Ridge(kept.sum() * RIDGES[int(errors.argmin())]).fit(features[kept], targets[kept])
        predictions[~kept] = best.predict(features[~kept])
    return RidgeProbe(explained_variance(targets, predictions), predictions)


def singular_values(embeddings: np.ndarray) -> np.ndarray:
    """
    :param embeddings: (N, D)
    :return: singular values of the centred embeddings as fractions of their sum, descending; zeros if nothing varies
    """
    centred = np.asarray(embeddings, dtype=np.float64)
    scale = np.square(centred).sum()
    centred = centred - centred.mean(axis=0)
    values = learner.singular_values(th.from_numpy(centred)).numpy()[::-1].copy()
    if np.square(values).sum() <= ROUNDING * scale:
        return np.zeros_like(values)
    values[np.square(values) <= ROUNDING * scale] = 0
    return values / values.sum()


def relative_deviations(embeddings: np.ndarray) -> np.ndarray:
    """
    :param embeddings: (N, D)
    :return: standard deviation of each unit relative to the mean one, zeros if nothing varies, (D,)
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    std = embeddings.std(axis=0)
    if np.square(std).sum() <= ROUNDING * np.square(embeddings).mean(axis=0).sum():
        return np.zeros_like(std)
    return std / std.mean()


def discounted_returns(rewards: np.ndarray, gamma: float, last_value: float = 0.0) -> np.ndarray:
    """
    :param rewards: rewards of one episode, (m,)
    :param gamma: discount factor
    :param last_value: value of the last observation, 0 if the episode terminated
    :return: discounted return of each step, bootstrapped from the last value, (m,)
    """
    returns = np.empty(len(rewards))
    value = last_value
    for t in range(len(rewards) - 1, -1, -1):
        value = float(rewards[t]) + gamma * value
        returns[t] = value
    return returns


def principal_components(points: np.ndarray, n: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Principal components, the largest entry of each positive.

    :param points: (N, D)
    :param n: number of components
    :return: mean (D,), components (n, D) and their shares of the variance (n,), zeros beyond the rank of the data
    """
    from sklearn.decomposition import PCA

    points = np.asarray(points, dtype=np.float64)
    mean = points.mean(axis=0)
    components, shares = np.zeros((n, points.shape[1])), np.zeros(n)
    if np.square(points - mean).sum() > ROUNDING * np.square(points).sum():
        # Not the default solver, which is randomised for large arrays
        pca = PCA(min(n, *points.shape), svd_solver="covariance_eigh").fit(points)
        components[: pca.n_components_], shares[: pca.n_components_] = pca.components_, pca.explained_variance_ratio_
    return mean, components, shares
