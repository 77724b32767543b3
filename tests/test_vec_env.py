"""
Environments and vectorised environments that keep the arrays they return, return lists or tensors, or are gymnasium's.
"""

import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import BOX, SpaceEnv, check_counter_transitions, learn_and_check, policy_for, tiny_model
from envs import CounterEnv as Counter
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from gymnasium.wrappers.vector import DictInfoToList, NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from sb3_mrq import MRQ
from sb3_mrq.checks import BadValueError
from sb3_mrq.diagnostics.episodes import no_side_effects, play, wrap_env
from sb3_mrq.envs import CopyObservation, GymnasiumVecEnv
from sb3_mrq.observations import map_observation
from sb3_mrq.persist.checkpoints import write_checkpoint

try:
    from gymnasium.vector import AutoresetMode, VectorEnv
except ImportError:
    AutoresetMode = None
gymnasium_1_1 = pytest.mark.skipif(AutoresetMode is None, reason="gymnasium 1.0 does not tell when a VectorEnv resets")


class OwnArray(gym.Env):
    """
    Counts from a start to the start plus 5, where episodes terminate, in an array of its own that it returns each time.

    :param starts: of the episodes
    :param make_state: makes the array, or a dict, list or tensor
    """

    action_space = BOX

    def __init__(self, starts=(0,), make_state=lambda: np.zeros(2, np.float32)):
        self.starts = itertools.cycle(starts)
        self.state = make_state()
        number = spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = spaces.Dict(a=number) if isinstance(self.state, dict) else number

    def set_numbers(self, number):
        self.number = number
        array = self.state["a"] if isinstance(self.state, dict) else self.state
        array[:] = [number, number] if isinstance(array, list) else number

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = next(self.starts)
        self.set_numbers(self.start)
        return self.state, {}

    def step(self, action):
        self.set_numbers(self.number + 1)
        return self.state, 1.0, self.number == self.start + 5, False, {}


class OwnTensor(OwnArray):
    def set_numbers(self, number):
        self.number = number
        self.state.fill_(number)


STATES = {
    "array": lambda: np.zeros(2, np.float32),
    "dict": lambda: {"a": np.zeros(2, np.float32)},
    "list": lambda: [0, 0],
}
STARTS = (0, 10, 20, 30)


