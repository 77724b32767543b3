"""
The DeepMind Control suite against dm_control itself.
"""

import copy
import pickle
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
from envs import tiny_model
from gymnasium.utils.env_checker import check_env as gym_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_mrq import MRQ
from sb3_mrq.diagnostics.episodes import wrap_env
from sb3_mrq.envs import DMC_TASKS, DMC_VISUAL_TASKS
from sb3_mrq.persist.checkpoints import write_checkpoint

suite = pytest.importorskip("dm_control.suite")
from dm_control.rl.control import PhysicsError  # noqa: E402


def actions_for(env, n, seed=0):
    """Random actions, (n, A)."""
    return np.random.default_rng(seed).uniform(-1, 1, (n, *env.action_space.shape)).astype(np.float32)


def rollout(env, seed, n):
    """Observations and rewards of n steps after a seeded reset."""
    observations, rewards = [env.reset(seed=seed)[0]], []
    for action in actions_for(env, n):
        obs, reward, terminated, truncated, _ = env.step(action)
        assert not terminated
        observations.append(obs)
        rewards.append(reward)
    assert truncated == (n == 500)
    return np.array(observations), np.array(rewards)


def dm_control_rollout(env_id, seed, actions):
    """The same of dm_control, with every action done twice, keys of observations in alphabetical order."""
    domain, task = env_id.removeprefix("dmc/").removesuffix("-v0").split("-")
    env = suite.load(domain, task, task_kwargs={"random": seed})

    def flat(timestep):
        return np.concatenate([np.ravel(value) for _, value in sorted(timestep.observation.items())])

    observations, rewards = [flat(env.reset())], []
    for action in actions:
        first, second = env.step(action), env.step(action)
        observations.append(flat(second))
        rewards.append(first.reward + second.reward)
    return np.array(observations), np.array(rewards)


