"""
MRQ learns in environments of every form that TD3 and DQN take, on every schedule.
"""

import gymnasium as gym
import numpy as np
import pytest
from envs import BOX, CounterEnv, SpaceEnv, changed, learn_and_check, tiny_model
from gymnasium import spaces
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TimeLimit
from helpers import same, snapshot
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

from sb3_mrq import MRQ, MlpPolicy


def assert_rewards_logged(rows):
    assert rows
    assert all(np.isfinite(row["rollout/ep_rew_mean"]) and row["rollout/ep_len_mean"] > 0 for row in rows)


def test_half_cheetah():
    pytest.importorskip("mujoco")
    env = gym.make("HalfCheetah-v5", max_episode_steps=20)
    assert_rewards_logged(learn_and_check(tiny_model(env), 40))


def test_atari():
    ale_py = pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    gym.register_envs(ale_py)

    def make_env():
        env = AtariPreprocessing(gym.make("ALE/Pong-v5", frameskip=1), noop_max=0, frame_skip=4, screen_size=84)
        return Monitor(TimeLimit(FrameStackObservation(env, 4), 10))

    model = tiny_model(DummyVecEnv([make_env]), "CnnPolicy")
    assert model.observation_space == spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8)
    assert_rewards_logged(learn_and_check(model, 25))


def test_lunar_lander():
    pytest.importorskip("Box2D")
    env = gym.make("LunarLander-v3", max_episode_steps=20)
    assert_rewards_logged(learn_and_check(tiny_model(env), 40))


def test_rgb_frames_with_box_actions():
    image = spaces.Box(0, 255, (40, 36, 3), dtype=np.uint8)
    env = VecFrameStack(make_vec_env(lambda: SpaceEnv(image, BOX), 1), 3)
    model = tiny_model(env, "CnnPolicy")
    assert model.observation_space.shape == (9, 40, 36)
    assert_rewards_logged(learn_and_check(model, 25))


def test_image_and_vector():
    space = spaces.Dict(
        image=spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8), vector=spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)
    )
    assert_rewards_logged(learn_and_check(tiny_model(SpaceEnv(space, BOX), "MultiInputPolicy"), 25))


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_env_as_string(env):
    learn_and_check(tiny_model(env), 30)


@pytest.mark.parametrize(("vec_env_cls", "n_envs"), [(DummyVecEnv, 1), (DummyVecEnv, 3), (SubprocVecEnv, 2)])
def test_vectorized_environments(vec_env_cls, n_envs):
    env = make_vec_env(SpaceEnv, n_envs, vec_env_cls=vec_env_cls)
    try:
        model = tiny_model(env)
        assert_rewards_logged(learn_and_check(model, 36))
        assert model.num_timesteps == model.replay_buffer.size() == 36
    finally:
        env.close()


def test_policy_as_class():
    model = tiny_model("CartPole-v1", MlpPolicy)
    assert type(model.policy) is MlpPolicy
    learn_and_check(model, 30)


# Rollouts that end after more than 18 steps are followed by training; episodes have 6 steps.
@pytest.mark.parametrize(
    ("n_envs", "train_freq", "asked", "taken", "trainings", "steps_in_rollout"),
    [
        (1, 1, 36, 36, 18, 1),
        (1, (4, "step"), 33, 36, 5, 4),
        (1, (1, "episode"), 31, 36, 3, 6),
        (1, (2, "episode"), 25, 36, 2, 12),
        (3, 1, 34, 36, 6, 3),
        (3, (2, "step"), 31, 36, 3, 6),
    ],
)
@pytest.mark.parametrize("gradient_steps", [0, 1, 3, -1])
def test_number_of_training_steps(n_envs, train_freq, asked, taken, trainings, steps_in_rollout, gradient_steps):
    env = make_vec_env(SpaceEnv, n_envs)
    model = tiny_model(env, train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=18)
    before = snapshot(model.policy)
    model.learn(asked)
    assert model.num_timesteps == taken
    assert model._n_updates == trainings * (steps_in_rollout if gradient_steps == -1 else gradient_steps)
    assert same(snapshot(model.policy), before) == (gradient_steps == 0)


@pytest.mark.parametrize("train_freq", [(1, "minute"), (1.5, "step")])
def test_train_freq_that_is_none(train_freq):
    with pytest.raises(ValueError, match="train_freq"):
        tiny_model(SpaceEnv(), train_freq=train_freq)


def test_episodes_of_several_environments_cannot_be_a_train_freq():
    model = tiny_model(make_vec_env(SpaceEnv, 2), train_freq=(1, "episode"))
    with pytest.raises(AssertionError, match="only one env"):
        model.learn(20)


def test_learn_again():
    model = tiny_model(SpaceEnv())
    model.learn(30)
    assert (model.num_timesteps, model._n_updates) == (30, 20)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates, model.replay_buffer.size()) == (40, 30, 40)
    # From the start again, warm-up included: learning goes on
    model.learn(15)
    assert (model.num_timesteps, model._n_updates, model.replay_buffer.size()) == (15, 35, 55)