def final_numbers(model):
    """The first numbers of all final observations in the replay buffer."""
    samples = model.replay_buffer.get_n_step(model.replay_buffer.sampling_probabilities()[0])
    obs = samples.next_observations
    return set((obs["a"] if isinstance(obs, dict) else obs)[samples.terminated[:, 0] == 1].flatten().tolist())


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_final_observations_of_an_environment_that_returns_its_own_array(state, monitored):
    """Reset writes to the array before the transition is stored. Also if the environment is set later."""
    policy = policy_for(OwnArray(make_state=STATES[state]).observation_space)
    env = OwnArray(make_state=STATES[state])
    env = Monitor(env) if monitored else env
    model = tiny_model(env, policy, learning_starts=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(20)
        assert final_numbers(model) == {5}
        model.set_env(OwnArray([100], STATES[state]))
        model.learn(20, reset_num_timesteps=False)
    assert final_numbers(model) == {5, 105}
    if monitored:
        # The environment that callbacks reach is the one that was given
        assert tiny_model(env, policy).get_env().envs == [env]


def test_final_observations_of_an_environment_that_returns_its_own_tensor():
    model = tiny_model(OwnTensor(make_state=lambda: th.zeros(2)), learning_starts=1000)
    model.learn(20, log_interval=None)
    assert final_numbers(model) == {5}


def test_final_observations_after_resuming(tmp_path):
    """Also if the environment is wrapped in the VecNormalize of the checkpoint."""
    env = VecNormalize(DummyVecEnv([lambda: Monitor(CopyObservation(OwnArray()))]), norm_obs=False)
    model = tiny_model(env, learning_starts=1000)
    model.learn(5)
    path = write_checkpoint(model, tmp_path)
    resumed = MRQ.resume(path, OwnArray([100]), device="cpu")
    assert resumed.get_vec_normalize_env() is not None
    resumed.learn(20, reset_num_timesteps=False)
    assert final_numbers(resumed) == {5, 105}


def make_vec(wrapper=lambda env: env, starts=STARTS, state="array"):
    return DummyVecEnv([lambda: Monitor(wrapper(OwnArray(starts, STATES[state])))])


@pytest.mark.parametrize("wrapper", [lambda env: env, VecNormalize])
@pytest.mark.parametrize("state", STATES)
def test_warning_of_final_observations_that_reset_writes_over(state, wrapper):
    """Once, with the wrapper that helps, where the user has made the VecEnv."""
    env = wrapper(make_vec(state=state))
    model = tiny_model(env, policy_for(env.observation_space), learning_starts=1000)
    with pytest.warns(UserWarning) as record:
        model.learn(40)
        model.learn(40, reset_num_timesteps=False)
    found = [str(each.message) for each in record if "final observations" in str(each.message)]
    assert len(found) == 1 and "sb3_mrq.envs.CopyObservation" in found[0]


@pytest.mark.parametrize(
    "env",
    [
        make_vec(CopyObservation),  # the remedy
        make_vec(starts=(0,)),  # reset may lead to where the episode ended
        make_vec(starts=(0, 0, 10, 10, 10)),
        make_vec_env(SpaceEnv, 1),
    ],
)
def test_no_warning_of_final_observations(env):
    model = tiny_model(env, learning_starts=1000)
    with pytest.warns(UserWarning, match="Nothing will be learned") as record:
        model.learn(60)
    assert len(record) == 1


def test_frame_stacks_of_copies():
    """The stack of an environment that returns its own array holds the same frame each time."""

    def stack(env):
        env = FrameStackObservation(env, 3)
        env.reset()
        for _ in range(4):
            obs = env.step(None)[0]
        return obs[:, 0].tolist()

    assert stack(OwnArray()) == [4, 4, 4]
    assert stack(CopyObservation(OwnArray())) == [2, 3, 4]


class Convert(VecEnvWrapper):
    """Gives the results of a VecEnv in another form."""

    def __init__(self, venv, convert):
        super().__init__(venv)
        self.convert = convert

    def reset(self):
        return map_observation(self.convert, self.venv.reset())

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = map_observation(self.convert, info["terminal_observation"])
        return map_observation(self.convert, obs), self.convert(rewards), self.convert(dones), infos


class OwnBuffers(VecEnvWrapper):
    """Returns the same arrays each time, as simulators without copies do."""

    def write(self, name, value):
        if isinstance(value, dict):
            return {key: self.write(f"{name} {key}", part) for key, part in value.items()}
        self.buffers = getattr(self, "buffers", {})
        array = self.buffers.setdefault(name, np.array(value))
        array[:] = value
        return array

    def reset(self):
        return self.write("obs", self.venv.reset())

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return self.write("obs", obs), self.write("rewards", rewards), self.write("dones", dones), infos


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_vec_env_that_returns_its_own_buffers(end, n_envs):
    env = OwnBuffers(make_vec_env(lambda: Counter(7, end), n_envs))
    model = tiny_model(env, learning_starts=50)
    model.learn(30)
    model.learn(31, reset_num_timesteps=False)
    assert model.replay_buffer.size() >= 60
    check_counter_transitions(model.replay_buffer, 7, end)
    # Sub-trajectories go on until their episode ends
    samples = model.replay_buffer.get_subtrajectories(model.replay_buffer.sampling_probabilities()[0])
    assert samples.mask.mean() > 0.6


@pytest.mark.parametrize("normalize", [False, True])
def test_vec_env_that_returns_its_own_dict(normalize):
    env = OwnBuffers(make_vec_env(lambda: SpaceEnv(spaces.Dict(a=BOX, b=spaces.Discrete(50))), 2))
    env = VecNormalize(env, norm_obs_keys=["a"]) if normalize else env
    model = tiny_model(env, "MultiInputPolicy", learning_starts=50)
    model.learn(60)
    samples = model.replay_buffer.sample(50)
    assert samples.mask.mean() > 0.6
    for part in samples.observations.values():
        assert (part[:, 0] != part[:, 1]).float().mean() > 0.9


def test_diagnosis_in_a_vec_env_that_returns_its_own_buffers():
    """Its embeddings are those of the same episode in an environment that does not."""
    model = tiny_model(Counter())

    def z_s(wrapper):
        Counter.episodes = itertools.count()
        with no_side_effects(model):
            return play(model, wrap_env(model, wrapper(make_vec_env(Counter, 1))), 1, 0, 0.0, 100)[0].z_s

    np.testing.assert_array_equal(z_s(OwnBuffers), z_s(lambda env: env))


@pytest.mark.parametrize("actions", [spaces.MultiDiscrete([3, 3]), spaces.MultiBinary(2), BOX])
@pytest.mark.parametrize("learning_starts", [5, 1000])
def test_environment_that_writes_to_the_action(actions, learning_starts):
    given = []

    class Writer(SpaceEnv):
        def step(self, action):
            given.append(action.copy())
            result = super().step(action)
            action[:] = -7
            return result

    model = tiny_model(Writer(action_space=actions), learning_starts=learning_starts)
    model.learn(12, log_interval=None)
    stored = model.replay_buffer.arrays()["actions"]
    assert len(given) == 12 and (stored != -7).all()
    np.testing.assert_allclose(stored[:6], given[:6], atol=1e-6)


CONVERSIONS = [
    lambda value: np.asarray(value).tolist(),
    lambda value: th.as_tensor(np.asarray(value)),
    lambda value: list(map(th.as_tensor, value)),
]


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["list", "tensor", "list of tensors"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_vec_env_that_gives_lists_or_tensors(n_envs, convert):
    model = tiny_model(Convert(make_vec_env(lambda: Counter(7, "terminated"), n_envs), convert))
    learn_and_check(model, 24)
    check_counter_transitions(model.replay_buffer, 7, "terminated")


def test_vec_env_that_gives_tensors_in_a_dict():
    env = make_vec_env(lambda: SpaceEnv(spaces.Dict(a=BOX, b=spaces.Discrete(3))), 2)
    learn_and_check(tiny_model(Convert(env, CONVERSIONS[1]), "MultiInputPolicy"), 20)


class Replace(VecEnvWrapper):
    """Gives something else in place of one of the results."""

    def __init__(self, venv, index, value):
        super().__init__(venv)
        self.index, self.value = index, value

    def reset(self):
        return self.venv.reset() if self.index is not None else self.value(self.venv.reset())

    def step_wait(self):
        results = list(self.venv.step_wait())
        if self.index is not None:
            results[self.index] = self.value(results[self.index])
        return tuple(results)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, lambda obs: None, "observations of the type NoneType"),
        (0, lambda obs: [[0.0], [0.0, 1.0]], "observations of the type list"),
        (1, lambda rewards: ["a"], "rewards of the type list"),
        (1, lambda rewards: th.zeros(1, dtype=th.bfloat16), "rewards of the type torch.bfloat16"),
        (2, lambda dones: None, "dones of the type NoneType"),
        (2, lambda dones: np.array(["no"]), "dones of the type <U2"),
        (2, lambda dones: [False, False], r"dones of the shape \(2,\), not \(1,\)"),
    ],
)
def test_results_that_cannot_be_converted(index, value, message):
    model = tiny_model(Replace(make_vec_env(SpaceEnv, 1), index, value))
    with pytest.raises(BadValueError, match=f"The environments gave {message}.* at step 1"):
        model.learn(10)
    assert model.replay_buffer.size() == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [(lambda obs: [obs], "the type list"), (lambda obs: {"other": obs["a"]}, "the keys 'other'")],
)
def test_results_that_are_no_dict(value, message):
    env = make_vec_env(lambda: SpaceEnv(spaces.Dict(a=BOX)), 1)
    for index in (0, None):
        with pytest.raises(BadValueError, match=f"observations of {message}, not a dict with 'a'"):
            tiny_model(Replace(env, index, value), "MultiInputPolicy").learn(10)


