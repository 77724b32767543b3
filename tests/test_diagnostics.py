"""
Diagnostics: known answers, collapsed encoders, all kinds of spaces, no traces in training, the report and the command.
"""

import base64
import html.parser
import itertools
import json
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from envs import BOX, IMAGE, TINY_POLICY, VECTOR, CounterEnv, SpaceEnv, policy_for, tiny_model
from gymnasium import spaces
from helpers import same, snapshot
from matplotlib.figure import Figure
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage
from torch import nn

from sb3_mrq.diagnostics import DiagnosticsCallback, diagnose, measures, verdicts
from sb3_mrq.diagnostics.diagnosis import information
from sb3_mrq.diagnostics.episodes import no_side_effects, play, wrap_env
from sb3_mrq.diagnostics.figures import ITEMS
from sb3_mrq.diagnostics.report import page
from sb3_mrq.diagnostics.results import DORMANT_SHARE
from sb3_mrq.learner import effective_rank
from sb3_mrq.losses import two_hot
from sb3_mrq.zoo import cli

RANDOM = np.random.default_rng(0)
STATE = RANDOM.bit_generator.state


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers, by itself or after others."""
    RANDOM.bit_generator.state = STATE


class WalkEnv(gym.Env):
    """
    A walk in the plane under the action: s' = A s + B a, and a clock. The reward is linear in s and a. Odd episodes terminate
    after ``length`` steps, when the clock shows one, even ones are truncated half-way.
    """

    A = np.array([[0.9, 0.3], [-0.3, 0.9]])
    B = np.array([[0.2, 0.0], [0.1, -0.4]])
    REWARD = np.array([1.0, -0.5, 0.0, 0.25, 0.5])
    observation_space = spaces.Box(-10, 10, (3,), dtype=np.float32)
    action_space = BOX

    def __init__(self, length=10):
        self.length = length
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        self.state = self.np_random.normal(size=2)
        return self.observe(), {}

    def observe(self):
        return np.array([*self.state, self.t / self.length], dtype=np.float32)

    def step(self, action):
        reward = float(self.REWARD @ [*self.observe(), *action])
        self.state = self.A @ self.state + self.B @ action
        self.t += 1
        truncated = self.episode % 2 == 0 and self.t == self.length // 2
        return self.observe(), reward, self.t == self.length, truncated, {}


class Function(nn.Module):
    """A module of a function, which may use other modules."""

    def __init__(self, function, *modules, **attributes):
        super().__init__()
        self.function = function
        self.modules_of_it = nn.ModuleList(modules)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args):
        return self.function(*args)


class ExactEncoder(nn.Module):
    """The true model of ``WalkEnv``: z_s is the state, z_sa state and action, and the prediction is linear but for the code
    of rewards, which takes logits. ``reward_error`` is added to the predicted reward."""

    def __init__(self, bins, length, reward_error=0.0):
        super().__init__()
        a, b = th.as_tensor(WalkEnv.A), th.as_tensor(WalkEnv.B)
        reward = th.as_tensor(WalkEnv.REWARD)

        def predict(z_sa):
            z_sa = z_sa.double()
            next_s = z_sa[:, :2] @ a.T + z_sa[:, 3:] @ b.T
            next_z = th.cat([next_s, z_sa[:, 2:3] + 1 / length], dim=1)
            logits = (two_hot(z_sa @ reward + reward_error, bins.double()) + 1e-300).log()
            return (next_z[:, 2:] > 1 - 1e-3).float(), next_z.float(), logits

        self.state = Function(lambda obs: obs)
        self.state_action = Function(lambda z_s, action: th.cat([z_s, action], dim=1))
        self.predictor = Function(predict, bins=bins.double())


def walk_model(**kwargs):
    return tiny_model(WalkEnv(), **kwargs)


def exact_model(reward_error=0.0):
    model = walk_model()
    policy = model.policy
    encoder = ExactEncoder(policy.encoder.predictor.bins, 10, reward_error)
    policy.encoder, policy.encoder_target = encoder, encoder
    policy.actor = Function(lambda z_s: th.stack([z_s[:, 0] + 1, z_s[:, 1] * z_s[:, 0]], dim=1))
    policy.critic = Function(lambda z_sa: (z_sa @ th.tensor([1.0, 2.0, -1.0, 0.5, 3.0]) + 4)[:, None].expand(-1, 2))
    return model


class TestMeasures:
    def test_explained_variance(self):
        true = RANDOM.normal(size=(50, 3))
        assert measures.explained_variance(true, true) == 1
        assert measures.explained_variance(true, np.broadcast_to(true.mean(0), true.shape)) == pytest.approx(0)
        noisy = true + RANDOM.normal(size=true.shape)
        expected = 1 - ((noisy - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum()
        assert measures.explained_variance(true, noisy) == pytest.approx(expected)
        for nothing in (np.ones(9), np.zeros(9), np.full(9, 0.1, np.float32), np.zeros(0)):
            assert np.isnan(measures.explained_variance(nothing, nothing))

    def test_probe(self):
        n = 600
        features, episodes = RANDOM.normal(size=(n, 5)) * [1, 10, 1e-2, 1, 1] + 100, np.repeat(np.arange(30), 20)
        features[:, 3] = 7
        linear = features @ [1, 0.2, 300, 5, 0] + 1000
        assert measures.ridge_probe(features, linear, episodes).r2 > 0.9999
        probe = measures.ridge_probe(features, linear, episodes)
        assert measures.explained_variance(linear, probe.predictions) == probe.r2
        # Nothing to learn: no better than the mean, though more features than samples fit it exactly
        many, noise = RANDOM.normal(size=(n, 700)), RANDOM.normal(size=n)
        assert -0.2 < measures.ridge_probe(many, noise, episodes).r2 < 0.1
        # A square is not linear
        assert measures.ridge_probe(features[:, :1] - 100, (features[:, 0] - 100) ** 2, episodes).r2 < 0.1
        assert np.isnan(measures.ridge_probe(features, np.ones(n), episodes).r2)
        assert np.isnan(measures.ridge_probe(features[:5], linear[:5], episodes[:5]).r2)

    def test_probe_against_least_squares(self, monkeypatch):
        """Each fold is predicted by a regression on the other folds."""
        monkeypatch.setattr(measures, "RIDGES", (1e-10,))
        features, episodes = RANDOM.normal(size=(400, 4)), np.repeat(np.arange(4), 100)
        targets = features @ [1, 2, 3, 4] + RANDOM.normal(size=400)
        predictions = measures.ridge_probe(features, targets, episodes).predictions
        fold = measures.folds(episodes)
        for k in range(5):
            train = np.c_[features, np.ones(400)][fold != k]
            weights = np.linalg.lstsq(train, targets[fold != k], rcond=None)[0]
            expected = np.c_[features, np.ones(400)][fold == k] @ weights
            np.testing.assert_allclose(predictions[fold == k], expected, atol=1e-6)

    def test_folds(self):
        episodes = np.repeat(np.arange(12), [130, 7, 55, *[40] * 9])
        fold = measures.folds(episodes)
        assert np.bincount(fold).min() > 50
        # Segments stay together, and start anew with each episode
        changes = np.flatnonzero(np.diff(fold)) + 1
        starts = np.flatnonzero(np.diff(episodes, prepend=-1))
        offset = changes - starts[episodes[changes]]
        assert (offset % measures.SEGMENT == 0).all() and len(changes) > 10

    def test_ranks(self):
        basis = np.linalg.qr(RANDOM.normal(size=(40, 40)))[0]
        for rank in (1, 3, 8):
            # Orthogonal deviations of one size in this many directions
            points = np.concatenate([basis[:rank], -basis[:rank]]) + 5
            assert effective_rank(th.from_numpy(measures.singular_values(points))) == pytest.approx(rank)
        assert effective_rank(th.from_numpy(measures.singular_values(np.full((9, 4), 3.3)))) == 0
        tall = RANDOM.normal(size=(100, 6))
        expected = np.linalg.svd(tall - tall.mean(0), compute_uv=False)
        np.testing.assert_allclose(measures.singular_values(tall), expected / expected.sum())
        np.testing.assert_allclose(measures.singular_values(tall.T)[:5], self.spectrum(tall.T)[:5])

    @staticmethod
    def spectrum(points):
        values = np.linalg.svd(points - points.mean(0), compute_uv=False)
        return values / values.sum()

    def test_principal_components(self):
        points = RANDOM.normal(size=(200, 3)) * [5, 1, 0.1] + 3
        mean, components, shares = measures.principal_components(points)
        np.testing.assert_allclose(mean, points.mean(0))
        values = np.linalg.eigvalsh(np.cov(points.T))[::-1]
        np.testing.assert_allclose(shares, values[:2] / values.sum())
        assert components[0, 0] > 0.99
        _, components, shares = measures.principal_components(np.ones((4, 3)))
        assert not components.any() and not shares.any()

    def test_returns(self):
        rewards = RANDOM.normal(size=7)
        expected = [sum(0.9**i * r for i, r in enumerate(rewards[t:])) + 0.9 ** (7 - t) * 5 for t in range(7)]
        np.testing.assert_allclose(measures.discounted_returns(rewards, 0.9, 5.0), expected)


def cosines(one, other):
    """Cosine of each row with each row, (N, N)."""
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return one @ other.T


class TestKnownAnswers:
    def test_exactly_linear(self):
        diagnosis = diagnose(exact_model(), WalkEnv(), n_episodes=12)
        assert diagnosis.n_terminated == 6 and diagnosis.episode_lengths.tolist() == [10, 5] * 6
        model = diagnosis.model
        for name in ("reward_r2", "termination_r2", "embedding_r2"):
            np.testing.assert_allclose(getattr(model, name), 1, atol=1e-5, err_msg=name)
        assert (model.embedding_r2_unchanged < 0.9).all()
        assert model.n.tolist() == [90 - 12 * i for i in range(5)] and model.n_terminated.tolist() == [6] * 5
        # Q is a linear function of state, clock and action, which the observation shows as well
        assert diagnosis.probe.z_sa_r2 > 0.999 and diagnosis.probe.raw_r2 > 0.999

    def test_known_error(self):
        model = diagnose(exact_model(reward_error=0.5), WalkEnv(), n_episodes=12).model
        np.testing.assert_allclose(model.reward_rmse, 0.5, rtol=1e-4)
        assert (model.reward_r2 < 0.99).all() and (model.embedding_r2 > 0.999).all()

    def test_linear_critic_on_learned_embedding(self):
        """The probe finds a critic that is linear in z_sa; the observation alone does not explain it."""
        model = tiny_model(WalkEnv())
        weights = th.as_tensor(RANDOM.normal(size=16), dtype=th.float32)
        model.policy.critic = Function(lambda z_sa: (z_sa @ weights)[:, None].expand(-1, 2))
        model.reward_scale = 3.0
        probe = diagnose(model, WalkEnv(), n_episodes=30).probe
        assert probe.z_sa_r2 > 0.999 > 0.99 > probe.raw_r2

    def test_model_accuracy_by_hand(self):
        """The numbers of a random model, each prediction made by itself."""
        model = walk_model(encoder_horizon=3)
        env = WalkEnv()
        found = diagnose(model, env, n_episodes=4).model
        with no_side_effects(model):
            episodes = play(model, wrap_env(model, WalkEnv()), 4, 0, 0.0, 1000)
            pairs = {step: [] for step in (1, 2, 3)}
            encoder, bins = model.encoder, model.encoder.predictor.bins
            for episode in episodes:
                for t, step in itertools.product(range(len(episode)), (1, 2, 3)):
                    if t + step > len(episode):
                        continue
                    actions = th.as_tensor(episode.actions[t : t + step])[None]
                    done, z, logits = encoder.unroll(th.as_tensor(episode.z_s[t])[None], actions)
                    ends = episode.terminated and t + step == len(episode)
                    reward = (logits[0, -1].double().softmax(-1) * bins.double()).sum().item()
                    pairs[step].append(
                        (
                            reward,
                            episode.rewards[t + step - 1],
                            done[0, -1].item(),
                            float(ends),
                            z[0, -1].numpy(),
                            episode.target_z_s[t + step],
                        )
                    )
        for step, rows in pairs.items():
            reward, true_reward, done, true_done, z, true_z = (np.array(column) for column in zip(*rows, strict=True))
            i = step - 1
            assert found.n[i] == len(rows)
            assert found.reward_r2[i] == pytest.approx(measures.explained_variance(true_reward, reward), rel=1e-4)
            assert found.termination_r2[i] == pytest.approx(measures.explained_variance(true_done, done), rel=1e-4)
            assert found.termination_rmse[i] == pytest.approx(np.sqrt(np.mean((done - true_done) ** 2)), rel=1e-4)
            assert found.embedding_r2[i] == pytest.approx(measures.explained_variance(true_z, z), rel=1e-4)
            if len(rows) <= 256:
                similarities = cosines(z, true_z) / 0.1
                infonce = np.mean([np.log(np.exp(row - row[k]).sum()) for k, row in enumerate(similarities)])
                assert found.information[i] == pytest.approx(np.log(len(rows)) - infonce, rel=1e-3)

    def test_information(self):
        """All of it where embeddings are far apart and predicted, none where they are not."""
        z_s = RANDOM.normal(size=(1000, 64))
        assert information(z_s, z_s, 0.1) == pytest.approx(np.log(256), abs=0.2)
        assert information(RANDOM.normal(size=(1000, 64)), z_s, 0.1) < 0
        assert information(np.ones((50, 3)), np.ones((50, 3)), 0.1) == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("normalized", [False, True])
    def test_returns_by_hand(self, normalized):
        """Predicted and realised returns from an independent loop, in the unit of the training rewards."""
        env = DummyVecEnv([WalkEnv])
        if normalized:
            env = VecNormalize(env, gamma=0.9)
        model = tiny_model(env, gamma=0.9)
        model.learn(60)
        assert model.reward_scale != 1
        eval_env = DummyVecEnv([WalkEnv])
        if normalized:
            # Neither statistics nor rewards of training
            eval_env = VecNormalize(eval_env, norm_reward=False)
        diagnosis = diagnose(model, eval_env, n_episodes=3)
        returns = diagnosis.returns
        assert diagnosis.reward_unit == ("normalised reward" if normalized else "reward")

        loop = WalkEnv()
        predicted, realised, weights, sums = [], [], [], []

        def normalize(obs):
            return env.normalize_obs(obs) if normalized else obs

        def value(obs):
            with th.no_grad():
                z_s = model.encoder.state(th.as_tensor(normalize(obs))[None])
                action = model.actor(z_s).tanh()
                q = model.critic(model.encoder.state_action(z_s, action)).mean().item() * model.reward_scale
            return q, action[0].numpy()

        for episode in range(3):
            obs, _ = loop.reset(seed=0 if episode == 0 else None)
            done, rewards = False, []
            while not done:
                q, action = value(obs)
                predicted.append(q)
                obs, reward, terminated, truncated, _ = loop.step(action)
                rewards.append(reward)
                done = terminated or truncated
            sums.append(sum(rewards))
            last = 0 if terminated else value(obs)[0]
            if normalized:
                rewards = [np.clip(r / np.sqrt(env.ret_rms.var + 1e-8), -10, 10) for r in rewards]
            for t in range(len(rewards)):
                tail = 0.9 ** (len(rewards) - t)
                realised.append(sum(0.9**i * r for i, r in enumerate(rewards[t:])) + tail * last)
                weights.append(0 if terminated else tail)
        np.testing.assert_allclose(returns.predicted, predicted, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(returns.realised, realised, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(returns.tail_weight, weights)
        np.testing.assert_allclose(diagnosis.episode_returns, sums, rtol=1e-3, atol=1e-4)
        counted = np.array(weights) <= 0.7
        assert returns.bias == pytest.approx((np.array(predicted) - realised)[counted].mean(), rel=1e-2, abs=1e-4)
        if normalized:
            assert eval_env.training and not eval_env.norm_reward and eval_env.obs_rms.count < 1

    def test_cut_off(self):
        diagnosis = diagnose(walk_model(), WalkEnv(length=1000), n_episodes=3, max_steps=300)
        assert diagnosis.episode_lengths.tolist() == [300] and diagnosis.n_terminated == 0
        assert any("cut off" in note for note in diagnosis.notes)
        assert diagnosis.returns.tail_weight[0] == pytest.approx(0.99**300)


def collapse(model, change):
    """Pass z_s of both encoders through a function."""
    for encoder in (model.policy.encoder, model.policy.encoder_target):
        inner = encoder.state
        encoder.state = Function(lambda obs, inner=inner: change(inner(obs)), inner)
    return model


def dead(z_s):
    z_s = z_s.clone()
    z_s[:, ::2] = -1.0
    return z_s


class TestCollapse:
    def diagnose(self, change=lambda z_s: z_s, **kwargs):
        return diagnose(collapse(tiny_model(SpaceEnv(length=40), **kwargs), change), SpaceEnv(length=40), n_episodes=3)

    @pytest.mark.parametrize("learned", [False, True])
    def test_untouched(self, learned):
        model = tiny_model(SpaceEnv(length=40))
        if learned:
            model.learn(60)
        diagnosis = diagnose(model, SpaceEnv(length=40), n_episodes=3)
        assert not diagnosis.collapsed and diagnosis.flags == []
        assert diagnosis.z_s.dormant_share == 0 and diagnosis.z_s.effective_rank > 2

    def test_constant(self):
        diagnosis = self.diagnose(lambda z_s: th.ones_like(z_s) * 0.3)
        assert diagnosis.collapsed and diagnosis.z_s.flags[0].startswith("z_s is constant")
        assert diagnosis.z_s.effective_rank == 0 and diagnosis.z_s.dormant_share == 1
        # A figure of it can be drawn all the same
        assert diagnosis.figures().keys() == ITEMS.keys()

    def test_nearly_constant(self):
        assert "z_s is constant" in self.diagnose(lambda z_s: 1 + 1e-3 * z_s).flags[0]

    def test_rank_one(self):
        direction = th.as_tensor(RANDOM.normal(size=16), dtype=th.float32)
        diagnosis = self.diagnose(lambda z_s: (z_s @ direction)[:, None] * direction + 1)
        assert [flag[:4] for flag in diagnosis.z_s.flags] == ["z_s "] and "one direction" in diagnosis.z_s.flags[0]
        assert diagnosis.z_s.effective_rank == pytest.approx(1, abs=0.01)

    def test_dead_units(self):
        diagnosis = self.diagnose(dead)
        assert diagnosis.z_s.flags == [f"z_s has 50% dormant units (limit {DORMANT_SHARE:.0%})."]
        assert diagnosis.z_s.dormant_share == 0.5

    @pytest.mark.parametrize("factor, word", [(1e4, "explodes"), (1e-5, "vanishes")])
    def test_norm(self, factor, word):
        assert word in self.diagnose(lambda z_s: factor * z_s).z_s.flags[0]

    @pytest.mark.parametrize("action_space", [BOX, spaces.Discrete(2)])
    def test_not_finite(self, action_space):
        model = collapse(tiny_model(SpaceEnv(action_space=action_space)), lambda z_s: z_s * np.inf)
        with pytest.raises(ValueError, match="Training has diverged"):
            diagnose(model, SpaceEnv(action_space=action_space), n_episodes=2)


DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR, "level": spaces.Discrete(3)})


class TestSpaces:
    @pytest.mark.parametrize(
        "observation_space, action_space",
        [
            (VECTOR, BOX),
            (VECTOR, spaces.Box(0, 5, (2, 1), dtype=np.float64)),
            (VECTOR, spaces.Discrete(3, start=1)),
            (VECTOR, spaces.MultiDiscrete([2, 3])),
            (VECTOR, spaces.MultiBinary(2)),
            (IMAGE, spaces.Discrete(2)),
            (DICT, BOX),
            (DICT, spaces.Discrete(2)),
            (spaces.Discrete(4), BOX),
            (spaces.MultiDiscrete([3, 4]), spaces.Discrete(2)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_all(self, observation_space, action_space, n_envs):
        def env():
            return SpaceEnv(observation_space, action_space, length=11)

        model = tiny_model(env(), policy_for(observation_space))
        eval_env = env() if n_envs == 1 else DummyVecEnv([env] * n_envs)
        diagnosis = diagnose(model, eval_env, n_episodes=4, exploration_noise=0.3)
        assert diagnosis.episode_lengths.tolist() == [11] * 4
        numbers = diagnosis.numbers()
        assert np.isfinite(
            [numbers[name] for name in ("probe/z_sa_r2", "probe/raw_r2", "z_s/norm", "model/reward_r2_5")]
        ).all()
        # Twice the same, whatever noise there is
        again = diagnose(model, env() if n_envs == 1 else eval_env, n_episodes=4, exploration_noise=0.3)
        assert again.numbers() == pytest.approx(numbers, nan_ok=True)

    def test_as_in_training(self):
        """Observations of images are transposed once, also where the environment does it already."""
        model = tiny_model(SpaceEnv(IMAGE), "CnnPolicy")
        first = diagnose(model, SpaceEnv(IMAGE), n_episodes=2).numbers()
        second = diagnose(model, VecTransposeImage(DummyVecEnv([lambda: SpaceEnv(IMAGE)])), n_episodes=2).numbers()
        assert first == pytest.approx(second, nan_ok=True)

    def test_wrong_environments(self):
        model = tiny_model(SpaceEnv())
        with pytest.raises(ValueError, match="Action spaces do not match"):
            diagnose(model, SpaceEnv(action_space=spaces.Discrete(2)))
        with pytest.raises(ValueError, match="n_episodes"):
            diagnose(model, SpaceEnv(), n_episodes=0)
        model = tiny_model(VecNormalize(DummyVecEnv([SpaceEnv])))
        with pytest.raises(ValueError, match="wrap it in VecNormalize"):
            diagnose(model, SpaceEnv())

    def test_id(self):
        model = tiny_model("CartPole-v1")
        assert diagnose(model, "CartPole-v1", n_episodes=2).env_id == "CartPole-v1"


def learn(callback, normalize=False, n_envs=2, action_space=BOX, **kwargs):
    """Train, and return everything that training depends on."""
    env = DummyVecEnv([lambda: SpaceEnv(action_space=action_space)] * n_envs)
    if normalize:
        env = VecNormalize(env)
    env.seed(3)
    model = tiny_model(env, **kwargs)
    random.seed(1)
    modes = []
    original = model.train
    model.train = lambda *args, **kw: modes.append(model.policy.training) or original(*args, **kw)
    model.learn(80, callback=callback)
    buffer = model.replay_buffer
    state = snapshot(model.policy)
    arrays = [buffer.rewards.copy(), buffer.actions.copy(), buffer.sampling_probabilities()[1]]
    if normalize:
        arrays += [env.obs_rms.mean, env.ret_rms.var, env.returns]
    # What comes next, from every generator and from the environment of training
    actions = np.stack([np.zeros(action_space.shape, action_space.dtype)] * n_envs)
    draws = [random.random(), np.random.rand(), th.rand(1).item(), model.action_space.sample(), env.step(actions)[0]]
    return state, arrays, draws, modes


class TestCallback:
    @pytest.mark.parametrize("normalize, action_space", [(False, BOX), (True, BOX), (False, spaces.Discrete(3))])
    def test_training_is_the_same(self, normalize, action_space):
        eval_env = DummyVecEnv([lambda: SpaceEnv(action_space=action_space)])
        if normalize:
            eval_env = VecNormalize(eval_env, training=False)
        callback = DiagnosticsCallback(eval_env, freq=20, n_episodes=2, figures=False)
        before = learn(None, normalize, action_space=action_space)
        after = learn(callback, normalize, action_space=action_space)
        assert callback.last_diagnosis is not None and callback.last_diagnosis.num_timesteps > 60
        assert same(before[0], after[0])
        for first, second in zip(before[1] + before[2], after[1] + after[2], strict=True):
            np.testing.assert_array_equal(first, second)
        assert before[3] == after[3]

    def test_traces(self):
        """Mode of the policy, generators and environment of training after a diagnosis by itself."""
        model = tiny_model(SpaceEnv())
        model.learn(30)
        model.policy.set_training_mode(True)
        model.action_space.sample()
        env_of_training, last_obs = model.get_env().envs[0].unwrapped, model._last_obs
        t = env_of_training.t
        before = [random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()]
        actions = model.action_space._np_random.bit_generator.state
        diagnose(model, SpaceEnv(), n_episodes=2, exploration_noise=0.5)
        assert before == [random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()]
        assert model.action_space._np_random.bit_generator.state == actions
        assert model.policy.training and model.encoder.training and not model.encoder_target.training
        assert env_of_training.t == t and model._last_obs is last_obs
        assert all(p.grad is None or p.requires_grad for p in model.policy.parameters())

    def test_environment_of_training(self):
        """In that environment learning goes on from a reset."""
        model = tiny_model(CounterEnv())
        model.learn(30)
        diagnose(model, model.get_env(), n_episodes=1)
        assert model._last_obs is None
        model.learn(20, reset_num_timesteps=False)
        with pytest.raises(ValueError, match="environment of its own"):
            model.learn(20, callback=DiagnosticsCallback(model.get_env(), freq=5))

    def test_tensorboard(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        model = tiny_model(SpaceEnv(length=20))
        model.set_logger(configure(str(tmp_path), ["tensorboard", "csv", "stdout"]))
        callback = DiagnosticsCallback(SpaceEnv(length=20), freq=15, n_episodes=2, verbose=1)
        model.learn(31, callback=callback)
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        assert set(events.Tags()["images"]) == {f"diagnostics/{name}" for name in ITEMS}
        numbers = callback.last_diagnosis.numbers()
        assert {f"diagnostics/{name}" for name in numbers} <= set(events.Tags()["scalars"])
        scalars = events.Scalars("diagnostics/z_s/effective_rank")
        assert [event.step for event in scalars] == [15, 30]
        assert scalars[-1].value == pytest.approx(numbers["z_s/effective_rank"])

    def test_wrong_use(self):
        with pytest.raises(ValueError, match="freq is 0"):
            DiagnosticsCallback(SpaceEnv(), freq=0)
        with pytest.raises(ValueError, match="supports the algorithm MRQ, not TD3"):
            TD3("MlpPolicy", SpaceEnv(), buffer_size=10).learn(1, callback=DiagnosticsCallback(SpaceEnv(), freq=1))

    def test_without_sklearn(self, monkeypatch):
        """Known before training, and before any episode is played."""
        monkeypatch.setitem(sys.modules, "sklearn", None)
        message = r'The diagnostics need scikit-learn. Install it with: pip install "sb3-mrq\[train\]"'
        model = tiny_model(SpaceEnv())
        with pytest.raises(ImportError, match=message):
            diagnose(model, SpaceEnv(), n_episodes=1)
        with pytest.raises(ImportError, match=message):
            model.learn(1, callback=DiagnosticsCallback(SpaceEnv(), freq=1))

    def test_none_before_the_first_update(self):
        model = tiny_model(SpaceEnv(), learning_starts=50)
        model.set_logger(Logger(None, []))
        callback = DiagnosticsCallback(SpaceEnv(), freq=5, n_episodes=1, figures=False)
        with pytest.warns(UserWarning, match="Nothing will be learned"):
            model.learn(48, callback=callback)
        assert callback.last_diagnosis is None


class Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def diagnosis():
    model = walk_model()
    model.learn(60)
    return diagnose(model, WalkEnv(), n_episodes=6)


@pytest.fixture(scope="module")
def folder(diagnosis, tmp_path_factory):
    """Where a report was written."""
    folder = tmp_path_factory.mktemp("report") / "new"
    assert diagnosis.report(folder) == folder / "index.html"
    return folder


class TestReport:
    def test_files(self, folder):
        names = {f"{name}.{kind}" for name in ITEMS for kind in ("png", "svg")} | {"diagnosis.json", "index.html"}
        assert {path.name for path in folder.iterdir()} == names
        assert list(ITEMS) == ["model", "probe", "collapse", "map", "returns"]

    def test_page(self, folder, diagnosis):
        text = (folder / "index.html").read_text(encoding="utf-8")
        found = Page(text)
        assert found.open == []
        # Opens without a network: nothing but the images, which are in it
        images = [
            f"data:image/png;base64,{base64.b64encode((folder / f'{name}.png').read_bytes()).decode()}" for name in ITEMS
        ]
        assert found.sources == images
        assert not {"script", "link", "iframe", "object"} & set(found.tags)
        assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
        for item in ITEMS.values():
            assert item.title in found.text and item.reading in found.text
            # A sentence
            assert item.reading.count(".") - item.reading.count("0.") == 1
        words = found.text.split()
        for name, value in diagnosis.numbers().items():
            shown = "n/a" if np.isnan(value) else str(int(value)) if value == int(value) else f"{value:.4g}"
            assert any(shown in word for word in words), (name, shown)
        for verdict in diagnosis.verdicts:
            assert verdict.finding in found.text and verdict.advice in found.text
        # Before the first figure
        assert text.rindex('<p class="verdict') < text.index("<section")

    def test_numbers(self, folder, diagnosis):
        data = json.loads((folder / "diagnosis.json").read_text())
        assert data["numbers"] == {k: None if np.isnan(v) else v for k, v in diagnosis.numbers().items()}
        assert data["verdicts"] == [asdict(verdict) for verdict in diagnosis.verdicts]
        assert data["flags"] == [] and data["collapsed"] is False and data["environment"] == "WalkEnv"

    def test_flags_are_shown(self):
        diagnosis = TestCollapse().diagnose(dead)
        text = Page(page(diagnosis, dict.fromkeys(ITEMS, b""))).text
        assert diagnosis.verdicts[3].level == "red" and diagnosis.flags[0] in text
        figure = Figure()
        ITEMS["collapse"].draw(diagnosis, figure)
        assert figure.get_suptitle() == f"FLAG  {diagnosis.flags[0]}"

    def test_no_trace_in_matplotlib(self, diagnosis):
        import matplotlib
        from matplotlib import pyplot as plt

        before = dict(matplotlib.rcParams), plt.get_fignums()
        diagnosis.figures()
        assert (dict(matplotlib.rcParams), plt.get_fignums()) == before

    def test_without_matplotlib(self, diagnosis, monkeypatch):
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install \"sb3-mrq\[train\]\""):
            diagnosis.figures()


class TestVerdicts:
    """Green, amber and red by the limits that docs/diagnostics.md names, on a diagnosis whose numbers are replaced."""

    @staticmethod
    def verdict(diagnosis, name, **changes):
        part = {"model": diagnosis.model, "probe": diagnosis.probe, "returns": diagnosis.returns}
        changed = {key: replace(part[key], **value) if key in part else value for key, value in changes.items()}
        (verdict,) = [verdict for verdict in replace(diagnosis, **changed).verdicts if verdict.name == name]
        assert verdict.finding and bool(verdict.advice) == (verdict.level in ("amber", "red"))
        return verdict

    @pytest.mark.parametrize("r2, level", [(0.5, "green"), (0.49, "amber"), (0.0, "amber"), (-0.01, "red"), (np.nan, "grey")])
    def test_reward(self, diagnosis, r2, level):
        assert self.verdict(diagnosis, "Reward prediction", model={"reward_r2": np.array([r2, 9])}).level == level

    @pytest.mark.parametrize(
        "r2, unchanged, level",
        [(0.6, 0.5, "green"), (0.6, 0.7, "red"), (0.4, 0.3, "amber"), (-0.1, -0.5, "red"), (np.nan, 0, "grey")],
    )
    def test_embedding(self, diagnosis, r2, unchanged, level):
        """At the last step ahead that is known."""
        model = {"embedding_r2": np.array([r2, np.nan]), "embedding_r2_unchanged": np.array([unchanged, np.nan])}
        assert self.verdict(diagnosis, "Next embedding", model=model).level == level

    @pytest.mark.parametrize("r2, level", [(0.9, "green"), (0.89, "amber"), (0.7, "amber"), (0.69, "red"), (np.nan, "grey")])
    def test_linearity(self, diagnosis, r2, level):
        assert self.verdict(diagnosis, "Linearity", probe={"z_sa_r2": r2}).level == level

    @pytest.mark.parametrize(
        "bias, level, advice",
        [(-10, "green", ""), (-20, "amber", "too low"), (-44, "red", "too low"), (20, "amber", "too high"), (0, "green", "")],
    )
    def test_bias(self, diagnosis, bias, level, advice):
        """In units of the realised returns: theirs is 100 here."""
        realised = np.array([-100.0, 100.0])
        returns = {"predicted": realised + bias, "realised": realised, "tail_weight": np.zeros(2)}
        verdict = self.verdict(diagnosis, "Bias of the value", returns=returns)
        assert verdict.level == level and advice in verdict.advice
        assert verdict.finding.startswith(f"It is {bias:+d}, {abs(bias)} % of the size of the realised returns (100).")
        for nothing in ({"tail_weight": np.ones(2)}, {"realised": np.zeros(2)}):
            assert self.verdict(diagnosis, "Bias of the value", returns=returns | nothing).level == "grey"

    @pytest.mark.parametrize("share, level", [(0.9, "green"), (0.89, "amber"), (0.49, "red")])
    def test_policy(self, diagnosis, share, level):
        assert self.verdict(diagnosis, "The policy agrees with its values", agreement=share).level == level

    def test_documented(self):
        """The table of docs/diagnostics.md holds the limits."""
        text = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text("utf-8")
        rows = dict(re.findall(r"^\| ([A-Z][^|]+?) \| .* \| (.+ \| .+) \|$", text, flags=re.MULTILINE))
        limits = [verdicts.REWARD_R2, verdicts.EMBEDDING_R2, verdicts.LINEARITY_R2, verdicts.RELATIVE_BIAS, verdicts.AGREEMENT]
        names = ["Reward prediction", "Next embedding", "Linearity", "Bias of the value", "The policy agrees with its values"]
        for name, pair in zip(names, limits, strict=True):
            assert [float(number) for number in re.findall(r"\d+\.\d+|\b0\b", rows[name])] == list(pair), name


class TestCommand:
    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["sb3-mrq", "diagnose", *map(str, arguments)])
        cli.main()

    @pytest.fixture
    def logs(self, tmp_path):
        """What rl-zoo3's ``train`` leaves of a run with VecNormalize."""
        run = tmp_path / "logs" / "mrq" / "Pendulum-v1_1"
        (run / "Pendulum-v1").mkdir(parents=True)
        env = VecNormalize(make_vec_env("Pendulum-v1", env_kwargs={"g": 5.0}), gamma=0.9)
        model = tiny_model(env)
        model.learn(40)
        model.save(run / "Pendulum-v1.zip")
        model.save(run / "rl_model_40_steps.zip")
        env.save(run / "Pendulum-v1" / "vecnormalize.pkl")
        config = {"policy": "MlpPolicy", "normalize": "{'gamma': 0.9}", "policy_kwargs": TINY_POLICY}
        (run / "Pendulum-v1" / "config.yml").write_text(yaml.dump(config))
        (run / "Pendulum-v1" / "args.yml").write_text(yaml.dump({"env_kwargs": {"g": 5.0}}))
        self.model = model
        return tmp_path / "logs"

    def test_log_folder(self, logs, monkeypatch, capsys):
        run = logs / "mrq" / "Pendulum-v1_1"
        common = ("--env", "Pendulum-v1", "-f", logs, "-n", 2, "--device", "cpu")
        self.run(monkeypatch, "--algo", "mrq", *common, "--exp-id", 1)
        output = capsys.readouterr().out
        assert f"Loading {run / 'Pendulum-v1.zip'}" in output and f"Report: {run / 'diagnosis' / 'index.html'}" in output
        found = json.loads((run / "diagnosis" / "diagnosis.json").read_text())
        assert found["environment"] == "Pendulum-v1" and found["reward_unit"] == "normalised reward"
        # The same as for the model in memory, in the environment as it was in training
        model = self.model
        eval_env = VecNormalize(make_vec_env("Pendulum-v1", env_kwargs={"g": 5.0}))
        expected = diagnose(model, eval_env, n_episodes=2).numbers()
        for name, value in expected.items():
            if not np.isnan(value):
                assert found["numbers"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name

    def test_file(self, tmp_path, monkeypatch, capsys):
        tiny_model("CartPole-v1").save(tmp_path / "agent.zip")
        self.run(
            monkeypatch,
            "--model",
            tmp_path / "agent.zip",
            "--env",
            "CartPole-v1",
            "-n",
            2,
            "--n-envs",
            2,
            "-o",
            tmp_path / "out",
        )
        assert (tmp_path / "out" / "index.html").is_file()
        output = capsys.readouterr().out
        assert "2 Episodes" in output
        assert re.search(r"^GREY   Reward prediction: All rewards are the same", output, flags=re.MULTILINE)
        assert re.search(r"^(GREEN|AMBER|RED)\s+Linearity: ", output, flags=re.MULTILINE)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--env", "Pendulum-v1", "-f", "nowhere"), "not found"),
            (("--env", "Pendulum-v1", "--model", "nowhere.zip"), "nowhere.zip"),
            (("--env", "Pendulm-v1"), "Did you mean Pendulum-v1"),
        ],
    )
    def test_errors(self, arguments, message, monkeypatch, capsys):
        with pytest.raises(SystemExit, match="2"):
            self.run(monkeypatch, *arguments)
        assert message in capsys.readouterr().err


def test_models_of_other_algorithms():
    with pytest.raises(ValueError, match="diagnose is for models of MRQ, not of TD3"):
        diagnose(TD3("MlpPolicy", WalkEnv(), buffer_size=10, policy_kwargs={"net_arch": [8]}), WalkEnv())


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_episodes", 1.5), ("n_episodes", 0), ("n_episodes", "3"), ("max_steps", 0), ("exploration_noise", -1)],
)
def test_arguments_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, but must be"):
        diagnose(walk_model(), WalkEnv(), **{name: value})
    if name != "exploration_noise":
        with pytest.raises(ValueError, match=f"^{name} is {value!r}, but must be"):
            DiagnosticsCallback(WalkEnv(), freq=10, **{name: value})


def test_seed_of_numpy():
    diagnosis = diagnose(walk_model(), WalkEnv(), n_episodes=np.int64(2), seed=np.int64(3))
    assert len(diagnosis.episode_returns) == 2
