"""
What is updated when, and with which numbers (section 8 of the algorithm): a small agent in an environment without chance,
and a record of all calls of its learner.
"""

import inspect
import warnings
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import NETWORKS, PAPER, TARGETS, same, snapshot
from scipy import stats
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mrq import MRQ, losses
from sb3_mrq.checks import DivergedError

SMALL = dict(
    policy_kwargs=dict(net_arch=dict(encoder=[8], qf=[8], pi=[8]), z_s_dim=8, z_a_dim=4, z_sa_dim=8),
    batch_size=4,
    buffer_size=300,
    learning_starts=10,
    target_update_interval=5,
    device="cpu",
    seed=0,
)
ACTION_SPACE = spaces.Box(np.array([-2.0, -1.0], dtype=np.float32), np.array([6.0, 0.0], dtype=np.float32))
MIDDLE = np.array([2.0, -0.5])


def alternating_rewards(step):
    """No two are equal, and neither are their means at different times."""
    return (-1) ** step * (1 + 0.1 * step)


class ToyEnv(gym.Env):
    """
    The observation is where in which episode it is, whatever the action.

    :param episodes: lengths of the episodes and how they end, over and over
    :param reward: from the number of the step, over all episodes
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = ACTION_SPACE

    def __init__(self, episodes=((7, "terminated"),), reward=alternating_rewards):
        self.episodes = episodes
        self.reward = reward
        self.episode, self.step_in_episode = -1, 0
        self.actions, self.rewards = [], []

    def _obs(self):
        return np.array([self.episode, self.step_in_episode], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.actions.append(action)
        self.rewards.append(float(self.reward(len(self.rewards))))
        self.step_in_episode += 1
        length, end = self.episodes[self.episode % len(self.episodes)]
        ended = self.step_in_episode == length
        return self._obs(), self.rewards[-1], ended and end == "terminated", ended and end == "truncated", {}


def make_model(env=None, **kwargs):
    return MRQ("MlpPolicy", ToyEnv() if env is None else env, **(SMALL | kwargs))


def make_vec_env(*envs):
    return DummyVecEnv([lambda env=env: env for env in envs])


def state(model, names):
    """Copies of the weights of some networks."""
    return {f"{name}.{key}": value for name in names for key, value in snapshot(getattr(model, name)).items()}


def record(model):
    """
    Note all calls of the learner from now on.

    :return: a list that fills with the calls in their order: kind ("targets", "encoder" or "value"), training step k, time,
        arguments, result, weights of the online and target networks after it, and the replay buffer's probabilities before it
        and after
    """
    calls = []

    def probabilities():
        return dict(zip(*(array.tolist() for array in model.replay_buffer.sampling_probabilities()), strict=True))

    def wrap(kind, name):
        method = getattr(model.learner, name)

        def wrapped(*args, **kwargs):
            bound = inspect.signature(method).bind(*args, **kwargs)
            bound.apply_defaults()
            # Some of the tensors are overwritten later
            arguments = deepcopy(bound.arguments)
            arguments |= {"reward_scale": model.reward_scale, "target_reward_scale": model.target_reward_scale}
            arguments |= arguments["samples"]._asdict() if "samples" in arguments else {}
            arguments["termination_switch"] = model.learner.termination_switch.clone()
            call = SimpleNamespace(kind=kind, k=model._n_updates, timestep=model.num_timesteps, arguments=arguments)
            call.probabilities_before = probabilities()
            call.result = method(*args, **kwargs)
            call.probabilities_after = probabilities()
            call.online, call.targets = state(model, NETWORKS), state(model, TARGETS)
            calls.append(call)
            return call.result

        setattr(model.learner, name, wrapped)

    wrap("targets", "replace_targets")
    wrap("encoder", "update_encoder")
    wrap("value", "update_value_and_policy")
    return calls


def of_kind(calls, kind):
    return [call for call in calls if call.kind == kind]


# --------------------------------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 5, 8])
def test_order_of_updates(interval):
    """
    At every k that the interval divides, 0 among them, the targets are replaced and that many encoder updates follow. Every
    step has one value and policy update.
    """
    model = make_model(target_update_interval=interval)
    calls = record(model)
    model.learn(22)
    expected = []
    for k in range(12):
        if k % interval == 0:
            expected += [("targets", k)] + interval * [("encoder", k)]
        expected.append(("value", k))
    assert [(call.kind, call.k) for call in calls] == expected
    assert [call.timestep for call in of_kind(calls, "value")] == list(range(11, 23))
    assert model._n_updates == 12


def test_every_update_has_a_fresh_batch():
    """The transitions of a batch are known by their rewards."""
    model = make_model(target_update_interval=10)
    calls = record(model)
    model.learn(40)
    for kind, n_updates, horizon in (("encoder", 30, 5), ("value", 30, 3)):
        batches = [call.arguments["rewards"] for call in of_kind(calls, kind)]
        assert all(batch.shape == (4, horizon) for batch in batches)
        assert len(batches) == n_updates
        assert len({tuple(batch.flatten().tolist()) for batch in batches}) == n_updates


def test_targets_are_the_online_networks_as_they_were_at_the_replacement():
    """The targets change at once and wholesale, and not in between."""
    model = make_model()
    calls = record(model)
    model.learn(22)
    online = targets = None
    n_replacements = 0
    for call in calls:
        if call.kind == "targets":
            # As they were before, whatever the targets were
            assert online is None or same(call.online, online)
            assert targets is None or not same(call.targets, targets)
            assert list(call.online.values()) and all(
                th.equal(*pair) for pair in zip(call.online.values(), call.targets.values(), strict=True)
            )
            targets = call.targets
            n_replacements += 1
        else:
            assert same(call.targets, targets)
            assert not same(call.online, online)
        online = call.online
    assert n_replacements == 3


# --------------------------------------------------------------------------------------------------------------------
# Reward scale
# --------------------------------------------------------------------------------------------------------------------


def mean_abs(rewards):
    return np.mean(np.abs(rewards))


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
def test_reward_scale():
    """rbar is 1 at first and then the mean absolute reward of the buffer at the time of the last replacement."""
    env = ToyEnv()
    model = make_model(env)
    calls = record(model)
    assert model.reward_scale == 1
    model.learn(10)
    assert model.reward_scale == 1
    model.learn(12, reset_num_timesteps=False)
    # The buffer held 11 rewards at the first replacement, 16 and 21 at the next ones
    for call in of_kind(calls, "value"):
        n_rewards = 11 + 5 * (call.k // 5)
        assert float(call.arguments["reward_scale"]) == pytest.approx(mean_abs(env.rewards[:n_rewards]), rel=1e-6)
    assert model.reward_scale == pytest.approx(mean_abs(env.rewards[:21]), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
def test_target_reward_scale():
    """rbar' is 0 before the first replacement, and from the second one on the rbar of the time before."""
    env = ToyEnv()
    model = make_model(env)
    calls = record(model)
    assert model.target_reward_scale == 0
    model.learn(10)
    assert model.target_reward_scale == 0
    model.learn(12, reset_num_timesteps=False)
    scales = {call.k: float(call.arguments["target_reward_scale"]) for call in of_kind(calls, "value")}
    first, second = mean_abs(env.rewards[:11]), mean_abs(env.rewards[:16])
    np.testing.assert_allclose([scales[k] for k in range(5, 12)], 5 * [first] + 2 * [second], rtol=1e-6)
    assert model.target_reward_scale == pytest.approx(second, rel=1e-6)