@pytest.mark.parametrize("infos", [{}, [{}]])
def test_infos_returned_from_reset(infos):
    model = tiny_model(Replace(make_vec_env(SpaceEnv, 1), None, lambda obs: (obs, infos)))
    with pytest.raises(TypeError, match=r"tuple \(observations, infos\) from reset.*reset_infos"):
        model.learn(10)


# gymnasium's


def vector_env(mode="NEXT_STEP", n_envs=2, cls=None, env=lambda: Counter(7, "terminated"), **kwargs):
    cls = cls or gym.vector.SyncVectorEnv
    return cls([env] * n_envs, autoreset_mode=AutoresetMode[mode], **kwargs)


class Lengths(Counter):
    """Episodes of two environments end at different times."""

    made = itertools.count()

    def __init__(self):
        super().__init__(7, ("terminated", "truncated")[next(self.made) % 2])

    def reset(self, **kwargs):
        info = super().reset(**kwargs)[1]
        self.number += np.random.default_rng(int(self.number)).integers(5)
        return np.array([self.number, -1], dtype=np.float32), info | {"started": self.number}

    def step(self, action):
        return (*super().step(action)[:4], {"number": self.number})


@gymnasium_1_1
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_vector_env(n_envs, mode, copy):
    """Only true transitions are stored, as many as steps were taken, with the infos of each step and reset."""
    model = tiny_model(vector_env(mode, n_envs, env=Lengths, copy=copy), learning_starts=50)
    seen = []

    def callback(locals_, globals_):
        for info, done in zip(locals_["infos"], locals_["dones"], strict=True):
            assert info["number"] >= 0
            seen.append(info["TimeLimit.truncated"])
            if done:
                assert info["terminal_observation"][0] % 100 == 7
                assert info["episode"]["l"] <= 7
        return True

    model.learn(60, callback=callback)
    assert model.replay_buffer.size() == 60 == len(seen)
    samples = model.replay_buffer.get_subtrajectories(model.replay_buffer.sampling_probabilities()[0])
    mask = samples.mask.numpy().astype(bool)
    numbers, last_actions = np.moveaxis(samples.observations.numpy(), -1, 0)
    np.testing.assert_array_equal(np.diff(numbers)[mask], 1)
    np.testing.assert_array_equal(samples.actions[..., 0].numpy()[mask], last_actions[:, 1:][mask])
    np.testing.assert_array_equal(samples.rewards.numpy()[mask], (numbers[:, 1:] % 10)[mask])
    if n_envs > 1:
        assert any(seen)
    assert all("started" in info for info in model.get_env().unwrapped.reset_infos)