@pytest.mark.parametrize("env_id", DMC_TASKS)
def test_against_dm_control(env_id):
    """Another instance with the same seed gives the same trajectory, whatever came before."""
    env = gym.make(env_id)
    expected = dm_control_rollout(env_id, 7, actions_for(env, 10))
    rollout(env, 3, 4)
    env.reset()
    for _ in range(2):
        for got, want in zip(rollout(env, 7, 10), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    assert not np.array_equal(rollout(env, 8, 10)[0], expected[0])
    env.close()


def test_same_in_another_process():
    code = (
        "import gymnasium as gym, numpy as np\n"
        "for env_id in {ids!r}:\n"
        "    env = gym.make('sb3_mrq.envs:' + env_id)\n"
        "    print(env.reset(seed=7)[0].tobytes().hex(), env.step(env.action_space.high)[0].tobytes().hex())"
    )
    # Tasks with a target, a pose or a body that is drawn
    ids = ["dmc/ball_in_cup-catch-v0", "dmc/fish-swim-v0", "dmc/humanoid-run-v0", "dmc/reacher-hard-v0"]
    result = subprocess.run([sys.executable, "-c", code.format(ids=ids)], check=True, capture_output=True, text=True)
    for env_id, line in zip(ids, result.stdout.splitlines(), strict=True):
        env = gym.make(env_id)
        assert line == f"{env.reset(seed=7)[0].tobytes().hex()} {env.step(env.action_space.high)[0].tobytes().hex()}"
    assert result.stderr == ""


@pytest.mark.parametrize("env_id", ["dmc/cartpole-swingup-v0", "dmc/dog-run-v0", "dmc/walker-walk-v0"])
def test_whole_episode(env_id):
    """500 steps, equal to dm_control's. Only the last is truncated."""
    env = gym.make(env_id)
    expected = dm_control_rollout(env_id, 1, actions_for(env, 500))
    env.reset(seed=1)
    ends = [env.step(action)[2:4] for action in actions_for(env, 500)]
    assert ends == [(False, False)] * 499 + [(False, True)]
    for got, want in zip(rollout(env, 1, 500), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_other_length():
    env = gym.make("dmc/pendulum-swingup-v0", max_episode_steps=600)
    env.reset(seed=0)
    ends = [env.step(action)[2:4] for action in actions_for(env, 600)]
    assert ends == [(False, False)] * 599 + [(False, True)]
    assert env.unwrapped.physics.time() == pytest.approx(600 * 2 * 0.02)  # dm_control begins anew after 1000 of its steps


@pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="rl-zoo3 is not installed")
def test_time_limit_of_the_zoo():
    """rl-zoo3 replaces gymnasium's TimeLimit by one that leaves it to the environment to be truncated by something else."""
    code = (
        "import rl_zoo3.gym_patches, gymnasium as gym, sb3_mrq.envs\n"
        "from stable_baselines3.common.vec_env import DummyVecEnv\n"
        "env = DummyVecEnv([gym.spec('dmc/pendulum-swingup-v0').make])\n"
        "print(type(env.envs[0]).__name__)\n"
        "env.reset()\n"
        "for step in range(1, 501):\n"
        "    _, _, dones, infos = env.step([env.action_space.sample()])\n"
        "    if dones[0]:\n"
        "        print(step, infos[0]['TimeLimit.truncated'])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["PatchedTimeLimit", "500", "True"]


@pytest.mark.parametrize("env_id", ["dmc/walker-walk-v0", "dmc-visual/walker-walk-v0"])
def test_divergence(env_id):
    env = gym.make(env_id)
    env.reset(seed=0)
    action = env.action_space.high
    obs, *_ = env.step(action)
    env.unwrapped.physics.data.qvel[:] = 1e12
    with pytest.warns(UserWarning, match="simulation diverged, so the episode is truncated"):
        last_obs, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated) == (0, False, True)
    assert "mjWARN_BADQVEL" in info["physics_error"]
    if env_id in DMC_TASKS:
        np.testing.assert_array_equal(last_obs, obs)
    assert np.isfinite(last_obs).all()
    fresh = rollout(gym.make(env_id), 4, 3)
    for got, want in zip(rollout(env, 4, 3), fresh, strict=True):
        np.testing.assert_array_equal(got, want)


def test_bad_action_is_no_divergence():
    env = gym.make("dmc/walker-walk-v0")
    env.reset(seed=0)
    with pytest.raises(PhysicsError, match="BADCTRL"):
        env.step(np.full(6, np.nan, dtype=np.float32))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("env_id", ["dmc/fish-swim-v0", "dmc-visual/fish-swim-v0"])
def test_copies_keep_the_state(env_id, copied):
    env = gym.make(env_id, max_episode_steps=6)
    env.reset(seed=0)
    for action in actions_for(env, 3):
        env.step(action)
    other = copied(env)
    for action in actions_for(env, 3, seed=1):
        (obs, *rest), (other_obs, *other_rest) = env.step(action), other.step(action)
        np.testing.assert_array_equal(obs, other_obs)
        assert rest == other_rest
    assert rest[2]  # truncated: elapsed steps are kept as well
    np.testing.assert_array_equal(env.reset()[0], other.reset()[0])  # and random numbers
    env.close()
    assert other.env is not env.env
    other.step(action)


def test_unseeded_episodes_differ():
    env = gym.make("dmc/reacher-easy-v0")
    starts = [env.reset(seed=0)[0], env.reset()[0], env.reset()[0]]
    other = gym.make("dmc/reacher-easy-v0")
    starts.append(other.reset()[0])
    assert len({start.tobytes() for start in starts}) == 4
    assert env.np_random is env.unwrapped.np_random
    assert env.unwrapped.np_random_seed == 0


# Warnings of check_env about intended properties: unbounded observations, and wrappers around the task
HARMLESS = ("observation space (minimum|maximum) value is -?infinity", "is different from the unwrapped version")


@pytest.mark.parametrize("env_id", ["dmc/walker-walk-v0", "dmc/cartpole-swingup_sparse-v0", "dmc-visual/cheetah-run-v0"])
def test_checkers(env_id, monkeypatch, caplog, capfd):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # a display for human rendering
    pytest.importorskip("pygame")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # pygame's own, from its import
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="pygame")
        env = gym.make(env_id)
        sb3_check_env(env, skip_render_check=True)
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        gym_check_env(env)
        gym_check_env(env.unwrapped)
        env.close()
        env.close()
    assert caplog.messages == []  # such as MuJoCo's, through absl
    assert "WARN" not in capfd.readouterr().err


def test_pixels():
    """(9, 84, 84), newest frame last, from the task's camera."""
    env = gym.make("dmc-visual/quadruped-walk-v0", render_mode="rgb_array")
    obs, _ = env.reset(seed=0)

    def frame(camera_id):
        return env.unwrapped.physics.render(84, 84, camera_id=camera_id).transpose(2, 0, 1)

    frames = [frame(2)] * 3
    np.testing.assert_array_equal(obs, np.concatenate(frames))
    for action in actions_for(env, 4):
        obs, *_ = env.step(action)
        frames = [*frames[1:], frame(2)]
        np.testing.assert_array_equal(obs, np.concatenate(frames))
    assert len({image.tobytes() for image in frames}) == 3
    assert not np.array_equal(frame(0), frame(2))
    image = env.render()
    assert (image.shape, image.dtype) == ((480, 480, 3), np.uint8)
    assert image.std() > 10
    env = gym.make("dmc-visual/cartpole-swingup-v0")
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs[6:], env.unwrapped.physics.render(84, 84, camera_id=0).transpose(2, 0, 1))


