"""The losses against independent float64 NumPy computations, written as plain loops from the formulas of the paper.

Gradients are compared with central finite differences of the NumPy functions, or with derivatives worked out by hand.
"""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import continuation_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mrq import losses
from sb3_mrq.buffers import SubtrajectorySamples
from sb3_mrq.learner import Learner
from sb3_mrq.losses import (
    infonce_loss,
    n_step_return,
    policy_loss,
    reward_bins,
    symexp,
    td_priority,
    two_hot,
    value_loss,
)
from sb3_mrq.networks import Predictions

GAMMA = 0.99
FLOAT_DTYPES = [torch.float32, torch.float64]
FULL_BINS = np.array([np.sign(x) * (np.exp(abs(x)) - 1.0) for x in np.linspace(-10.0, 10.0, 65)])
# Few bins keep finite differences quick; they are as unevenly spaced as the full set.
SMALL_BINS = np.array([np.sign(x) * (np.exp(abs(x)) - 1.0) for x in np.linspace(-3.0, 3.0, 7)])


class EncoderLoss(NamedTuple):
    """The weighted sum and its terms."""

    total: torch.Tensor
    dynamics: torch.Tensor
    reward: torch.Tensor
    termination: torch.Tensor


def encoder_loss(
    predicted_z_s,
    target_z_s,
    reward_logits,
    rewards,
    predicted_terminated,
    terminated,
    mask,
    bins,
    *,
    dynamics_weight=1.0,
    reward_weight=0.1,
    termination_weight=0.1,
):
    """The terms of the learner, summed up."""
    learner = SimpleNamespace(
        hyperparameters=SimpleNamespace(
            dynamics_loss_weight=dynamics_weight,
            reward_loss_weight=reward_weight,
            termination_loss_weight=termination_weight,
            infonce_loss_weight=0.0,
        ),
        encoder=SimpleNamespace(predictor=SimpleNamespace(bins=bins)),
        termination_switch=1.0,
    )
    samples = SubtrajectorySamples(None, None, rewards, terminated, mask)
    predictions = Predictions(predicted_terminated, predicted_z_s, reward_logits)
    terms = Learner.encoder_terms(learner, samples, predictions, target_z_s)
    values = {"termination": torch.zeros(())} | {name: term for name, (_, term) in terms.items()}
    return EncoderLoss(sum(weight * term for weight, term in terms.values()), **values)


def value_target(returns, discount, next_q, *scales):
    """With the heads as the learner combines them."""
    return losses.value_target(returns, discount, Learner.bootstrap(None, next_q), *scales)


# --------------------------------------------------------------------------------------------------------------------
# Independent computations
# --------------------------------------------------------------------------------------------------------------------


def numpy_two_hot(reward, bins):
    """Two-hot weights of one reward: linear between its two neighbouring bins, all on the end bin beyond the range."""
    weights = np.zeros(len(bins))
    if reward <= bins[0]:
        weights[0] = 1.0
    elif reward >= bins[-1]:
        weights[-1] = 1.0
    else:
        lower = 0
        while bins[lower + 1] <= reward:
            lower += 1
        upper_weight = (reward - bins[lower]) / (bins[lower + 1] - bins[lower])
        weights[lower] = 1.0 - upper_weight
        weights[lower + 1] = upper_weight
    return weights


def numpy_cross_entropy(weights, logits):
    """Cross-entropy of one distribution of weights against the softmax of logits."""
    largest = max(logits)
    log_normaliser = largest + np.log(sum(np.exp(logit - largest) for logit in logits))
    return -sum(weight * (logit - log_normaliser) for weight, logit in zip(weights, logits, strict=True))


def numpy_encoder_terms(
    predicted_z_s, target_z_s, reward_logits, rewards, predicted_terminated, terminated, mask, bins=SMALL_BINS
):
    """The three sums over t of section 3 (dynamics, reward, termination), each a mean over the whole batch at every t."""
    batch_size, horizon, z_dim = predicted_z_s.shape
    dynamics = reward = termination = 0.0
    for t in range(horizon):
        for b in range(batch_size):
            for j in range(z_dim):
                squared = (predicted_z_s[b, t, j] - target_z_s[b, t, j]) ** 2
                dynamics += mask[b, t] * squared / (batch_size * z_dim)
            cross_entropy = numpy_cross_entropy(numpy_two_hot(rewards[b, t], bins), reward_logits[b, t])
            reward += mask[b, t] * cross_entropy / batch_size
            termination += mask[b, t] * (predicted_terminated[b, t] - terminated[b, t]) ** 2 / batch_size
    return dynamics, reward, termination


def numpy_encoder_loss(*inputs, weights=(1.0, 0.1, 0.1)):
    """The weighted sum of section 3."""
    return sum(weight * term for weight, term in zip(weights, numpy_encoder_terms(*inputs), strict=True))


