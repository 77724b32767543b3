"""
Small agents against the numbers that the authors' implementations compute, in float32: losses, values, targets and priorities,
and all weights after one and after three updates.

The numbers lie in ``golden/*.npz`` of the folder that the environment variable MRQ_REFERENCE_DIR names: a file for each case,
named ``[drq_](box|discrete)_(vector|pixel).npz``.
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
    DRQ_PAPER,
    NETWORKS,
    PAPER,
    continuation_mask,
    make_learner,
    make_policy,
    read_weights,
    set_scales,
    update_encoder,
    update_value_and_policy,
    write_weights,
)

import sb3_mrq
from sb3_mrq import drq, losses
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.learner import Noise

FOLDER = os.environ.get("MRQ_REFERENCE_DIR")
CASES = sorted(path.stem for path in Path(FOLDER, "golden").glob("*.npz")) if FOLDER else [None]
SIZES = dict(net_arch=dict(encoder=[16, 16], qf=[18, 18, 18], pi=[14, 14]), z_s_dim=24, z_sa_dim=20, z_a_dim=8)
N_ACTIONS = 3


class Golden:
    """The numbers of one case, and the agent that they begin with."""

    def __init__(self, case):
        with np.load(Path(FOLDER, "golden", f"{case}.npz")) as file:
            self.arrays = dict(file)
        self.drq = case.startswith("drq")
        self.discrete = "discrete" in case
        # Terminations within the horizon: the numbers of DR.Q come from a mask that is not the one meant
        self.encoder_case = "encoder_nonterminal" if self.drq else "encoder"
        shape = self.arrays["value/observations"].shape[1:]
        action_space = spaces.Discrete(N_ACTIONS) if self.discrete else spaces.Box(-1, 1, (N_ACTIONS,))
        pixel = case.endswith("pixel")
        space = spaces.Box(0, 255, shape, np.uint8) if pixel else spaces.Box(-np.inf, np.inf, shape)
        policies = drq if self.drq else sb3_mrq
        policy_class = policies.CnnPolicy if pixel else policies.MlpPolicy
        encoder_lr = 3e-4 if self.drq else 1e-4
        self.policy = make_policy(space, action_space, policy_class, encoder_lr=encoder_lr, **SIZES)
        for name in NETWORKS:
            write_weights(getattr(self.policy, name), self.weights("init"))
            write_weights(getattr(self.policy, f"{name}_target"), self.weights("target"))
        self.learner = make_learner(self.policy, preprocessed=False, **(DRQ_PAPER if self.drq else PAPER))
        set_scales(self.policy, *(1.0, 1.0) if self.drq else (self["value/rbar"], self["value/rbar_target"]))

    def __getitem__(self, name):
        return th.as_tensor(self.arrays[name])

    def weights(self, prefix):
        prefix += "/"
        return {name[len(prefix) :]: value for name, value in self.arrays.items() if name.startswith(prefix)}

    def update_encoder(self):
        obs, terminated = self["encoder/observations"], self["encoder/terminated"]
        if self.encoder_case == "encoder_nonterminal":
            terminated = th.zeros_like(terminated)
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
    if request.param is None:
        pytest.skip("MRQ_REFERENCE_DIR does not name the folder of the reference numbers")
    return Golden(request.param)


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
    expected = {1: f"{golden.encoder_case}/loss1", 3: f"{golden.encoder_case}/loss3"}
    for update in (1, 2, 3):
        metrics = golden.update_encoder()
        if update in expected:
            np.testing.assert_allclose(metrics.encoder_loss.item(), golden.arrays[expected[update]], rtol=1e-5)
            assert_same_weights(
                golden.policy.encoder, golden.weights(f"{golden.encoder_case}/after{update}"), golden.weights("init")
            )


def test_value_and_policy_updates(golden):
    """Sections 4 to 7: values, targets, priorities and losses, and Q and pi after one and after three updates on one batch."""
    write_weights(golden.policy.encoder, golden.weights(f"{golden.encoder_case}/after3"))
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


@pytest.mark.parametrize("golden", [case for case in CASES if case is None or case.startswith("drq")], indirect=True)
class TestDRQ:
    """What the file of DR.Q has besides."""

    def test_infonce(self, golden):
        """Terms at each step of the horizon, without terminations, and masked."""
        terminated = golden["encoder/terminated"]
        obs, actions = golden["encoder/observations"], golden["encoder/actions"]
        encoder = golden.policy.encoder
        with th.no_grad():
            predicted = encoder.unroll(encoder.state(obs[:, 0]), actions).z_s
            target = th.stack([golden.policy.encoder_target.state(obs[:, t + 1]) for t in range(5)], dim=1)
        for mask, expected in (
            (th.ones_like(terminated), golden["encoder_nonterminal/infonce1"]),
            (continuation_mask(terminated), golden["encoder/infonce_masked_both1"]),
        ):
            terms = [losses.infonce_loss(*(part[:, t : t + 1] for part in (predicted, target, mask))) for t in range(5)]
            np.testing.assert_allclose(terms, expected, rtol=1e-5)
            np.testing.assert_allclose(losses.infonce_loss(predicted, target, mask), expected.sum(), rtol=1e-5)

    def test_losses_and_weights_are_closer_than_those_of_mrq(self, golden):
        """Weights after one and three encoder updates to 1e-5."""
        for update in (1, 2, 3):
            golden.update_encoder()
            if update in (1, 3):
                expected = golden.weights(f"encoder_nonterminal/after{update}")
                for name, ours in read_weights(golden.policy.encoder).items():
                    np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-5, err_msg=name)

    def test_faded_probabilities(self, golden):
        """Of the whole buffer of the file, whose episodes end by termination, truncation, or not yet."""
        priorities = golden.arrays["replay/all_priorities"]
        ends = {7: True, 15: False, 30015: False}
        buffer = SubtrajectoryReplayBuffer(
            40_000, spaces.Box(-1, 1e5, (1,)), spaces.Discrete(2), horizon=5, n_steps=3, fade=0.9999, fade_min=0.1
        )
        obs = 0
        for i in range(len(priorities)):
            done = i in ends
            infos = [{"TimeLimit.truncated": done and not ends[i]}]
            buffer.add(np.array([[obs]]), np.array([[obs + 1]]), np.array([[0]]), np.zeros(1), np.array([done]), infos)
            obs += 2 if done else 1
        starts, _ = buffer.sampling_probabilities()
        # An episode of m transitions takes m + 1 slots; of the running one, whose horizon is not complete, one can be sampled
        transitions = np.concatenate([np.arange(8), np.arange(8, 16), np.arange(16, 30016), [30016, 30017]])
        assert len(starts) == len(transitions)
        buffer.update_priorities(starts, priorities[transitions])
        _, probabilities = buffer.sampling_probabilities()
        expected = dict(zip(golden.arrays["replay/transition"], golden.arrays["replay/probability_all"], strict=True))
        sampled = [i for i, transition in enumerate(transitions) if transition in expected]
        assert len(sampled) > 90
        ours = probabilities[sampled]
        theirs = np.array([expected[transitions[i]] for i in sampled])
        # Theirs are of all transitions, those that cannot be sampled yet included
        np.testing.assert_allclose(ours / ours[0], theirs / theirs[0], rtol=1e-6)
