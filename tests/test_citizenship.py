"""
MRQ together with the rest of Stable-Baselines3: callbacks, loggers, wrappers of vectorised environments, action noise.
"""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import (
    BOX,
    IMAGE,
    VECTOR,
    CounterEnv,
    SpaceEnv,
    check_counter_transitions,
    learn_and_check,
    policy_for,
    record_log,
    tiny_model,
    wandering_env,
)
from gymnasium import spaces
from helpers import same, snapshot
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import (
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_mrq import MRQ

ENCODER_METRICS = {
    "encoder_loss",
    "dynamics_loss",
    "reward_loss",
    "termination_loss",
    "encoder_grad_norm",
    "z_s_norm",
    "z_s_effective_rank",
    "reward_scale",
}
VALUE_METRICS = {"critic_loss", "actor_loss", "q_value", "td_error", "critic_grad_norm", "actor_grad_norm"}
METRICS = ENCODER_METRICS | VALUE_METRICS | {"learning_rate", "encoder_learning_rate", "n_updates"}


class StopAt(BaseCallback):
    """Stops training at a number of steps, by its return value or by an exception."""

    def __init__(self, step, exception=None):
        super().__init__()
        self.step, self.exception = step, exception

    def _on_step(self):
        if self.num_timesteps == self.step and self.exception is not None:
            raise self.exception
        return self.num_timesteps != self.step


# Callbacks


def test_callbacks_are_called():
    calls = []

    class Recorder(BaseCallback):
        def _on_training_start(self):
            calls.append("training start")

        def _on_rollout_start(self):
            calls.append("rollout start")

        def _on_step(self):
            assert {"new_obs", "rewards", "dones", "infos", "actions"} <= self.locals.keys()
            calls.append("step")
            return True

        def _on_rollout_end(self):
            calls.append("rollout end")

        def _on_training_end(self):
            calls.append("training end")

    tiny_model(SpaceEnv()).learn(24, callback=Recorder())
    assert calls == ["training start", *(["rollout start", "step", "rollout end"] * 24), "training end"]


def test_eval_callback(tmp_path):
    model = tiny_model(SpaceEnv())
    best = tmp_path / "best"
    callback = EvalCallback(
        Monitor(SpaceEnv()), eval_freq=10, n_eval_episodes=2, log_path=tmp_path, best_model_save_path=best, verbose=0
    )
    rows = record_log(model)
    model.learn(30, callback=callback)
    evaluations = np.load(tmp_path / "evaluations.npz")
    np.testing.assert_array_equal(evaluations["timesteps"], [10, 20, 30])
    assert np.isfinite(evaluations["results"]).all() and evaluations["results"].shape == (3, 2)
    assert sum("eval/mean_reward" in row for row in rows) == 3
    MRQ.load(best / "best_model", device="cpu").predict(VECTOR.sample())


def test_evaluation_does_not_disturb_training():
    """Neither evaluation nor logging changes what is learned."""

    def learn(callback):
        model = tiny_model(SpaceEnv())
        model.learn(30, callback=callback)
        return snapshot(model.policy)

    evaluation = EvalCallback(Monitor(SpaceEnv()), eval_freq=7, n_eval_episodes=1, verbose=0)
    assert same(learn(None), learn(evaluation))


def test_checkpoint_callback(tmp_path):
    env = VecNormalize(make_vec_env(SpaceEnv, 1))
    model = tiny_model(env)
    model.learn(
        24, callback=CheckpointCallback(12, tmp_path, name_prefix="mrq", save_replay_buffer=True, save_vecnormalize=True)
    )
    for step in (12, 24):
        statistics = VecNormalize.load(tmp_path / f"mrq_vecnormalize_{step}_steps.pkl", make_vec_env(SpaceEnv, 1))
        loaded = MRQ.load(tmp_path / f"mrq_{step}_steps", env=statistics, device="cpu")
        loaded.load_replay_buffer(tmp_path / f"mrq_replay_buffer_{step}_steps.pkl")
        assert loaded.num_timesteps == step
        # The callback comes before the step is stored
        assert loaded.replay_buffer.size() == step - 1
        loaded.learn(6, reset_num_timesteps=False)


def test_stop_training_on_reward_threshold():
    model = tiny_model(SpaceEnv())
    stop = StopTrainingOnRewardThreshold(reward_threshold=0.0)
    evaluate = EvalCallback(Monitor(SpaceEnv()), callback_on_new_best=stop, eval_freq=20, n_eval_episodes=1, verbose=0)
    model.learn(1000, callback=evaluate)
    assert model.num_timesteps == 20


def test_lists_functions_and_events_as_callbacks():
    model = tiny_model(SpaceEnv(length=6))
    model.learn(1000, callback=CallbackList([StopTrainingOnMaxEpisodes(3), EveryNTimesteps(10**6, StopAt(0))]))
    assert model.num_timesteps == 18
    model.learn(1000, callback=EveryNTimesteps(15, StopAt(15)))
    assert model.num_timesteps == 15
    model.learn(1000, callback=lambda locals_, globals_: locals_["self"].num_timesteps < 13)
    assert model.num_timesteps == 13


@pytest.mark.parametrize(("n_envs", "end"), [(1, "truncated"), (2, "terminated")])
@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_callback_stops_training_then_learn_again(reset_num_timesteps, end, n_envs):
    """In the middle of an episode, at its last step and at the one after: no false transition is stored."""
    for step in (12, 14, 15, 16, 28):
        model = tiny_model(make_vec_env(lambda: CounterEnv(7, end), n_envs))
        model.learn(60, callback=StopAt(step + step % n_envs))
        assert model.num_timesteps == step + step % n_envs
        model.learn(14, reset_num_timesteps=reset_num_timesteps)
        check_counter_transitions(model.replay_buffer, 7, end)


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_interrupted_then_learn_again(reset_num_timesteps):
    """As when a user stops training in a notebook: the step that was under way is lost, and nothing false stored."""
    model = tiny_model(CounterEnv())
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=StopAt(19, KeyboardInterrupt()))
    model.learn(14, reset_num_timesteps=reset_num_timesteps)
    check_counter_transitions(model.replay_buffer, 7, "truncated")