@pytest.mark.parametrize("render_mode", [None, "rgb_array", "human"])
@pytest.mark.parametrize("env_id", ["dmc/pendulum-swingup-v0", "dmc-visual/pendulum-swingup-v0"])
def test_renders_once_a_step(env_id, render_mode, monkeypatch):
    """One small frame for the agent, and one large one where somebody watches."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame")
    env = gym.make(env_id, render_mode=render_mode)
    assert env.render_mode == render_mode
    physics = env.unwrapped.physics
    rendered = []

    def render(height, width, **kwargs):
        rendered.append((height, width))
        return type(physics).render(physics, height, width, **kwargs)

    monkeypatch.setattr(physics, "render", render)
    each = [(84, 84)] * (env_id in DMC_VISUAL_TASKS) + [(480, 480)] * (render_mode == "human")
    env.reset(seed=0)
    assert rendered == each
    for step in range(2, 4):
        env.step(env.action_space.high)
        assert rendered == each * step
    image = env.render()
    if render_mode == "rgb_array":
        assert image.shape == (480, 480, 3)
        assert rendered == each * 3 + [(480, 480)]
    else:
        assert image is None
        assert rendered == each * 3
    if render_mode == "human":
        shown = pygame.surfarray.array3d(pygame.display.get_surface()).transpose(1, 0, 2)
        np.testing.assert_array_equal(shown, env.unwrapped.render())
    env.close()
    env.close()


@pytest.mark.parametrize(("env_id", "fps"), [("dmc/cartpole-balance-v0", 50), ("dmc/walker-run-v0", 20)])
def test_frame_rate(env_id, fps):
    """Frames a second at which a film of one frame for each step of the agent runs in real time."""
    env = gym.make(env_id)
    assert env.metadata["render_fps"] == pytest.approx(fps)
    env.reset(seed=0)
    time = env.unwrapped.physics.time()
    env.step(env.action_space.high)
    assert env.unwrapped.physics.time() - time == pytest.approx(1 / fps)


def test_unknown_render_mode():
    with pytest.raises(ValueError, match="None, 'human' or 'rgb_array', not 'depth_array'"):
        gym.make("dmc/walker-walk-v0", render_mode="depth_array")


def test_vectorised():
    """In this process by id, and in others by specification or by an id that names the module to import."""
    env_id = DMC_VISUAL_TASKS[0]
    env = make_vec_env(env_id, n_envs=2, seed=5)
    other = SubprocVecEnv([gym.spec(env_id).make, partial(gym.make, f"sb3_mrq.envs:{env_id}")])
    other.seed(5)
    try:
        obs = env.reset()
        assert not np.array_equal(obs[0], obs[1])
        np.testing.assert_array_equal(obs, other.reset())
        for actions in np.random.default_rng(0).uniform(-1, 1, (3, 2, *env.action_space.shape)):
            (obs, rewards, *_), (other_obs, other_rewards, *_) = env.step(actions), other.step(actions)
            np.testing.assert_array_equal(obs, other_obs)
            np.testing.assert_array_equal(rewards, other_rewards.astype(np.float32))
    finally:
        other.close()
        env.close()


@pytest.fixture
def unregistered(monkeypatch):
    """As before sb3_mrq.envs is imported."""
    for env_id in (*DMC_TASKS, *DMC_VISUAL_TASKS):
        monkeypatch.delitem(gym.registry, env_id)
    monkeypatch.delitem(sys.modules, "sb3_mrq.envs")


@pytest.mark.usefixtures("unregistered")
def test_model_registers_the_id_that_it_is_given():
    with pytest.raises(gym.error.NamespaceNotFound):
        gym.make("dmc/cartpole-balance-v0")
    model = tiny_model("dmc/cartpole-balance-v0")
    model.learn(5, log_interval=None)
    assert model.replay_buffer.size() == 5


def test_resuming_and_diagnosing_register_the_id(request, tmp_path):
    model = tiny_model("dmc/cartpole-balance-v0")
    model.learn(5)
    path = write_checkpoint(model, tmp_path)
    request.getfixturevalue("unregistered")
    assert MRQ.resume(path, "dmc/cartpole-balance-v0", device="cpu").num_timesteps == 5
    wrap_env(model, "dmc/cartpole-balance-v0")


def test_id_that_is_not_there():
    with pytest.raises(gym.error.NameNotFound, match=r"BENCHMARK_TASKS.*SubprocVecEnv.*sb3_mrq.envs:dmc/walker-walk-v0"):
        tiny_model("dmc/cartpole-stand-v0")