def test_target_reward_scale_after_the_first_replacement():
    """rbar' <- rbar there as everywhere, which is 1 until then."""
    model = make_model()
    calls = record(model)
    model.learn(15)
    scales = {call.k: float(call.arguments["target_reward_scale"]) for call in of_kind(calls, "value")}
    assert scales == dict.fromkeys(range(5), 1.0)


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
def test_interrupted_encoder_phase():
    """It goes on where it was, with the targets and both reward scales that it began with, before the next step."""
    model = make_model()
    model.learn(17)
    assert model._n_updates == 7
    update, n_calls = model.learner.update_encoder, []

    def interrupted(*args, **kwargs):
        n_calls.append(1)
        if len(n_calls) == 3:
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    with mock.patch.object(model.learner, "update_encoder", interrupted), pytest.raises(KeyboardInterrupt):
        model.learn(10, reset_num_timesteps=False)
    assert model._n_updates == 10
    scales = model.reward_scale, model.target_reward_scale
    assert scales[0] != scales[1]
    calls = record(model)
    model.learn(1, reset_num_timesteps=False)
    assert [call.kind for call in calls] == ["encoder"] * 3 + ["value"] * 2
    assert (model.reward_scale, model.target_reward_scale) == scales


def test_reward_scale_without_rewards():
    """rbar is at least 1e-8, and losses stay finite."""
    model = make_model(ToyEnv(reward=lambda step: 0.0))
    calls = record(model)
    model.learn(22)
    assert model.reward_scale == pytest.approx(1e-8)
    for call in of_kind(calls, "value"):
        priorities, metrics = call.result
        assert all(entry.isfinite() for entry in metrics.values())
        assert priorities.isfinite().all()
    assert all(value.isfinite().all() for value in calls[-1].online.values())