# Cuts without an end of episode


@pytest.mark.parametrize(("n_envs", "end"), [(1, "terminated"), (3, "truncated")])
def test_cuts_store_no_false_transition(end, n_envs):
    def make_env():
        return make_vec_env(lambda: CounterEnv(7, end), n_envs)

    model = tiny_model(make_env())
    stored = 0
    for change in ("nothing", "learn again", "go on", "another environment", "another environment, go on", "reset", "go on"):
        if change.startswith("another environment"):
            model.set_env(make_env())
        if change == "reset":
            model.get_env().reset()
            model._last_obs = None
        model.learn(24, reset_num_timesteps="go on" not in change)
        stored += 24
        numbers = check_counter_transitions(model.replay_buffer, 7, end)
        assert model.replay_buffer.size() == stored
        # Only of the running episode some cannot be sampled yet
        assert stored - 4 * n_envs <= len(numbers) == len(set(numbers))


def test_learning_goes_on_in_the_same_episode():
    """``reset_num_timesteps=False`` does not reset the environment."""
    model = tiny_model(CounterEnv(length=40))
    model.learn(15)
    model.learn(15, reset_num_timesteps=False)
    numbers = check_counter_transitions(model.replay_buffer, 40, "truncated")
    np.testing.assert_array_equal(numbers - numbers[0], np.arange(30 - 4))


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_evaluation_in_the_environment_of_training(vec_env_cls):
    """Learning goes on in a new episode, no transition or sub-trajectory reaches from the one before into it."""
    model = tiny_model(make_vec_env(lambda: CounterEnv(length=40), 2, vec_env_cls=vec_env_cls))
    for _ in range(3):
        model.learn(24, reset_num_timesteps=False)
        evaluate_policy(model, model.get_env(), n_eval_episodes=2)
        numbers = check_counter_transitions(model.replay_buffer, 40, "truncated")
        assert len(numbers) >= model.replay_buffer.size() - 2 * 4
    model.get_env().close()


# Loggers


def test_csv_columns(tmp_path):
    pandas = pytest.importorskip("pandas")
    model = tiny_model(SpaceEnv())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(48, log_interval=1)
    table = pandas.read_csv(tmp_path / "progress.csv")
    assert {f"train/{name}" for name in METRICS} <= set(table.columns)
    assert len(table) == 8
    assert np.isfinite(table[[f"train/{name}" for name in METRICS]].iloc[-1]).all()
    assert np.isfinite(table["rollout/ep_rew_mean"]).all()
    assert table["train/n_updates"].iloc[-1] == 38 - 1
    assert (table["time/total_timesteps"] == np.arange(6, 49, 6)).all()