@gymnasium_1_1
@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_vector_env_of_processes(mode):
    env = vector_env(mode, cls=gym.vector.AsyncVectorEnv)
    try:
        model = tiny_model(env, learning_starts=50)
        model.learn(60)
        assert model.replay_buffer.size() == 60
        # Each process counts its own episodes
        check_counter_transitions(model.replay_buffer, 7, "terminated")
    finally:
        env.close()


@gymnasium_1_1
@pytest.mark.parametrize("space", [spaces.Dict(a=BOX, b=spaces.Discrete(3, start=1)), spaces.Discrete(4)], ids=str)
@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_vector_env_of_other_spaces(mode, space):
    env = vector_env(mode, env=lambda: SpaceEnv(space, spaces.MultiDiscrete([2, 3])))
    learn_and_check(tiny_model(env, policy_for(space)), 30)


@gymnasium_1_1
def test_vector_env_elsewhere(tmp_path):
    """Set later, in a loaded model, in evaluations, in a VecNormalize and with wrappers of gymnasium."""
    model = tiny_model(Counter(7, "terminated"))
    model.learn(10)
    model.save(tmp_path / "model")
    path = write_checkpoint(model, tmp_path)
    evaluation = EvalCallback(VecMonitor(GymnasiumVecEnv(vector_env())), eval_freq=10, n_eval_episodes=2, verbose=0)
    env = RecordEpisodeStatistics(vector_env(n_envs=1))
    model.set_env(env)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The environments of training and evaluation are of two types
        model.learn(20, callback=evaluation)
    assert evaluation.last_mean_reward == sum(range(1, 8))
    loaded = MRQ.load(tmp_path / "model", env=DictInfoToList(vector_env(n_envs=1)), device="cpu")
    loaded.learn(10)
    resumed = MRQ.resume(path, vector_env(n_envs=1), device="cpu")
    resumed.learn(10, reset_num_timesteps=False)
    check_counter_transitions(resumed.replay_buffer, 7, "terminated")
    normalized = VecNormalize(GymnasiumVecEnv(vector_env()))
    learn_and_check(tiny_model(normalized), 30)