def test_reward_scale_where_rewards_are_gone(tmp_path):
    """Training that goes on with a new buffer, without rewards so far: the values keep their units."""
    model = make_model(ToyEnv(reward=lambda step: 3.0))
    model.learn(22)
    assert model.reward_scale == 3
    model.save(tmp_path / "model")
    loaded = MRQ.load(tmp_path / "model", env=ToyEnv(reward=lambda step: 0.0), device="cpu")
    loaded.learn(22, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates + loaded.target_update_interval
    assert loaded.replay_buffer.mean_abs_reward() == 0
    assert (loaded.reward_scale, loaded.target_reward_scale) == (3, 3)


def test_second_warm_up_is_told():
    model = make_model()
    model.learn(22)
    with pytest.warns(UserWarning, match="steps will be random again.*reset_num_timesteps=False"):
        model.learn(22)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(5, reset_num_timesteps=False)


@pytest.mark.parametrize("alpha", [0.4, 0.0])
def test_divergence_is_told(alpha):
    """Also where transitions are drawn uniformly, so that no priority tells."""
    model = make_model(ToyEnv(reward=alternating_rewards), priority_alpha=alpha)
    model.learn(20)
    with th.no_grad():
        next(model.critic.parameters()).fill_(th.nan)
    with pytest.raises(DivergedError, match="Training has diverged"):
        model.train(2 * model.METRICS_INTERVAL, batch_size=8)


@pytest.mark.parametrize(("alpha", "least"), [(1e3, 1.0), (1e3, 0.5)])
def test_powers_that_are_no_priorities(alpha, least):
    """The power of a TD error is infinite or zero, not the TD error: nothing has diverged."""
    model = make_model(ToyEnv(reward=alternating_rewards), priority_alpha=alpha, min_td_error=least)
    with pytest.raises(ValueError, match=r"priority_alpha is 1000\.0 and min_td_error .*between 0 and 1") as info:
        with th.no_grad():
            model.critic.layers[-1].bias.fill_(1e3 if least == 1 else 0.0)
        model.learn(200)
    assert not isinstance(info.value, DivergedError) and "learning rate" not in str(info.value)


@pytest.mark.parametrize("network", ["actor", "encoder"])
@pytest.mark.parametrize("action_space", [ACTION_SPACE, spaces.Discrete(3)], ids=["Box", "Discrete"])
def test_environments_get_no_action_that_is_not_a_number(network, action_space):
    """Nor one that was chosen among numbers that are not."""
    env = ToyEnv(reward=alternating_rewards)
    env.action_space = action_space
    model = make_model(env)
    model.learn(20)
    with th.no_grad():
        next(getattr(model, network).parameters()).fill_(th.nan)
    n_steps = len(env.rewards)
    with pytest.raises(DivergedError, match="the policy's action is"):
        model.learn(20, reset_num_timesteps=False)
    assert len(env.rewards) == n_steps


def test_embeddings_that_are_not_finite():
    """The last encoder update of a burst may be the one that goes wrong."""
    model = make_model(ToyEnv(reward=alternating_rewards))
    model.learn(20)
    update = model.updates.encoder

    def spoil():
        update()
        with th.no_grad():
            next(model.encoder.parameters()).fill_(th.inf)

    model.updates.encoder = spoil
    model.target_update_interval = 1
    with pytest.raises(DivergedError, match="embeddings are not finite"):
        model.train(1, batch_size=8)


def test_reward_scale_under_normalised_rewards():
    """Section 4: with VecNormalize, rbar is the mean absolute reward in the normalisation of the time."""
    env = ToyEnv(reward=lambda step: 10 * alternating_rewards(step))
    vec_env = VecNormalize(make_vec_env(env))
    model = make_model(vec_env)
    calls = record(model)
    scales = []
    for n_steps in (11, 5):
        model.learn(n_steps, reset_num_timesteps=False)
        # Trained at the very end, when the normalisation was the one it is now
        scales.append(mean_abs(vec_env.normalize_reward(np.array(env.rewards))))
        assert model.reward_scale == pytest.approx(scales[-1], rel=1e-5)
        assert abs(model.reward_scale / mean_abs(env.rewards) - 1) > 0.5
    assert [call.k for call in of_kind(calls, "targets")] == [0, 5]
    assert scales[0] != pytest.approx(scales[1], rel=1e-2)
    # And so are the rewards of the batches
    normalised = vec_env.normalize_reward(np.array(env.rewards))
    last = of_kind(calls, "value")[-1].arguments
    rewards = last["rewards"][last["mask"] == 1].numpy()
    assert np.abs(rewards[:, None] - normalised).min(axis=1).max() < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# How many training steps
# --------------------------------------------------------------------------------------------------------------------


def test_parallel_environments():
    """As many training steps as transitions; the schedule counts them, and learning_starts counts transitions."""
    envs = [ToyEnv(episodes=((length, "truncated"),)) for length in (3, 5, 8)]
    model = make_model(make_vec_env(*envs))
    calls = record(model)
    model.learn(21)
    assert [len(env.rewards) for env in envs] == [7, 7, 7]
    # 12 is the first multiple of 3 beyond 10
    assert [call.timestep for call in of_kind(calls, "value")] == 3 * [12] + 3 * [15] + 3 * [18] + 3 * [21]
    assert [call.k for call in of_kind(calls, "value")] == list(range(12))
    assert [call.k for call in of_kind(calls, "targets")] == [0, 5, 10]
    # At k = 10 the buffer holds all 21 rewards
    assert model.reward_scale == pytest.approx(mean_abs([env.rewards for env in envs]), rel=1e-6)


@pytest.mark.parametrize(
    "train_freq, gradient_steps, expected",
    [
        (1, -1, list(range(11, 25))),
        (1, 3, sorted(3 * list(range(11, 25)))),
        ((4, "step"), -1, 4 * [12] + 4 * [16] + 4 * [20] + 4 * [24]),
        ((4, "step"), 2, 2 * [12] + 2 * [16] + 2 * [20] + 2 * [24]),
        # Episodes of 3 and 5 steps in turn
        ((1, "episode"), -1, 3 * [11] + 5 * [16] + 3 * [19] + 5 * [24]),
        ((2, "episode"), -1, 8 * [16] + 8 * [24]),
        ((2, "episode"), 3, 3 * [16] + 3 * [24]),
        (1, 0, []),
    ],
)
def test_training_frequency(train_freq, gradient_steps, expected):
    """The time of every training step. Without any, nothing is trained."""
    env = ToyEnv(episodes=((3, "terminated"), (5, "truncated")))
    model = make_model(env, train_freq=train_freq, gradient_steps=gradient_steps)
    before = state(model, NETWORKS + TARGETS)
    calls = record(model)
    model.learn(24)
    assert len(env.rewards) == 24
    assert [call.timestep for call in of_kind(calls, "value")] == expected
    assert model._n_updates == len(expected)
    assert [call.k for call in of_kind(calls, "targets")] == list(range(0, len(expected), 5))
    assert same(before, state(model, NETWORKS + TARGETS)) == (not expected)


@pytest.mark.parametrize("length, first", [(50, 5), (3, 3), (1, 1)])
def test_nothing_is_trained_while_there_is_no_start_to_sample(length, first):
    """A start needs its whole horizon, or the end of its episode; until there is one, k does not advance."""
    model = make_model(ToyEnv(episodes=((length, "truncated"),)), learning_starts=0)
    calls = record(model)
    before = state(model, NETWORKS + TARGETS)
    for timestep in range(1, 8):
        model.learn(1, reset_num_timesteps=False)
        if timestep < first:
            assert model._n_updates == 0
            assert model.reward_scale == 1
            assert same(before, state(model, NETWORKS + TARGETS))
    trained = of_kind(calls, "value")
    assert [(call.k, call.timestep) for call in trained] == list(enumerate(range(first, 8)))
    assert [call.k for call in of_kind(calls, "targets")] == list(range(0, 8 - first, 5))


def test_schedule_goes_on_after_loading(tmp_path):
    """``_n_updates`` and both reward scales are saved, so that the next replacement comes when it is due."""
    model = make_model()
    model.learn(17)
    assert model._n_updates == 7
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    loaded = MRQ.load(tmp_path / "model", env=ToyEnv(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    for name in ("_n_updates", "reward_scale", "target_reward_scale", "num_timesteps"):
        assert getattr(loaded, name) == getattr(model, name), name
    calls = record(loaded)
    loaded.learn(4, reset_num_timesteps=False)
    assert [(call.kind, call.k) for call in calls if call.kind != "encoder"] == [
        ("value", 7),
        ("value", 8),
        ("value", 9),
        ("targets", 10),
        ("value", 10),
    ]
    for call in of_kind(calls, "value")[:3]:
        assert float(call.arguments["reward_scale"]) == model.reward_scale
        assert float(call.arguments["target_reward_scale"]) == model.target_reward_scale
    assert float(calls[-1].arguments["target_reward_scale"]) == model.reward_scale


# --------------------------------------------------------------------------------------------------------------------
# What goes into an update, and what comes of it
# --------------------------------------------------------------------------------------------------------------------


def test_termination_switch():
    """Section 3: off until an episode has terminated, and on ever after, also when that transition has left the buffer."""
    episodes = 2 * ((4, "truncated"),) + ((4, "terminated"),) + 100 * ((4, "truncated"),)
    model = make_model(ToyEnv(episodes), learning_starts=4, target_update_interval=2, buffer_size=15)
    calls = record(model)
    model.learn(36)
    switches = {call.timestep: float(call.arguments["termination_switch"]) for call in of_kind(calls, "encoder")}
    assert switches == {timestep: float(timestep >= 12) for timestep in range(5, 37, 2)}
    # Past the end of an episode there is no termination either
    terminated = {call.timestep: call.arguments["terminated"].sum().item() for call in of_kind(calls, "value")}
    assert any(terminated.values())
    assert not any(n for timestep, n in terminated.items() if timestep < 12 or timestep > 30)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_actions_are_random_before_learning_starts(n_envs):
    """Section 6: until then uniform over the space; afterwards the policy's, here always the middle of the space."""
    envs = [ToyEnv() for _ in range(n_envs)]
    model = make_model(make_vec_env(*envs), gradient_steps=0, exploration_noise=0.0, learning_starts=300)
    for parameter in model.actor.parameters():
        parameter.data.zero_()
    model.learn(330)
    random = np.concatenate([env.actions[: 300 // n_envs] for env in envs])
    learned = np.concatenate([env.actions[300 // n_envs :] for env in envs])
    assert len(random) == 300
    assert len(learned) == 30
    np.testing.assert_allclose(learned, np.tile(MIDDLE, (30, 1)), atol=1e-6)
    for dim in range(2):
        low, high = ACTION_SPACE.low[dim], ACTION_SPACE.high[dim]
        assert stats.kstest(random[:, dim], stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_exploration_noise():
    """Section 6: normal, 0.2 of half the range, where transitions are collected; none in ``predict``."""
    env = ToyEnv()
    model = make_model(env, gradient_steps=0, learning_starts=0, buffer_size=1000)
    for parameter in model.actor.parameters():
        parameter.data.zero_()
    model.learn(600)
    noise = (np.array(env.actions) - MIDDLE) / ((ACTION_SPACE.high - ACTION_SPACE.low) / 2)
    for dim in range(2):
        assert stats.kstest(noise[:, dim], stats.norm(0, 0.2).cdf).pvalue > 1e-3
        assert abs(noise[:, dim].std() / 0.2 - 1) < 0.1
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.15
    # The buffer holds the executed actions, scaled to [-1, 1]
    np.testing.assert_allclose(model.replay_buffer.actions[:7], noise[:7], atol=1e-5)
    for deterministic in (True, False):
        action, _ = model.predict(np.zeros((10, 2), dtype=np.float32), deterministic=deterministic)
        np.testing.assert_allclose(action, np.tile(MIDDLE, (10, 1)), atol=1e-6)


def test_priorities():
    """Section 7: value updates set max(|Q_1 - y|, |Q_2 - y|, 1) ** 0.4 for their batch, encoder updates set nothing."""
    # A few rewards are far larger than the mean
    model = make_model(ToyEnv(reward=lambda step: 1000.0 if step % 6 == 0 else 1.0))
    calls = record(model)
    value_loss, update_priorities = losses.value_loss, model.replay_buffer.update_priorities
    updates = []

    def spy_on_priorities(indices, priorities):
        update_priorities(indices, priorities)
        probabilities = dict(zip(*(a.tolist() for a in model.replay_buffer.sampling_probabilities()), strict=True))
        updates.append(SimpleNamespace(indices=indices, priorities=priorities, probabilities=probabilities))

    with (
        mock.patch.object(losses, "value_loss", wraps=value_loss) as loss_spy,
        mock.patch.object(model.replay_buffer, "update_priorities", spy_on_priorities),
    ):
        model.learn(30)

    for call in calls:
        assert call.probabilities_before == call.probabilities_after
    burst = [call.probabilities_before for call in calls if call.k == 10]
    assert len(burst) == 7
    assert all(probabilities == burst[0] for probabilities in burst)

    assert len(updates) == len(loss_spy.call_args_list) == 20
    largest = 0.0
    for update, loss_call in zip(updates, loss_spy.call_args_list, strict=True):
        arguments = inspect.signature(value_loss).bind(*loss_call.args, **loss_call.kwargs).arguments
        error = (arguments["q"] - arguments["target"]).abs().detach().numpy()
        assert error.shape == (4, 2)
        expected = np.maximum(error.max(axis=1), 1) ** 0.4
        np.testing.assert_allclose(update.priorities, expected, rtol=1e-5)
        # A start may be in the batch twice, with different noise
        by_index = {index: set() for index in update.indices.tolist()}
        for index, priority in zip(update.indices.tolist(), expected.tolist(), strict=True):
            by_index[index].add(priority)
        single = {index: priorities.pop() for index, priorities in by_index.items() if len(priorities) == 1}
        scales = [update.probabilities[index] / priority for index, priority in single.items()]
        np.testing.assert_allclose(scales, scales[0] if scales else [], rtol=1e-4)
        largest = max(largest, expected.max())
    assert largest > 1.2


def test_learning_rate_schedules():
    """learning_rate is for value heads and policy, encoder_learning_rate for the encoder, both of the remaining progress."""
    model = make_model(
        learning_rate=lambda progress: 1e-3 * (1 + progress), encoder_learning_rate=lambda progress: 1e-2 * (2 + progress)
    )
    seen = []

    def note_rates(*args, **kwargs):
        seen.append([getattr(model, name).optimizer.param_groups[0]["lr"] for name in ("critic", "actor", "encoder")])
        return mock.DEFAULT

    update = model.learner.update_value_and_policy
    with mock.patch.object(model.learner, "update_value_and_policy", wraps=update, side_effect=note_rates):
        model.learn(20)
    progress = 1 - np.arange(11, 21) / 20
    expected = np.stack([1e-3 * (1 + progress), 1e-3 * (1 + progress), 1e-2 * (2 + progress)], axis=1)
    np.testing.assert_allclose(seen, expected, rtol=1e-9)


def test_defaults_are_those_of_the_paper():
    """Sections 3 to 8: every constant. The default precision depends on the processor."""
    model = MRQ("MlpPolicy", ToyEnv(), device="cpu", precision="float32")
    assert asdict(model.learner.hyperparameters) == PAPER | {"random_shift_pad": 4}
    expected = dict(
        buffer_size=1_000_000,
        learning_starts=10_000,
        batch_size=256,
        gradient_steps=-1,
        target_update_interval=250,
        exploration_noise=0.2,
        random_shift_pad=4,
    )
    assert {name: getattr(model, name) for name in expected} == expected
    assert (model.train_freq.frequency, model.train_freq.unit.value) == (1, "step")
    assert (model.replay_buffer.horizon, model.replay_buffer.n_steps) == (5, 3)
    assert model.policy.n_critics == 2
    for name, rate in (("encoder", 1e-4), ("critic", 3e-4), ("actor", 3e-4)):
        optimizer = getattr(model, name).optimizer
        assert isinstance(optimizer, th.optim.AdamW)
        (group,) = optimizer.param_groups
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        assert settings == dict(lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
        assert {id(p) for p in group["params"]} == {id(p) for p in getattr(model, name).parameters()}