@pytest.mark.parametrize(
    ("observation_space", "action_space"), [(VECTOR, BOX), (IMAGE, spaces.Discrete(3))], ids=["vector", "image"]
)
def test_logged_values_are_numbers(observation_space, action_space):
    """Tensors would become histograms, and keep graphs alive."""
    model = tiny_model(SpaceEnv(observation_space, action_space), policy_for(observation_space))
    rows = record_log(model)
    model.learn(36, log_interval=1)
    values = [(name, value) for row in rows for name, value in row.items() if name.startswith("train/")]
    assert {name for name, _ in values} == {f"train/{name}" for name in METRICS}
    for name, value in values:
        assert type(value) in (float, int), name
        assert np.isfinite(value), name
    for name in ("encoder_grad_norm", "critic_grad_norm", "actor_grad_norm", "reward_scale", "z_s_norm"):
        assert all(row[f"train/{name}"] > 0 for row in rows if f"train/{name}" in row)
    assert all(1 <= row["train/z_s_effective_rank"] <= 8.001 for row in rows if "train/z_s_effective_rank" in row)


def test_terminations_are_logged():
    model = tiny_model(CounterEnv(end="terminated"))
    rows = record_log(model)
    model.learn(35, log_interval=1)
    assert rows[-1]["train/termination_loss"] > 0


def test_losses_are_not_lost_to_a_log_that_is_written_often():
    """Once there are some they are in every dump, however seldom they come from the device."""
    model = tiny_model(SpaceEnv(length=1))
    rows = record_log(model)
    model.learn(20, log_interval=1)
    assert all("train/critic_loss" in row for row in rows[11:])


def test_success_rate_and_episode_statistics():
    model = tiny_model(SpaceEnv(length=6), stats_window_size=2)
    rows = record_log(model)
    model.learn(24, log_interval=1)
    assert rows[-1]["rollout/success_rate"] == 1.0
    assert rows[-1]["rollout/ep_len_mean"] == 6
    assert len(model.ep_info_buffer) == 2
    assert rows[-1]["rollout/ep_rew_mean"] == pytest.approx(np.mean([info["r"] for info in model.ep_info_buffer]))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model(SpaceEnv(), tensorboard_log=str(tmp_path))
    model.learn(24, log_interval=1)
    model.learn(12, log_interval=1, reset_num_timesteps=False)
    model.learn(20, log_interval=1, tb_log_name="other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MRQ_1", "other_1"]
    events = EventAccumulator(str(tmp_path / "MRQ_1"))
    events.Reload()
    tags = events.Tags()
    assert {f"train/{name}" for name in METRICS - {"n_updates"}} | {"rollout/ep_rew_mean"} <= set(tags["scalars"])
    assert not tags["histograms"] and not tags["tensors"] and not tags["images"]
    steps = [event.step for event in events.Scalars("train/critic_loss")]
    assert steps == sorted(set(steps)) and steps[-1] == 36


