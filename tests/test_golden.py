"""
One agent for each pair of spaces against the numbers that the authors' implementation computes, in float32: losses, values,
targets and priorities, and all weights after one and after three updates.

The numbers lie in ``golden/*.npz`` of the folder that the environment variable MRQ_REFERENCE_DIR names.
"""

import inspect
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    NETWORKS,
    continuation_mask,
    make_learner,
    make_policy,
    read_weights,
    set_scales,
    update_encoder,
    update_value_and_policy,
    write_weights,
)

from sb3_mrq import losses
from sb3_mrq.learner import Noise
from sb3_mrq.policies import CnnPolicy, MlpPolicy

CASES = ("box_vector", "discrete_vector", "box_pixel", "discrete_pixel")
SIZES = dict(net_arch=dict(encoder=[16, 16], qf=[18, 18, 18], pi=[14, 14]), z_s_dim=24, z_sa_dim=20, z_a_dim=8)
N_ACTIONS = 3


class Golden:
    """The numbers of one case, and the agent that they begin with."""

    def __init__(self, folder, case):
        with np.load(folder / "golden" / f"{case}.npz") as file:
            self.arrays = dict(file)
        self.discrete = case.startswith("discrete")
        shape = self.arrays["value/observations"].shape[1:]
        action_space = spaces.Discrete(N_ACTIONS) if self.discrete else spaces.Box(-1, 1, (N_ACTIONS,))
        if case.endswith("pixel"):
            self.policy = make_policy(spaces.Box(0, 255, shape, np.uint8), action_space, CnnPolicy, **SIZES)
        else:
            self.policy = make_policy(spaces.Box(-np.inf, np.inf, shape), action_space, MlpPolicy, **SIZES)
        for name in NETWORKS:
            write_weights(getattr(self.policy, name), self.weights("init"))
            write_weights(getattr(self.policy, f"{name}_target"), self.weights("target"))
        self.learner = make_learner(self.policy, preprocessed=False)
        set_scales(self.policy, self["value/rbar"], self["value/rbar_target"])

    def __getitem__(self, name):
        return th.as_tensor(self.arrays[name])

    def weights(self, prefix):
        prefix += "/"
        return {name[len(prefix) :]: value for name, value in self.arrays.items() if name.startswith(prefix)}

    def update_encoder(self):
        obs, terminated = self["encoder/observations"], self["encoder/terminated"]
        return update_encoder(
            self.learner,
            obs,
            self["encoder/actions"],
            self["encoder/rewards"],
            terminated,
            continuation_mask(terminated),
        )

    def update_value_and_policy(self, i):
        gumbel = [self[f"value/{name}_gumbel"][i] if self.discrete else None for name in ("target", "policy")]
        terminated = self["value/terminated"]
        return update_value_and_policy(
            self.learner,
            self["value/observations"],
            self["value/actions"],
            self["value/rewards"],
            terminated,
            continuation_mask(terminated),
            self["value/next_observations"],
            Noise(self["value/target_noise"][i], *gumbel),
        )


@pytest.fixture(params=CASES)
def golden(request):
    folder = os.environ.get("MRQ_REFERENCE_DIR")
    if not folder:
        pytest.skip("MRQ_REFERENCE_DIR does not name the folder of the reference numbers")
    return Golden(Path(folder), request.param)


def assert_close(ours, theirs, rtol):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=rtol * np.abs(theirs).max())


def assert_same_weights(network, expected, before):
    """
    Compare tensor by tensor: a single weight may be off by part of an Adam step if its gradient is almost zero.

    :param before: the weights before the updates; what the updates changed must be the same too
    """
    for name, ours in read_weights(network).items():
        theirs, change = expected[name], expected[name] - before[name]
        difference = ours - theirs
        assert np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(theirs), name
        assert np.all(np.abs(difference) <= 1e-4 * np.abs(theirs) + 2e-5), name
        assert np.linalg.norm(change) > 0, name
        assert np.linalg.norm(difference) <= 1e-2 * np.linalg.norm(change), name


def test_encoder_updates(golden):
    """Section 3: the loss at the first and the third of three updates on one batch, and f, g and m after them."""
    expected = {1: "encoder/loss1", 3: "encoder/loss3"}
    for update in (1, 2, 3):
        metrics = golden.update_encoder()
        if update in expected:
            np.testing.assert_allclose(metrics.encoder_loss.item(), golden.arrays[expected[update]], rtol=1e-5)
            assert_same_weights(golden.policy.encoder, golden.weights(f"encoder/after{update}"), golden.weights("init"))


def test_value_and_policy_updates(golden):
    """Sections 4 to 7: values, targets, priorities and losses, and Q and pi after one and after three updates on one batch."""
    write_weights(golden.policy.encoder, golden.weights("encoder/after3"))
    value_loss = losses.value_loss
    with mock.patch.object(losses, "value_loss", wraps=value_loss) as spy:
        for update in (1, 2, 3):
            priorities, metrics = golden.update_value_and_policy(update - 1)
            if update == 1:
                call = inspect.signature(value_loss).bind(*spy.call_args.args, **spy.call_args.kwargs).arguments
                assert_close(call["q"].detach(), golden.arrays["value/q"], rtol=1e-4)
                assert_close(call["target"].flatten(), golden.arrays["value/target"].ravel(), rtol=1e-4)
                assert_close(priorities, golden.arrays["value/priority"], rtol=1e-4)
            if update in (1, 3):
                np.testing.assert_allclose(metrics.critic_loss.item(), golden.arrays[f"value/loss{update}"], rtol=1e-5)
                np.testing.assert_allclose(metrics.actor_loss.item(), golden.arrays[f"policy/loss{update}"], rtol=1e-5)
                for network in (golden.policy.critic, golden.policy.actor):
                    assert_same_weights(network, golden.weights(f"value/after{update}"), golden.weights("init"))