def numpy_n_step(rewards, terminated, truncated, gamma):
    """Discounted return and bootstrap factor of one start, walking the transitions until its episode ends (section 4)."""
    total = 0.0
    for i, reward in enumerate(rewards):
        total += gamma**i * reward
        if terminated[i]:
            return total, 0.0
        if truncated[i]:
            return total, gamma ** (i + 1)
    return total, gamma ** len(rewards)


def numpy_value_target(returns, discount, next_q, reward_scale, target_reward_scale):
    """The target y of section 4, row by row."""
    target = np.zeros((len(returns), 1))
    for b in range(len(returns)):
        target[b, 0] = (returns[b, 0] + discount[b, 0] * target_reward_scale * min(next_q[b])) / reward_scale
    return target


def numpy_value_loss(q, target):
    """Huber loss with beta 1, mean over batch and heads (section 4)."""
    total = 0.0
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            error = abs(q[b, head] - target[b, 0])
            total += 0.5 * error**2 if error < 1.0 else error - 0.5
    return total / q.size


def numpy_policy_loss(q, pre_activation, weight=1e-5):
    """Minus the mean value plus the pre-activation penalty of section 5."""
    value = sum(q[b, head] for b in range(q.shape[0]) for head in range(q.shape[1])) / q.size
    penalty = sum(u**2 for row in pre_activation for u in row) / pre_activation.size
    return -value + weight * penalty


def numeric_gradient(function, inputs, position, epsilon=1e-5):
    """Central finite differences of a scalar function with respect to `inputs[position]`."""
    inputs = [array.copy() for array in inputs]
    gradient = np.zeros_like(inputs[position])
    for index in np.ndindex(*gradient.shape):
        value = inputs[position][index]
        inputs[position][index] = value + epsilon
        above = function(*inputs)
        inputs[position][index] = value - epsilon
        below = function(*inputs)
        inputs[position][index] = value
        gradient[index] = (above - below) / (2.0 * epsilon)
    return gradient