def test_tensorboard_where_the_working_directory_changes(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    start, env_id = wandering_env(tmp_path, monkeypatch)
    model = tiny_model(env_id, tensorboard_log="tb").learn(20, log_interval=1)
    (events,) = (start / "tb" / "MRQ_1").iterdir()
    assert events.stat().st_size > 1000
    # In a saved model, which may be loaded on another machine, the path stays relative
    assert model.tensorboard_log == "tb"


def test_progress_bar():
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    model = tiny_model(SpaceEnv())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rich is experimental")
        model.learn(20, progress_bar=True)
    assert model.num_timesteps == 20


def test_verbose(capsys):
    tiny_model(SpaceEnv(), verbose=1).learn(30, log_interval=1)
    out = capsys.readouterr().out
    assert "Using cpu device" in out and "critic_loss" in out and "ep_rew_mean" in out


# Wrappers of vectorised environments


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("what", ["everything", "observations", "rewards", "a key", "an image's rewards"])
def test_vec_normalize(what, n_envs):
    kwargs = {
        "everything": {},
        "observations": {"norm_reward": False},
        "rewards": {"norm_obs": False},
        "a key": {"norm_obs_keys": ["vector"]},
        "an image's rewards": {"norm_obs": False},
    }[what]
    space = {"a key": spaces.Dict(image=IMAGE, vector=VECTOR), "an image's rewards": IMAGE}.get(what, VECTOR)
    env = make_vec_env(lambda: SpaceEnv(space, reward=1000.0), n_envs)
    env = VecNormalize(env if space is VECTOR else VecTransposeImage(env), **kwargs)
    model = tiny_model(env, policy_for(space))
    learn_and_check(model, 24)
    # Raw values are stored, normalised ones sampled. The reward scale belongs to the sampled ones.
    assert 200 < model.replay_buffer.mean_abs_reward() < 800
    assert (100 < model.reward_scale < 1000) if what == "observations" else (0 < model.reward_scale <= env.clip_reward)


def test_vec_normalize_samples():
    env = VecNormalize(make_vec_env(SpaceEnv, 1))
    model = tiny_model(env)
    model.learn(30)
    indices = model.replay_buffer.sampling_probabilities()[0]
    raw, normalized = model.replay_buffer.get_n_step(indices), model.replay_buffer.get_n_step(indices, env)
    np.testing.assert_allclose(normalized.observations, env.normalize_obs(raw.observations.numpy()), rtol=1e-5)
    np.testing.assert_allclose(normalized.next_observations, env.normalize_obs(raw.next_observations.numpy()), rtol=1e-5)
    np.testing.assert_allclose(normalized.rewards, env.normalize_reward(raw.rewards.numpy()), rtol=1e-5)
    assert (raw.observations.abs() <= 1).all()


def test_vec_normalize_stores_no_false_transition():
    env = VecNormalize(make_vec_env(lambda: CounterEnv(), 2), norm_reward=False, clip_obs=1e9)
    model = tiny_model(env)
    model.learn(22)
    model.learn(22)
    model.learn(22, callback=StopAt(12))
    model.learn(22, reset_num_timesteps=False)
    buffer = model.replay_buffer
    samples = buffer.get_subtrajectories(buffer.sampling_probabilities()[0])
    numbers = samples.observations[..., 0].numpy()
    # The final observation went through the normalisation and back
    np.testing.assert_allclose(np.diff(numbers)[samples.mask.numpy() == 1], 1, atol=0.1)


def test_other_vec_wrappers():
    env = VecCheckNan(VecMonitor(DummyVecEnv([SpaceEnv, SpaceEnv])), raise_exception=True)
    learn_and_check(tiny_model(env), 30)
    env = VecFrameStack(make_vec_env(SpaceEnv, 2), 3)
    learn_and_check(tiny_model(env), 30)
    env = VecTransposeImage(make_vec_env(lambda: SpaceEnv(IMAGE), 1))
    model = tiny_model(env, "CnnPolicy")
    assert model.get_env() is env


def test_evaluate_policy():
    model = tiny_model(SpaceEnv())
    mean, std = evaluate_policy(model, Monitor(SpaceEnv(length=5)), n_eval_episodes=3, deterministic=False)
    assert 0 < mean < 5 and std > 0


def test_set_env():
    model = tiny_model(make_vec_env(SpaceEnv, 2))
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(SpaceEnv, 3))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(make_vec_env(lambda: SpaceEnv(spaces.Box(-1, 1, (9,))), 2))
    env = VecNormalize(make_vec_env(SpaceEnv, 2))
    model.set_env(env)
    assert model.get_env() is env and model.get_vec_normalize_env() is env
    model.learn(30)


def test_infos_of_gymnasium_time_limits():
    """An episode that ends by TimeLimit is truncated, one that the environment ends is terminated."""
    model = tiny_model(gym.make("CartPole-v1", max_episode_steps=5))
    model.learn(30)
    assert not model.replay_buffer.has_terminated
    model = tiny_model("CartPole-v1")
    model.learn(120, callback=StopTrainingOnMaxEpisodes(2))
    assert model.replay_buffer.has_terminated


# Noise