@gymnasium_1_1
def test_vector_env_as_a_vec_env():
    env = GymnasiumVecEnv(vector_env(env=lambda: Monitor(Counter(3))))
    env.seed(5)
    env.set_options({"a": 1})
    env.reset()
    assert env.env.unwrapped.envs[0].unwrapped.np_random_seed == 5
    assert env.get_attr("length") == [3, 3] and env.get_attr("length", [1]) == [3]
    assert env.env_is_wrapped(Monitor) == [True, True]
    env.set_attr("length", 4)
    assert env.get_attr("length") == [4, 4]
    assert env.env_method("has_wrapper_attr", "length") == [True, True]
    with pytest.raises(NotImplementedError, match="all environments only"):
        env.set_attr("length", 5, indices=0)
    env.set_options([{"a": 1}, {"a": 2}])
    with pytest.raises(ValueError, match="the same options"):
        env.reset()
    env.close()


@gymnasium_1_1
def test_vector_env_without_a_mode_that_gives_final_observations():
    with pytest.raises(ValueError, match=r"autoreset mode AutoresetMode.DISABLED.*NEXT_STEP and SAME_STEP can be used"):
        tiny_model(vector_env("DISABLED"))
    env = vector_env()
    del env.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match="autoreset mode None"):
        tiny_model(env)


@gymnasium_1_1
def test_vector_env_that_cannot_reset_some_of_its_environments():
    class AtOnce(VectorEnv):
        """All environments are one array, and reset begins with all of them again."""

        metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
        single_observation_space, single_action_space = spaces.Box(-np.inf, np.inf, (2,)), BOX

        def __init__(self, num_envs):
            self.num_envs = num_envs

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros((self.num_envs, 2), np.float32), {}

        def step(self, actions):
            self.t += 1
            no = np.zeros(self.num_envs, bool)
            infos = {"t": self.t, "force": th.ones(self.num_envs), "nested": {"a": [2] * self.num_envs, "_a": ~no}}
            return np.full((self.num_envs, 2), self.t, np.float32), np.ones(self.num_envs), no | (self.t == 5), no, infos

    with pytest.raises(ValueError, match=r"NEXT_STEP and cannot reset only.*vectorization_mode='sync' or 'async'"):
        tiny_model(AtOnce(2))
    model = tiny_model(AtOnce(1))
    learn_and_check(model, 30)
    samples = model.replay_buffer.get_n_step(model.replay_buffer.sampling_probabilities()[0])
    assert set(samples.next_observations[samples.terminated[:, 0] == 1].flatten().tolist()) == {5}
    # Infos that are no arrays, and arrays without a mask
    env = model.get_env()
    env.reset()
    info = env.step(np.zeros((1, 2)))[3][0]
    assert info == {"t": 1, "force": th.ones(()), "nested": {"a": 2}, "TimeLimit.truncated": False}
    for wrapper in (NormalizeReward, NormalizeObservation):
        with pytest.raises(ValueError, match=rf"{wrapper.__name__}.*Use VecNormalize"):
            tiny_model(wrapper(vector_env()))
    env = vector_env(cls=gym.vector.AsyncVectorEnv, shared_memory=False)
    with pytest.raises(ValueError, match="shared_memory=True"):
        tiny_model(env)
    env.close()


@pytest.mark.skipif(AutoresetMode is not None, reason="for gymnasium 1.0")
def test_vector_env_of_gymnasium_1_0():
    with pytest.raises(ValueError, match=r"gymnasium 1\.1 or later"):
        tiny_model(gym.vector.SyncVectorEnv([Counter] * 2))