def to_torch(*arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def gradients(loss, *tensors):
    return [gradient.numpy() for gradient in torch.autograd.grad(loss, tensors)]


def random_mask(rng, batch_size, horizon):
    """Ones up to a random length of at least 1, zeros after it; the first row is full and the last one cut at once."""
    lengths = rng.integers(1, horizon + 1, size=batch_size)
    lengths[0], lengths[-1] = horizon, 1
    return (np.arange(horizon)[None, :] < lengths[:, None]).astype(np.float64)


def encoder_inputs(seed, batch_size=4, horizon=3, z_dim=3, bins=SMALL_BINS):
    """Random inputs of `encoder_loss` in the order of its signature, up to and including the mask."""
    rng = np.random.default_rng(seed)
    rewards = rng.uniform(1.3 * bins[0], 1.3 * bins[-1], size=(batch_size, horizon))
    rewards[0, 0], rewards[1, 0] = 0.3, bins[2]
    return [
        rng.normal(size=(batch_size, horizon, z_dim)),
        rng.normal(size=(batch_size, horizon, z_dim)),
        rng.normal(scale=3.0, size=(batch_size, horizon, len(bins))),
        rewards,
        rng.normal(size=(batch_size, horizon)),
        rng.integers(0, 2, size=(batch_size, horizon)).astype(np.float64),
        random_mask(rng, batch_size, horizon),
    ]


# --------------------------------------------------------------------------------------------------------------------
# symexp and the reward bins
# --------------------------------------------------------------------------------------------------------------------


def test_symexp_is_sign_times_exp_minus_one():
    """Section 3: symexp(x) = sign(x) (exp|x| - 1)."""
    x = np.concatenate([np.linspace(-10.0, 10.0, 101), [-1e-3, 0.0, 1e-3]])
    expected = np.array([(1.0 if value >= 0 else -1.0) * (np.exp(abs(value)) - 1.0) for value in x])
    np.testing.assert_allclose(symexp(torch.tensor(x)).numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reward_bins_are_65_symexp_centres(dtype):
    """Section 3: b_i = symexp(x_i), x_i evenly spaced on [-10, 10]."""
    bins = reward_bins(dtype=dtype)
    assert bins.shape == (65,)
    assert bins.dtype == dtype
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(bins.double().numpy(), FULL_BINS, rtol=rtol, atol=1e-10 if dtype == torch.float64 else 1e-6)
    assert torch.all(bins[1:] > bins[:-1])


@pytest.mark.parametrize(("n_bins", "limit"), [(7, 3.0), (2, 1.0), (33, 5.5)])
def test_reward_bins_take_number_and_limit(n_bins, limit):
    """Section 3, with another number of bins and another range."""
    expected = [np.sign(x) * (np.exp(abs(x)) - 1.0) for x in np.linspace(-limit, limit, n_bins)]
    np.testing.assert_allclose(reward_bins(n_bins, limit, dtype=torch.float64).numpy(), expected, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Two-hot rewards
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_two_hot_on_every_bin_centre_is_one_hot(dtype):
    """Section 3: a reward on a bin centre, the outer ones included, puts all its weight there."""
    bins = reward_bins(dtype=dtype)
    weights = two_hot(bins, bins)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, torch.eye(65, dtype=dtype), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("upper_weight", [0.125, 0.5, 0.9])
def test_two_hot_is_linear_in_the_reward_itself(upper_weight):
    """Section 3: the reward w b_{i+1} + (1 - w) b_i puts w on i+1 and 1 - w on i, between every two neighbours."""
    rewards = (1.0 - upper_weight) * FULL_BINS[:-1] + upper_weight * FULL_BINS[1:]
    expected = np.zeros((64, 65))
    for i in range(64):
        expected[i, i], expected[i, i + 1] = 1.0 - upper_weight, upper_weight
    weights = two_hot(*to_torch(rewards, FULL_BINS)).numpy()
    np.testing.assert_allclose(weights, expected, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("beyond", ["at the end", "next float", 1.000001, 2.0, 1e10, 1e30, "largest float"])
def test_two_hot_at_or_beyond_an_end_puts_all_weight_on_the_end_bin(beyond, sign, dtype):
    """Section 3: no index out of range and no division by zero at or beyond the outer bins."""
    bins = reward_bins(dtype=dtype)
    end = bins[-1] if sign > 0 else bins[0]
    if beyond == "at the end":
        reward = end
    elif beyond == "next float":
        reward = torch.nextafter(end, torch.tensor(sign * float("inf"), dtype=dtype))
    elif beyond == "largest float":
        reward = torch.tensor(sign * torch.finfo(dtype).max, dtype=dtype)
    else:
        reward = end * beyond
    expected = torch.zeros(1, 65, dtype=dtype)
    expected[0, -1 if sign > 0 else 0] = 1.0
    torch.testing.assert_close(two_hot(reward.reshape(1), bins), expected, rtol=0.0, atol=0.0)


def test_two_hot_just_inside_the_ends_uses_the_two_outer_bins():
    """Section 3: close to the ends the weight is still shared between the outermost two bins."""
    low = FULL_BINS[0] + 0.25 * (FULL_BINS[1] - FULL_BINS[0])
    high = FULL_BINS[-1] - 0.25 * (FULL_BINS[-1] - FULL_BINS[-2])
    weights = two_hot(*to_torch([low, high], FULL_BINS)).numpy()
    expected = np.zeros((2, 65))
    expected[0, :2] = 0.75, 0.25
    expected[1, -2:] = 0.25, 0.75
    np.testing.assert_allclose(weights, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4)])
def test_two_hot_matches_numpy_for_any_shape(shape):
    """Section 3: weights (..., K) for rewards (...)."""
    rewards = np.random.default_rng(0).uniform(1.3 * SMALL_BINS[0], 1.3 * SMALL_BINS[-1], size=shape)
    expected = np.zeros((*shape, len(SMALL_BINS)))
    for index in np.ndindex(*shape):
        expected[index] = numpy_two_hot(rewards[index] if shape else rewards, SMALL_BINS)
    weights = two_hot(*to_torch(rewards, SMALL_BINS)).numpy()
    assert weights.shape == expected.shape
    np.testing.assert_allclose(weights, expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    rewards=st.lists(
        st.one_of(*[st.floats(-limit, limit, width=32) for limit in (30.0, 22100.0, 2.0**100)]),
        min_size=1,
        max_size=8,
    ),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_two_hot_is_a_distribution_over_two_neighbours_whose_mean_is_the_reward(rewards, dtype):
    """Section 3: weights are non-negative, sum to 1, touch two neighbours at most, and average to the (clipped) reward."""
    bins = reward_bins(dtype=dtype)
    weights = two_hot(torch.tensor(rewards, dtype=dtype), bins).double().numpy()
    centres = bins.double().numpy()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert weights.shape == (len(rewards), 65)
    assert np.isfinite(weights).all()
    assert (weights >= 0.0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=tolerance)
    for row in weights:
        used = np.flatnonzero(row)
        assert len(used) <= 2
        assert used[-1] - used[0] <= 1
    clipped = np.clip(np.array(rewards), centres[0], centres[-1])
    np.testing.assert_allclose(weights @ centres, clipped, rtol=10 * tolerance, atol=10 * tolerance)


# --------------------------------------------------------------------------------------------------------------------
# N-step return
# --------------------------------------------------------------------------------------------------------------------


def episode_patterns(n_steps):
    """All 3^n ways in which n stored transitions go on (0), terminate (1) or are truncated (2)."""
    outcome = np.array(list(itertools.product([0, 1, 2], repeat=n_steps)))
    rewards = np.random.default_rng(n_steps).normal(loc=1.0, scale=3.0, size=outcome.shape)
    terminated, truncated = outcome == 1, outcome == 2
    mask = np.zeros(outcome.shape)
    for row in range(len(outcome)):
        for i in range(n_steps):
            mask[row, i] = 1.0
            if outcome[row, i] != 0:
                break
    return rewards, terminated, truncated, mask


@pytest.mark.parametrize("gamma", [GAMMA, 0.5, 1.0])
@pytest.mark.parametrize("n_steps", [1, 3, 5])
def test_n_step_return_for_every_pattern_of_episode_ends(n_steps, gamma):
    """Section 4, all ways to end: what follows an episode's end, rewards and flags alike, must not matter."""
    rewards, terminated, truncated, mask = episode_patterns(n_steps)
    expected = np.array([numpy_n_step(*row, gamma) for row in zip(rewards, terminated, truncated, strict=True)])
    returns, discount = n_step_return(*to_torch(rewards, terminated, mask), gamma)
    assert returns.shape == discount.shape == (len(rewards), 1)
    np.testing.assert_allclose(returns[:, 0].numpy(), expected[:, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(discount[:, 0].numpy(), expected[:, 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_terminal_reward_is_kept_and_the_next_episode_does_not_leak(step):
    """Section 4: termination at step k keeps r_k, drops every later reward and the bootstrap."""
    rewards = np.array([[1.0, 1.0, 1.0]])
    rewards[0, step] = -100.0
    rewards[0, step + 1 :] = 1e6
    terminated = np.array([[float(i == step) for i in range(3)]])
    mask = np.array([[float(i <= step) for i in range(3)]])
    returns, discount = n_step_return(*to_torch(rewards, terminated, mask), GAMMA)
    expected = sum(GAMMA**i for i in range(step)) - 100.0 * GAMMA**step
    assert returns.item() == pytest.approx(expected, rel=1e-12)
    assert discount.item() == 0.0


@pytest.mark.parametrize("flag_after", [0.0, 1.0])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_truncation_at_step_k_bootstraps_with_gamma_to_the_k_plus_one(step, flag_after):
    """Section 4: truncation at step k keeps r_k and bootstraps with gamma^(k+1), whatever the next episode does."""
    rewards = np.array([[2.0, 2.0, 2.0]])
    rewards[0, step + 1 :] = 1e6
    terminated = np.array([[flag_after * float(i > step) for i in range(3)]])
    mask = np.array([[float(i <= step) for i in range(3)]])
    returns, discount = n_step_return(*to_torch(rewards, terminated, mask), GAMMA)
    assert returns.item() == pytest.approx(sum(2.0 * GAMMA**i for i in range(step + 1)), rel=1e-12)
    assert discount.item() == pytest.approx(GAMMA ** (step + 1), rel=1e-12)


def test_n_step_return_ignores_what_the_mask_hides():
    """Section 4: rewards and flags past the mask change nothing at all."""
    rewards, terminated, _, mask = episode_patterns(3)
    hidden = mask == 0.0
    clean = n_step_return(*to_torch(np.where(hidden, 0.0, rewards), np.where(hidden, 0.0, terminated), mask), GAMMA)
    garbage = n_step_return(*to_torch(np.where(hidden, 1e6, rewards), np.where(hidden, 1.0, terminated), mask), GAMMA)
    for one, other in zip(clean, garbage, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


# --------------------------------------------------------------------------------------------------------------------
# Encoder loss
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_encoder_loss_terms_match_numpy(seed):
    """Section 3: the three unweighted terms, and 1.0, 0.1, 0.1 as the default weights of their sum."""
    inputs = encoder_inputs(seed)
    loss = encoder_loss(*to_torch(*inputs, SMALL_BINS))
    assert isinstance(loss, EncoderLoss)
    assert all(term.shape == () for term in loss)
    dynamics, reward, termination = numpy_encoder_terms(*inputs)
    assert loss.dynamics.item() == pytest.approx(dynamics, rel=1e-10)
    assert loss.reward.item() == pytest.approx(reward, rel=1e-10)
    assert loss.termination.item() == pytest.approx(termination, rel=1e-10)
    assert loss.total.item() == pytest.approx(dynamics + 0.1 * reward + 0.1 * termination, rel=1e-10)


def test_encoder_loss_at_the_sizes_of_the_paper():
    """Section 3 with horizon 5, 65 bins and float32, as in training."""
    inputs = encoder_inputs(0, batch_size=16, horizon=5, z_dim=32, bins=FULL_BINS)
    expected = numpy_encoder_terms(*inputs, bins=FULL_BINS)
    loss = encoder_loss(*to_torch(*inputs, FULL_BINS, dtype=torch.float32))
    assert all(term.dtype == torch.float32 for term in loss)
    np.testing.assert_allclose([loss.dynamics.item(), loss.reward.item(), loss.termination.item()], expected, rtol=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.1), (0.3, 2.0, 0.7)])
@pytest.mark.parametrize(("name", "position"), [("predicted_z_s", 0), ("reward_logits", 2), ("predicted_terminated", 4)])
def test_encoder_loss_gradient_matches_finite_differences(name, position, weights):
    """Section 3: the gradient of the total with respect to each of the three predictions."""
    inputs = encoder_inputs(3, batch_size=3)
    tensors = to_torch(*inputs, SMALL_BINS)
    tensors[position].requires_grad_()
    dynamics_weight, reward_weight, termination_weight = weights
    loss = encoder_loss(
        *tensors, dynamics_weight=dynamics_weight, reward_weight=reward_weight, termination_weight=termination_weight
    )
    assert loss.total.item() == pytest.approx(numpy_encoder_loss(*inputs, weights=weights), rel=1e-10)
    expected = numeric_gradient(lambda *arrays: numpy_encoder_loss(*arrays, weights=weights), inputs, position)
    (gradient,) = gradients(loss.total, tensors[position])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8, err_msg=name)


def test_encoder_loss_gradients_match_derivatives_by_hand():
    """Section 3: 2 M (z~ - z)/(B Z), 0.1 M (softmax - two_hot)/B and 0.2 M (d^ - d)/B."""
    inputs = encoder_inputs(4)
    predicted_z_s, target_z_s, logits, rewards, predicted_terminated, terminated, mask = inputs
    batch_size, horizon, z_dim = predicted_z_s.shape
    expected_logits = np.zeros_like(logits)
    for b, t in np.ndindex(batch_size, horizon):
        probabilities = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
        weights = numpy_two_hot(rewards[b, t], SMALL_BINS)
        expected_logits[b, t] = 0.1 * mask[b, t] * (probabilities - weights) / batch_size
    tensors = to_torch(*inputs, SMALL_BINS)
    predictions = [tensors[position].requires_grad_() for position in (0, 2, 4)]
    on_z_s, on_logits, on_terminated = gradients(encoder_loss(*tensors).total, *predictions)
    expected_z_s = 2.0 * mask[:, :, None] * (predicted_z_s - target_z_s) / (batch_size * z_dim)
    np.testing.assert_allclose(on_z_s, expected_z_s, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(on_logits, expected_logits, rtol=1e-9, atol=1e-14)
    expected_terminated = 0.2 * mask * (predicted_terminated - terminated) / batch_size
    np.testing.assert_allclose(on_terminated, expected_terminated, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("garbage", [1e6, -1e6])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("predicted_z_s", 0),
        ("target_z_s", 1),
        ("reward_logits", 2),
        ("rewards", 3),
        ("predicted_terminated", 4),
        ("terminated", 5),
    ],
)
def test_encoder_loss_ignores_what_the_mask_hides(name, position, garbage):
    """Section 3: values past the mask change neither a term nor a gradient, and get no gradient themselves."""
    inputs = encoder_inputs(5)
    hidden = inputs[-1] == 0.0
    results = []
    for fill in (None, garbage):
        arrays = [array.copy() for array in inputs]
        if fill is not None:
            arrays[position][hidden] = fill
            # A row of equal logits has a harmless softmax, however large they are.
            if name == "reward_logits":
                arrays[position][hidden, 0] = -fill
        tensors = to_torch(*arrays, SMALL_BINS)
        predictions = [tensors[index].requires_grad_() for index in (0, 2, 4)]
        loss = encoder_loss(*tensors)
        results.append(([term.item() for term in loss], gradients(loss.total, *predictions)))
    (clean_terms, clean_gradients), (terms, garbage_gradients) = results
    np.testing.assert_allclose(terms, clean_terms, rtol=1e-12)
    for clean, gradient in zip(clean_gradients, garbage_gradients, strict=True):
        np.testing.assert_allclose(gradient, clean, rtol=1e-12, atol=1e-15)
        assert np.all(gradient[hidden] == 0.0)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_encoder_loss_sums_over_the_horizon(horizon):
    """Section 3: the sum over t is not averaged: constant errors give terms proportional to the horizon."""
    batch_size, z_dim, n_bins = 3, 4, len(SMALL_BINS)
    ones = torch.ones(batch_size, horizon, dtype=torch.float64)
    z_s = torch.ones(batch_size, horizon, z_dim, dtype=torch.float64)
    logits = torch.zeros(batch_size, horizon, n_bins, dtype=torch.float64)
    loss = encoder_loss(3.0 * z_s, z_s, logits, 0.7 * ones, 0.5 * ones, 0.0 * ones, ones, torch.tensor(SMALL_BINS))
    assert loss.dynamics.item() == pytest.approx(4.0 * horizon, rel=1e-12)
    assert loss.reward.item() == pytest.approx(np.log(n_bins) * horizon, rel=1e-12)
    assert loss.termination.item() == pytest.approx(0.25 * horizon, rel=1e-12)


def test_encoder_loss_means_run_over_the_whole_batch():
    """Section 3: a masked transition still counts in the mean; nothing is divided by the sum of the mask."""
    n_bins = len(SMALL_BINS)
    ones = torch.ones(4, 2, dtype=torch.float64)
    z_s = torch.ones(4, 2, 3, dtype=torch.float64)
    logits = torch.zeros(4, 2, n_bins, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    loss = encoder_loss(3.0 * z_s, z_s, logits, 0.7 * ones, 0.5 * ones, 0.0 * ones, mask, torch.tensor(SMALL_BINS))
    assert loss.dynamics.item() == pytest.approx(4.0 * 1.25, rel=1e-12)
    assert loss.reward.item() == pytest.approx(np.log(n_bins) * 1.25, rel=1e-12)
    assert loss.termination.item() == pytest.approx(0.25 * 1.25, rel=1e-12)


def test_encoder_loss_without_the_termination_term():
    """Section 3: with weight 0 the term is neither in the total nor in the gradients."""
    inputs = encoder_inputs(6)
    tensors = to_torch(*inputs, SMALL_BINS)
    predictions = [tensors[position].requires_grad_() for position in (0, 2, 4)]
    loss = encoder_loss(*tensors, termination_weight=0.0)
    dynamics, reward, _ = numpy_encoder_terms(*inputs)
    assert loss.total.item() == pytest.approx(dynamics + 0.1 * reward, rel=1e-10)
    on_terminated = torch.autograd.grad(loss.total, predictions, allow_unused=True)[2]
    assert on_terminated is None or torch.all(on_terminated == 0.0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reward_cross_entropy_uses_log_softmax(dtype):
    """Section 3: logits far outside the range of exp give a finite loss, the difference of the two largest."""
    logits = torch.zeros(1, 1, 7, dtype=dtype)
    logits[0, 0, 0] = 2000.0
    logits[0, 0, 6] = -500.0
    zeros, z_s = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, 2, dtype=dtype)
    bins = torch.tensor(SMALL_BINS, dtype=dtype)
    loss = encoder_loss(z_s, z_s, logits, bins[-1].reshape(1, 1), zeros, zeros, zeros + 1.0, bins)
    assert loss.reward.item() == pytest.approx(2500.0, rel=1e-6)


@pytest.mark.parametrize("reward", [-1e30, 1e30])
def test_encoder_loss_with_rewards_beyond_the_bins(reward):
    """Section 3: such rewards give the cross-entropy of the end bin, and finite gradients."""
    inputs = encoder_inputs(8)
    inputs[3][:, 0] = reward
    tensors = to_torch(*inputs, SMALL_BINS)
    tensors[2].requires_grad_()
    loss = encoder_loss(*tensors)
    assert loss.reward.item() == pytest.approx(numpy_encoder_terms(*inputs)[1], rel=1e-10)
    (gradient,) = gradients(loss.total, tensors[2])
    assert np.isfinite(gradient).all()


# --------------------------------------------------------------------------------------------------------------------
# InfoNCE, of DR.Q
# --------------------------------------------------------------------------------------------------------------------


def numpy_infonce(predicted, target, mask, temperature):
    """Row by row: similarity to its own target against those of all rows that are alive at this step."""
    total = 0.0
    for t in range(mask.shape[1]):
        alive = np.flatnonzero(mask[:, t])
        for i in alive:
            similarities = [
                predicted[i, t] @ target[k, t] / np.linalg.norm(predicted[i, t]) / np.linalg.norm(target[k, t]) / temperature
                for k in alive
            ]
            own = similarities[list(alive).index(i)]
            total += np.log(np.sum(np.exp(np.array(similarities) - own)))
    return total / len(mask)


def infonce_inputs(seed, batch_size=6, horizon=3, z_dim=4):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, batch_size, horizon)
    return rng.normal(size=(batch_size, horizon, z_dim)), rng.normal(size=(batch_size, horizon, z_dim)), mask


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_infonce_matches_numpy(temperature):
    predicted, target, mask = infonce_inputs(0)
    tensors = to_torch(predicted, target, mask)
    tensors[0].requires_grad_()
    loss = infonce_loss(*tensors, temperature)
    assert loss.item() == pytest.approx(numpy_infonce(predicted, target, mask, temperature), rel=1e-10)
    (gradient,) = gradients(loss, tensors[0])
    expected = numeric_gradient(lambda *inputs: numpy_infonce(*inputs, temperature), [predicted, target, mask], 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    assert not gradient[mask == 0].any()


def test_infonce_ignores_what_the_mask_hides():
    predicted, target, mask = to_torch(*infonce_inputs(1))
    loss = infonce_loss(predicted, target, mask)
    hidden = mask == 0
    assert hidden.any()
    for values in (predicted, target):
        changed = values.clone()
        changed[hidden] = 1e6
        assert infonce_loss(*(changed if each is values else each for each in (predicted, target)), mask) == loss
    # A prediction that is zero has no direction, and still a gradient
    predicted[0, 0] = 0
    predicted.requires_grad_()
    assert np.isfinite(gradients(infonce_loss(predicted, target, mask), predicted)[0]).all()


def test_infonce_of_what_tells_nothing_is_the_logarithm_of_the_batch():
    """One value for all rows, at each step of the horizon."""
    z_s, mask = torch.ones(256, 5, 8), torch.ones(256, 5)
    assert infonce_loss(z_s, z_s, mask).item() == pytest.approx(5 * np.log(256), rel=1e-6)


def test_infonce_keeps_its_digits_in_float32():
    """At the sizes of the paper; bfloat16 embeddings, as of training in that precision, compared in float32."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(256, 5, 512, generator=generator)
    predicted = (target + 0.5 * torch.randn(256, 5, 512, generator=generator)).bfloat16().float()
    mask = torch.ones(256, 5)
    exact = infonce_loss(predicted.double(), target.double(), mask.double()).item()
    assert infonce_loss(predicted, target, mask).item() == pytest.approx(exact, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Value target and value loss
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float scales", "tensor scales"])
@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_value_target_matches_numpy(n_critics, as_tensor):
    """Section 4: y = (returns + discount rbar' min Q_target) / rbar."""
    rng = np.random.default_rng(n_critics)
    returns, discount = rng.normal(size=(6, 1)), rng.choice([0.0, GAMMA, GAMMA**3], size=(6, 1))
    next_q = rng.normal(size=(6, n_critics))
    scales = (0.37, 2.5)
    expected = numpy_value_target(returns, discount, next_q, *scales)
    given_scales = to_torch(*scales) if as_tensor else scales
    target = value_target(*to_torch(returns, discount, next_q), *given_scales)
    assert target.shape == (6, 1)
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-12)


def test_value_target_takes_the_smaller_head_of_its_own_row():
    """Section 4: the minimum runs over heads, row by row, also when the batch is as large as the number of heads."""
    zeros, ones = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    next_q = torch.tensor([[5.0, -1.0], [2.0, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(value_target(zeros, ones, next_q, 1.0, 1.0), torch.tensor([[-1.0], [2.0]]).double())


def test_value_target_before_the_first_replacement_is_the_return():
    """Section 4: with rbar = 1 and rbar' = 0 nothing is bootstrapped."""
    returns = torch.tensor([[3.0], [-2.0]], dtype=torch.float64)
    next_q = torch.full((2, 2), 1e6, dtype=torch.float64)
    torch.testing.assert_close(value_target(returns, torch.ones_like(returns), next_q, 1.0, 0.0), returns)


def test_value_target_from_transitions_that_cross_episode_ends():
    """Section 4 as a whole: every way in which three transitions can end, with mask, return and bootstrap combined."""
    rewards, terminated, truncated, _ = episode_patterns(3)
    next_q = np.random.default_rng(1).normal(scale=50.0, size=(len(rewards), 2))
    reward_scale, target_reward_scale = 1.7, 0.6
    expected = np.zeros((len(rewards), 1))
    for row in range(len(rewards)):
        total, discount = numpy_n_step(rewards[row], terminated[row], truncated[row], GAMMA)
        expected[row, 0] = (total + discount * target_reward_scale * min(next_q[row])) / reward_scale
    mask = continuation_mask(torch.tensor(terminated | truncated, dtype=torch.float64))
    returns, discount = n_step_return(*to_torch(rewards, terminated), mask, GAMMA)
    target = value_target(returns, discount, torch.tensor(next_q), reward_scale, target_reward_scale)
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_value_loss_and_its_gradient_match_numpy(n_critics, batch_size):
    """Section 4: Huber with beta 1, mean over batch and heads; its gradient is clip(Q - y, -1, 1) over their number."""
    rng = np.random.default_rng(10 * n_critics + batch_size)
    q, target = rng.normal(scale=2.0, size=(batch_size, n_critics)), rng.normal(scale=2.0, size=(batch_size, 1))
    q_tensor, target_tensor = to_torch(q, target)
    q_tensor.requires_grad_()
    loss = value_loss(q_tensor, target_tensor)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(numpy_value_loss(q, target), rel=1e-12)
    (gradient,) = gradients(loss, q_tensor)
    np.testing.assert_allclose(gradient, numeric_gradient(numpy_value_loss, [q, target], 0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(gradient, np.clip(q - target, -1.0, 1.0) / q.size, rtol=1e-12)


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.0), (0.5, 0.125), (1.0, 0.5), (-0.5, 0.125), (3.0, 2.5), (-3.0, 2.5)])
def test_value_loss_is_quadratic_inside_one_and_linear_outside(error, expected):
    """Section 4: error^2 / 2 below 1 and |error| - 1/2 above."""
    target = torch.tensor([[2.0], [-4.0]], dtype=torch.float64)
    assert value_loss((target + error).expand(2, 2), target).item() == pytest.approx(expected, abs=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Policy loss
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"pre_activation_weight": 0.3}], ids=["default weight", "weight 0.3"])
@pytest.mark.parametrize(("n_critics", "action_dim"), [(2, 6), (2, 2), (1, 3)])
def test_policy_loss_and_its_gradients_match_numpy(n_critics, action_dim, arguments):
    """Section 5: -mean(Q) + 1e-5 mean(u^2), means over all entries of each."""
    rng = np.random.default_rng(action_dim)
    q, pre_activation = rng.normal(size=(5, n_critics)), rng.normal(scale=100.0, size=(5, action_dim))
    tensors = [tensor.requires_grad_() for tensor in to_torch(q, pre_activation)]
    loss = policy_loss(*tensors, **arguments)
    weight = arguments.get("pre_activation_weight", 1e-5)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(numpy_policy_loss(q, pre_activation, weight), rel=1e-12)
    on_q, on_pre_activation = gradients(loss, *tensors)
    np.testing.assert_allclose(on_q, np.full(q.shape, -1.0 / q.size), rtol=1e-12)
    np.testing.assert_allclose(on_pre_activation, 2.0 * weight * pre_activation / pre_activation.size, rtol=1e-12)
    # The loss is quadratic: a wide difference is exact up to rounding.
    numeric = numeric_gradient(lambda *arrays: numpy_policy_loss(*arrays, weight), [q, pre_activation], 1, epsilon=0.1)
    np.testing.assert_allclose(on_pre_activation, numeric, rtol=1e-5, atol=1e-11)


# --------------------------------------------------------------------------------------------------------------------
# Priorities
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_td_priority_matches_numpy(n_critics, batch_size):
    """Section 7: max(|Q_1 - y|, |Q_2 - y|, 1)^0.4, one per row."""
    rng = np.random.default_rng(10 * n_critics + batch_size)
    q, target = rng.normal(scale=3.0, size=(batch_size, n_critics)), rng.normal(scale=3.0, size=(batch_size, 1))
    expected = [max([abs(value - target[b, 0]) for value in q[b]] + [1.0]) ** 0.4 for b in range(batch_size)]
    priorities = td_priority(*to_torch(q, target))
    assert priorities.shape == (batch_size,)
    np.testing.assert_allclose(priorities.numpy(), expected, rtol=1e-12)


def test_td_priority_floor_and_larger_error():
    """Section 7: errors below 1 count as 1, and of two heads the larger error counts, whatever its sign."""
    q = torch.tensor([[0.2, -0.3], [0.0, 32.0], [-32.0, 5.0]], dtype=torch.float64)
    priorities = td_priority(q, torch.zeros(3, 1, dtype=torch.float64))
    np.testing.assert_allclose(priorities.numpy(), [1.0, 4.0, 4.0], rtol=1e-12)


def test_target_beyond_float32():
    """Rewards of 1e30 have left the buffer, zeros remain: loss infinite, but gradient and priority are not."""
    target = value_target(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[9.0, 8.0], [-9.0, -8.0]]), 1e-8, 1e30)
    assert target.isinf().all()
    q = torch.zeros(2, 2, requires_grad=True)
    value_loss(q, target).backward()
    torch.testing.assert_close(q.grad, torch.tensor([[-0.25, -0.25], [0.25, 0.25]]))
    priorities = td_priority(q.detach(), target)
    torch.testing.assert_close(priorities, torch.full((2,), torch.finfo(torch.float32).max) ** 0.4)


def test_td_priority_takes_exponent_and_floor():
    """Section 7 with other constants than the paper's."""
    q = torch.tensor([[1.0, -3.0], [9.0, 2.0]], dtype=torch.float64)
    priorities = td_priority(q, torch.zeros(2, 1, dtype=torch.float64), alpha=0.5, min_td_error=4.0)
    np.testing.assert_allclose(priorities.numpy(), [2.0, 3.0], rtol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# All of them inside an update
# --------------------------------------------------------------------------------------------------------------------


def test_no_loss_reads_a_value_back_to_the_host():
    """Tensors without data pass through every function: no `.item()`, no `if tensor`, no shape that depends on values."""

    def empty(*shape):
        return torch.empty(shape, device="meta")

    batch_size, horizon, n_steps = 4, 5, 3
    bins = reward_bins(device="meta")
    mask = empty(batch_size, horizon)
    z_s, logits, scalars = empty(batch_size, horizon, 8), empty(batch_size, horizon, 65), empty(batch_size, horizon)
    assert encoder_loss(z_s, z_s, logits, scalars, scalars, scalars, mask, bins).total.shape == ()
    assert infonce_loss(z_s, z_s, mask).shape == ()
    returns, discount = n_step_return(*[empty(batch_size, n_steps) for _ in range(3)], GAMMA)
    target = value_target(returns, discount, empty(batch_size, 2), empty(), empty())
    assert target.shape == (batch_size, 1)
    assert value_loss(empty(batch_size, 2), target).shape == ()
    assert policy_loss(empty(batch_size, 2), empty(batch_size, 6)).shape == ()
    assert td_priority(empty(batch_size, 2), target).shape == (batch_size,)