def actions_taken(model, total_timesteps):
    """
    Let a model act after its warm-up but not learn.

    :return: stored actions, and the policy's actions without noise, both scaled to [-1, 1]
    """
    before = snapshot(model.policy)
    model.learn(total_timesteps)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    samples = model.replay_buffer.get_n_step(model.replay_buffer.sampling_probabilities()[0])
    policy_actions = model.policy.scale_action(model.predict(samples.observations.numpy())[0])
    shape = (len(samples.indices), -1)
    return samples.actions.numpy().reshape(shape), policy_actions.reshape(shape)


NARROW = spaces.Box(np.array([-3, 10], dtype=np.float32), np.array([-1, 30], dtype=np.float32))
IDLE = {"learning_starts": 0, "gradient_steps": 0}


@pytest.mark.parametrize("n_envs", [1, 3])
def test_action_noise_replaces_the_built_in_one(n_envs):
    """With a constant as noise, in units of actions scaled to [-1, 1]."""
    shift = np.array([0.25, -0.5])
    env = make_vec_env(lambda: SpaceEnv(action_space=NARROW), n_envs)
    model = tiny_model(env, action_noise=NormalActionNoise(shift, np.zeros(2)), exploration_noise=0.9, **IDLE)
    taken, without = actions_taken(model, 36)
    np.testing.assert_allclose(taken, np.clip(without + shift, -1, 1), atol=1e-5)
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize(
    ("shape", "noise_shape"), [((2,), (2,)), ((2, 3), (2, 3)), ((2,), (1,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3), (6,))]
)
@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(noise_class, shape, noise_shape, n_envs):
    """Noise of fewer numbers is broadcast, as in TD3."""
    space = spaces.Box(-2, 1, shape, dtype=np.float32)
    noise = noise_class(np.zeros(noise_shape), 0.3 * np.ones(noise_shape))
    model = tiny_model(make_vec_env(lambda: SpaceEnv(action_space=space), n_envs), action_noise=noise)
    learn_and_check(model, 30)
    taken, without = actions_taken(
        tiny_model(make_vec_env(lambda: SpaceEnv(action_space=space), n_envs), action_noise=noise, **IDLE), 36
    )
    assert np.abs(taken - without).max() > 1e-3
    assert np.abs(taken).max() <= 1


@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise_is_broadcast_within_each_environment(n_envs):
    """Two environments and two actions: the noise of one environment must not go to the other."""
    shifts = [0.25, -0.5][:n_envs]
    env = make_vec_env(lambda: SpaceEnv(action_space=NARROW), n_envs)
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(1), np.zeros(1)), n_envs)
    noise.noises = [NormalActionNoise(np.full(1, shift), np.zeros(1)) for shift in shifts]
    model = tiny_model(env, action_noise=noise, **IDLE)
    taken, without = actions_taken(model, 36)
    expected = np.repeat(shifts, len(taken) // n_envs)[:, None]
    np.testing.assert_allclose(taken, np.clip(without + expected, -1, 1), atol=1e-5)


def test_exploration_noise():
    """Of the given standard deviation in units of actions scaled to [-1, 1], and where transitions are collected only."""
    model = tiny_model(SpaceEnv(action_space=NARROW, length=50), exploration_noise=0.1, **IDLE)
    for parameter in model.actor.parameters():
        th.nn.init.zeros_(parameter)
    taken, without = actions_taken(model, 400)
    np.testing.assert_array_equal(without, 0)
    # 800 numbers: four standard errors of mean and standard deviation
    assert abs(taken.mean()) < 4 * 0.1 / np.sqrt(800)
    assert abs(taken.std() - 0.1) < 4 * 0.1 / np.sqrt(1600)


def test_no_exploration_noise():
    taken, without = actions_taken(tiny_model(SpaceEnv(action_space=NARROW), exploration_noise=0.0, **IDLE), 30)
    np.testing.assert_allclose(taken, without, atol=1e-5)


def test_noise_after_warm_up_only():
    """Until ``learning_starts`` actions are uniformly random, whatever the noise."""
    model = tiny_model(SpaceEnv(), action_noise=NormalActionNoise(np.zeros(2), np.zeros(2)), gradient_steps=0)
    taken, without = actions_taken(model, 30)
    same = np.isclose(taken, without, atol=1e-5).all(axis=1)
    np.testing.assert_array_equal(same, np.arange(30) >= 10)