@pytest.mark.parametrize(
    ("schedule", "at_start", "at_end"), [(lambda p: 1e-3 * (1 + p), 2e-3, 1e-3), (LinearSchedule(2e-3, 1e-3, 1.0), 2e-3, 1e-3)]
)
@pytest.mark.parametrize("scheduled", ["learning_rate", "encoder_learning_rate"])
def test_learning_rate_schedules(scheduled, schedule, at_start, at_end):
    constant = {"learning_rate": "encoder_learning_rate", "encoder_learning_rate": "learning_rate"}[scheduled]
    model = tiny_model(SpaceEnv(), **{scheduled: schedule, constant: 5e-4})

    def rates():
        heads = {optimizer.param_groups[0]["lr"] for optimizer in (model.critic.optimizer, model.actor.optimizer)}
        assert len(heads) == 1
        return {"learning_rate": heads.pop(), "encoder_learning_rate": model.encoder.optimizer.param_groups[0]["lr"]}

    assert rates() == pytest.approx({scheduled: at_start, constant: 5e-4})
    model.learn(60)
    assert rates() == pytest.approx({scheduled: at_end, constant: 5e-4})


def test_learning_rates_are_those_that_the_optimizers_use():
    model = tiny_model(SpaceEnv(), learning_rate=0.0, encoder_learning_rate=1e-3)
    before = snapshot(model.policy)
    model.learn(20)
    after = snapshot(model.policy)
    assert changed(before, after, "encoder.")
    assert not changed(before, after, "critic.layers.")
    assert not changed(before, after, "actor.")


DETERMINISM_ENVS = {
    "Box": SpaceEnv,
    "Discrete": lambda: SpaceEnv(action_space=spaces.Discrete(4)),
    "image": lambda: SpaceEnv(spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8), spaces.MultiDiscrete([2, 3])),
}


@pytest.mark.parametrize("name", DETERMINISM_ENVS)
def test_seed_decides_everything(name):
    def run(seed):
        env = make_vec_env(DETERMINISM_ENVS[name], 2)
        model = tiny_model(env, "CnnPolicy" if name == "image" else "MlpPolicy", seed=seed)
        model.learn(30)
        env.seed(5)
        obs = env.reset()
        actions = [model.predict(obs, deterministic=False)[0] for _ in range(5)]
        return snapshot(model.policy), model.replay_buffer.actions.copy(), np.array(actions)

    first, second, other = run(3), run(3), run(4)
    assert same(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[2], second[2])
    for network in ("encoder.", "critic.", "actor."):
        assert changed(first[0], other[0], network)
    assert not np.array_equal(first[1], other[1])


def test_first_actions_are_uniform_and_learning_waits():
    env = SpaceEnv(action_space=spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 10.0]), dtype=np.float64), length=50)
    model = tiny_model(env, learning_starts=400, buffer_size=1000)
    before = snapshot(model.policy)
    with pytest.warns(UserWarning, match="learning_starts"):
        model.learn(400)
    assert model._n_updates == 0
    assert same(snapshot(model.policy), before)
    samples = model.replay_buffer.get_n_step(model.replay_buffer.sampling_probabilities()[0])
    actions = samples.actions.numpy()
    # Stored as scaled to [-1, 1]: of mean 0 and standard deviation 1 / sqrt(3), give or take four standard errors
    assert np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions.mean(axis=0), 0, atol=4 / np.sqrt(3 * 400))
    np.testing.assert_allclose(actions.std(axis=0), 1 / np.sqrt(3), atol=0.06)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_short_episodes(length, end):
    model = tiny_model(CounterEnv(length, end))
    learn_and_check(model, 30)


def test_nothing_to_sample_yet():
    """The first episode is shorter than the horizon when learning starts: training waits instead of failing."""
    model = tiny_model(SpaceEnv(length=100), learning_starts=2)
    model.learn(4)
    assert model._n_updates == 0
    model.learn(4, reset_num_timesteps=False)
    assert model._n_updates == 4


@pytest.mark.parametrize(
    ("env", "by_chance"), [(IdentityEnv(4, ep_length=50), 12.5), (IdentityEnvBox(eps=0.5, ep_length=50), 22)]
)
def test_identity(env, by_chance):
    """The action must be the observation, then a step has a reward of one."""
    model = MRQ(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        encoder_learning_rate=1e-2,
        gamma=0.0,
        n_steps=1,
        encoder_horizon=1,
        learning_starts=100,
        batch_size=64,
        target_update_interval=25,
        buffer_size=1000,
        policy_kwargs={"net_arch": {"encoder": [64], "qf": [64], "pi": [64]}, "z_s_dim": 64, "z_a_dim": 32, "z_sa_dim": 64},
        seed=0,
        device="cpu",
    )
    model.learn(500)
    assert evaluate_policy(model, Monitor(env), n_eval_episodes=2)[0] > by_chance + 15
