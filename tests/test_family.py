"""
What a member of the family overrides: each of these classes changes one thing in a few lines, and trains, eager, compiled and
captured, differently from MR.Q.
"""

import inspect
from functools import partial

import numpy as np
import pytest
import recorded_graph
import torch as th
from envs import BOX, TINY, TINY_POLICY, VECTOR, SpaceEnv
from helpers import snapshot

from sb3_mrq import DRQ, MRQ, MlpPolicy
from sb3_mrq.accelerate.graphs import Graph
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.priorities import PriorityTree
from sb3_mrq.learner import Learner


class SmallPredictionsLearner(Learner):
    """An additional encoder term."""

    def encoder_terms(self, samples, predictions, target_z_s):
        size = (samples.mask * predictions.z_s.square().mean(dim=-1)).mean()
        return super().encoder_terms(samples, predictions, target_z_s) | {"size": (0.5, size)}


class WithSmallPredictions(MRQ):
    learner_class = SmallPredictionsLearner


class NoTerminationLearner(Learner):
    """No termination term."""

    def encoder_terms(self, samples, predictions, target_z_s):
        terms = super().encoder_terms(samples, predictions, target_z_s)
        del terms["termination"]
        return terms


class WithoutTermination(MRQ):
    learner_class = NoTerminationLearner


class MeanLearner(Learner):
    """The mean of the heads instead of the minimum."""

    def bootstrap(self, next_q):
        return next_q.mean(dim=1, keepdim=True)


class WithMean(MRQ):
    learner_class = MeanLearner


class SquaredTree(PriorityTree):
    """Priorities count twice."""

    def set(self, indices, priorities):
        super().set(indices, priorities.to(th.float64).square())


class SquaredBuffer(SubtrajectoryReplayBuffer):
    priorities_class = SquaredTree


class WithOtherPriorities(MRQ):
    default_replay_buffer_class = SquaredBuffer


class ShiftedBuffer(SubtrajectoryReplayBuffer):
    """Rewards that are changed when they are read."""

    def read(self, slots, starts, n_steps, ends_only=False):
        samples = super().read(slots, starts, n_steps, ends_only)
        return samples._replace(rewards=samples.mask * (samples.rewards - 3 * samples.actions[..., 0].abs()))


class WithOtherRewards(MRQ):
    default_replay_buffer_class = ShiftedBuffer


class BestOfTwoPolicy(MlpPolicy):
    """Acts by the better one of two actions, by its own values."""

    def act(self, observation, sample):
        action = super().act(observation, sample)
        z_s = self.encoder.state(self.preprocess(observation))
        values = [self.critic(self.encoder.state_action(z_s, a)).amin(dim=1, keepdim=True) for a in (action, -action)]
        return th.where(values[0] > values[1], action, -action)


class WithSearch(MRQ):
    policy_aliases = MRQ.policy_aliases | {"MlpPolicy": BestOfTwoPolicy}


class WithoutClipAndScale(MRQ):
    """Two of the parts that have an "off" value."""

    def __init__(self, *args, max_grad_norm=None, reward_scaling=False, **kwargs):
        super().__init__(*args, max_grad_norm=max_grad_norm, reward_scaling=reward_scaling, **kwargs)


MEMBERS = [
    *(WithSmallPredictions, WithoutTermination, WithMean, WithOtherPriorities, WithOtherRewards),
    *(WithSearch, WithoutClipAndScale),
]
WITH_SIBLINGS = [*MEMBERS, DRQ]


class TerminatingEnv(SpaceEnv):
    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, 100 * reward, truncated, False, info


@pytest.fixture(params=["eager", "compiled", "captured"])
def mode(request, monkeypatch):
    if request.param == "captured":
        monkeypatch.setattr(Graph, "can_capture", staticmethod(lambda device: True))
        monkeypatch.setattr(Graph, "capture", staticmethod(recorded_graph.capture))
        monkeypatch.setattr("sb3_mrq.accelerate.updates.CompiledFunction", lambda function, *_: function)
    if request.param == "compiled":
        monkeypatch.setattr(th, "compile", partial(th.compile, backend="aot_eager"))
    return request.param


def train(member, mode, steps=40, **kwargs):
    arguments = TINY | {"compile_updates": mode != "eager", "min_td_error": 0.01} | kwargs
    model = member("MlpPolicy", TerminatingEnv(VECTOR, BOX, length=7), policy_kwargs=TINY_POLICY, **arguments)
    model.learn(steps)
    return model


def logged(model):
    model._log_value_and_policy()
    return {name for name in model.logger.name_to_value if name.startswith("train/")}


@pytest.mark.filterwarnings("error:.*could not be")
@pytest.mark.parametrize("member", WITH_SIBLINGS)
def test_member(member, mode):
    """It trains, in every mode to much the same weights, and to other ones than MR.Q."""
    if mode == "compiled" and member is not DRQ and member.learner_class is Learner:
        pytest.skip("compiles what MR.Q compiles")
    model, eager, plain = train(member, mode), train(member, "eager"), train(MRQ, "eager")
    assert model._n_updates == 30
    assert (model.updates.captured, model.updates.compiled) == (mode == "captured", mode != "eager")
    if mode == "compiled":
        for name, value in snapshot(model.policy).items():
            np.testing.assert_allclose(value, snapshot(eager.policy)[name], rtol=1e-2, atol=5e-3, err_msg=name)
    ours, theirs = snapshot(eager.policy), snapshot(plain.policy)
    assert any(not th.equal(ours[name], theirs[name]) for name in ours)
    assert all(value.isfinite().all() for value in snapshot(model.policy).values())


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_is_short(member):
    own = [member, member.learner_class, member.default_replay_buffer_class, member.policy_aliases["MlpPolicy"]]
    own += [member.default_replay_buffer_class.priorities_class]
    lines = sum(len(inspect.getsource(each).splitlines()) for each in own if each.__module__ == __name__)
    assert lines <= 15


def test_terms_are_logged(mode):
    model = train(WithSmallPredictions, mode, steps=36)
    assert "train/size_loss" in logged(model)
    assert "train/termination_loss" not in logged(train(WithoutTermination, mode, steps=36))


def test_no_reward_scale():
    model = train(WithoutClipAndScale, "eager")
    assert model.reward_scale == model.target_reward_scale == 1
    assert train(MRQ, "eager").reward_scale > 10


def test_training_without_an_environment(mode, tmp_path):
    """From a buffer that was filled by hand, with a model that has no environment and never called ``learn``."""
    model = train(MRQ, "eager")
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    alone = MRQ.load(tmp_path / "model", device="cpu", compile_updates=mode != "eager")
    assert alone.get_env() is None
    alone.load_replay_buffer(tmp_path / "buffer")
    before = snapshot(alone.policy)
    alone.train(25, batch_size=8)
    assert alone._n_updates == 55
    after = snapshot(alone.policy)
    for network in ("encoder", "critic", "actor"):
        assert any(not th.equal(before[name], after[name]) for name in before if name.startswith(f"{network}."))
