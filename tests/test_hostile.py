"""
Whatever an environment does, training goes on with finite weights, or a clear error leaves the model and its replay buffer
usable. ``SB3_MRQ_HYPOTHESIS_PROFILE=long`` generates twenty times as many cases.
"""

import multiprocessing
import os
import signal
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch as th
from envs import TINY_POLICY, policy_for, tiny_model
from gymnasium import spaces
from helpers import make_learner, make_policy, set_scales, update_encoder, update_value_and_policy
from hostile import (
    ENDS,
    FAULTS,
    INDEX_FAULTS,
    LENGTHS,
    MAGNITUDES,
    REWARDS,
    TIMES,
    HostileEnv,
    StackingVecEnv,
    action_spaces,
    assert_acts,
    assert_clear,
    assert_finite,
    check_buffer,
    observation_spaces,
    random_value,
    worker,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.checks import BadValueError


def cases(number, **strategies):
    """As ``given``, for a number of cases."""

    def decorate(test):
        phases = [phase for phase in Phase if phase is not Phase.explain]
        checks = list(HealthCheck)
        case = settings(max_examples=number * TIMES, deadline=None, phases=phases, suppress_health_check=checks)
        return case(given(**strategies)(test))

    return decorate


SEEDS = st.integers(0, 2**32 - 1)
TINIER_POLICY = TINY_POLICY | {"net_arch": {"encoder": [8], "qf": [8], "pi": [8]}, "z_s_dim": 8, "z_a_dim": 4, "z_sa_dim": 8}


def quick_model(env, **kwargs):
    """A model that takes a few milliseconds a step."""
    settings_ = dict(buffer_size=60, learning_starts=6, batch_size=4, target_update_interval=3, gradient_steps=1, train_freq=2)
    return tiny_model(env, policy_for(env.observation_space), TINIER_POLICY, **{**settings_, **kwargs})


# -- the buffer alone --------------------------------------------------------------------------------------------------


def as_batch(values):
    if isinstance(values[0], dict):
        return {key: np.stack([value[key] for value in values]) for key in values[0]}
    return np.stack(values)


def key_of(*parts):
    """The identity of a transition, from stored arrays."""
    arrays = []
    for part in parts:
        arrays += [part[key] for key in sorted(part)] if isinstance(part, dict) else [part]
    return b"|".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def stored_form(obs):
    """float64 is stored in float32, everything else unchanged."""
    if isinstance(obs, dict):
        return {key: stored_form(value) for key, value in obs.items()}
    return obs.astype(np.float32) if obs.dtype == np.float64 else obs


def row(obs, *index):
    return {key: value[index].numpy() for key, value in obs.items()} if isinstance(obs, dict) else obs[index].numpy()


def channels_first(space):
    """Images as SB3 gives them to a buffer."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: channels_first(part) for key, part in space.spaces.items()})
    if is_image_space(space) and space.shape[0] > space.shape[2]:
        return spaces.Box(0, 255, (space.shape[2], *space.shape[:2]), dtype=np.uint8)
    return space


BUFFER_FAULTS = [None, None, "nan", "inf", "too large", "shape", "reward", "rewards", "dones", "text", "range", "half"]


@cases(
    300,
    observation_space=observation_spaces(side=5),
    action_space=action_spaces(),
    rewards=REWARDS,
    lengths=LENGTHS,
    n_envs=st.integers(1, 3),
    horizon=st.integers(1, 5),
    n_steps=st.integers(1, 5),
    spare=st.integers(0, 12),
    steps=st.integers(5, 40),
    fault=st.sampled_from(BUFFER_FAULTS),
    stacked=st.booleans(),
    seed=SEEDS,
)
@pytest.mark.filterwarnings("ignore:The image observations look like stacks")
def test_buffer(
    observation_space, action_space, rewards, lengths, n_envs, horizon, n_steps, spare, steps, fault, stacked, seed
):
    """It returns only transitions that were added. A refused transition leaves it unchanged."""
    rng = np.random.default_rng(seed)
    space = channels_first(observation_space)
    size = (max(horizon, n_steps) + 2 + spare) * n_envs
    buffer = SubtrajectoryReplayBuffer(size, space, action_space, "cpu", n_envs, horizon=horizon, n_steps=n_steps)

    def observe(env, first):
        obs = random_value(space, rng)
        if stacked and isinstance(space, spaces.Box) and is_image_space(space):
            frame = obs[-1:]
            obs = np.concatenate([frame] * space.shape[0] if first else [*latest[env][1:, None], frame])
        return obs

    latest, left, given_transitions = [None] * n_envs, [0] * n_envs, set()
    fault_step = int(rng.integers(steps))
    for step in range(steps):
        for env in range(n_envs):
            if left[env] == 0:
                latest[env] = observe(env, True)
                left[env] = lengths[int(rng.integers(len(lengths)))]
        obs, next_obs = list(latest), [observe(env, False) for env in range(n_envs)]
        reward = np.array([rewards[(step + env) % len(rewards)] for env in range(n_envs)], dtype=np.float32)
        left = [n - 1 for n in left]
        done = np.array([n == 0 for n in left])
        infos = [{"TimeLimit.truncated": bool(rng.integers(2))} for _ in range(n_envs)]
        actions = np.stack([random_action(action_space, rng) for _ in range(n_envs)])
        arguments = [as_batch(obs), as_batch(next_obs), actions, reward, done, infos]
        spoilt = spoil_arguments(fault, arguments, space, n_envs) if step == fault_step else None
        if spoilt is not None:
            before = contents(buffer) if step > 0 else None  # the first addition allocates the memory
            with pytest.raises(BadValueError) as info:
                buffer.add(*spoilt)
            assert_clear(info.value)
            assert before in (contents(buffer), None)
            assert buffer.size() == step * n_envs or buffer.full
        buffer.add(*arguments)
        latest = next_obs
        given_transitions |= {key_of(stored_form(o), r, stored_form(n)) for o, r, n in zip(obs, reward, next_obs, strict=True)}
    check_buffer(buffer)
    slots, _ = buffer.sampling_probabilities()
    if len(slots) == 0:
        return
    # Any transition of any sub-trajectory is one that was given
    samples = buffer.sample(8)
    mask = samples.mask.numpy().astype(bool)
    for i, t in zip(*np.nonzero(mask), strict=True):
        transition = row(samples.observations, i, t), samples.rewards[i, t].numpy(), row(samples.observations, i, t + 1)
        assert key_of(*transition) in given_transitions
    n_step = buffer.sample_n_step(8)
    buffer.update_priorities(n_step.indices, rng.uniform(1, 1e15, 8))
    check_buffer(buffer)


def random_action(space, rng):
    """An action in the form that is stored."""
    return rng.uniform(-1, 1, space.shape).astype(np.float32) if isinstance(space, spaces.Box) else random_value(space, rng)


def contents(buffer):
    """All that a buffer would give, as bytes."""
    slots, probabilities = buffer.sampling_probabilities()
    parts = [slots, probabilities, buffer._flags, buffer.rewards, buffer._write_pos, buffer._running, buffer._length]
    if len(slots):
        samples = buffer.get_subtrajectories(slots)
        parts += [value.numpy() for value in (samples.rewards, samples.terminated, samples.mask, samples.actions)]
        obs = samples.observations
        parts.append({key: value.numpy() for key, value in obs.items()} if isinstance(obs, dict) else obs.numpy())
    return key_of(*parts), buffer.pos, buffer.size(), buffer.n_sampleable, buffer.max_priority, buffer.has_terminated


def spoil_arguments(fault, arguments, space, n_envs):
    """Arguments for ``add`` of which one is bad, None where the space does not know the fault."""
    obs, next_obs, actions, reward, done, infos = arguments
    key, part = next(iter(space.spaces.items())) if isinstance(space, spaces.Dict) else (None, space)
    value = next_obs if key is None else next_obs[key]

    def replaced(value):
        return [obs, value if key is None else {**next_obs, key: value}, actions, reward, done, infos]

    number = {"nan": np.nan, "inf": np.inf, "too large": 1e31}.get(fault)
    if number is not None:
        bad_reward = reward.astype(np.float64)
        bad_reward[-1] = number
        if value.dtype not in (np.float32, np.float64):
            return [obs, next_obs, actions, bad_reward, done, infos]
        bad = value.copy()
        bad.reshape(n_envs, -1)[-1, -1] = number
        return replaced(bad)
    if fault == "shape":
        return replaced(np.stack([value] * 2, axis=1))
    if fault == "half" and value[0].size > 1:
        return replaced(value.reshape(n_envs, -1)[:, :-1])
    if fault == "text":
        return replaced(np.full(value.shape, "left"))
    if fault == "reward":
        return [obs, next_obs, actions, np.full(n_envs, None), done, infos]
    if fault == "rewards":
        return [obs, next_obs, actions, np.ones((n_envs, 2)), done, infos]
    if fault == "dones":
        return [obs, next_obs, actions, reward, np.ones(n_envs + 1, dtype=bool), infos]
    if fault == "range" and isinstance(part, (spaces.Discrete, spaces.MultiDiscrete)):
        return replaced(value + 5000)
    return None


# -- the updates alone -------------------------------------------------------------------------------------------------


@cache
def new_learner(discrete):
    """A small learner, which takes longer to make than to use, and its state at the start."""
    observation_space = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
    action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), dtype=np.float32)
    policy = make_policy(observation_space, action_space, **TINIER_POLICY)
    optimizers = [network.optimizer.state_dict() for network in (policy.encoder, policy.critic, policy.actor)]
    return policy, make_learner(policy), deepcopy({"policy": policy.state_dict(), "optimizers": optimizers})


@cases(
    150,
    rewards=REWARDS,
    scale=st.one_of(MAGNITUDES, st.floats(1e-8, 1e30)).map(lambda scale: max(scale, 1e-8)),
    target_scale=st.one_of(MAGNITUDES, st.floats(0, 1e30)),
    obs_size=st.one_of(MAGNITUDES.map(lambda size: min(size, 1e18)), st.floats(0, 1e18)),
    discrete=st.booleans(),
    terminated=st.booleans(),
    seed=SEEDS,
)
def test_updates(rewards, scale, target_scale, obs_size, discrete, terminated, seed):
    """Weights stay finite, and so do the priorities, with any rewards and any change of their scale."""
    th.manual_seed(seed)
    policy, learner, fresh = new_learner(discrete)
    policy.load_state_dict(fresh["policy"])
    for network, state in zip((policy.encoder, policy.critic, policy.actor), fresh["optimizers"], strict=True):
        network.optimizer.load_state_dict(state)

    def observe():
        return obs_size * th.empty(4, 3).uniform_(-1, 1)

    horizon = 3
    reward = th.tensor([[rewards[(i + t) % len(rewards)] for t in range(horizon)] for i in range(4)], dtype=th.float32)
    actions = th.nn.functional.one_hot(th.randint(2, (4, 3)), 2).float() if discrete else th.empty(4, 3, 1).uniform_(-1, 1)
    ended = th.zeros(4, horizon)
    ended[:, -1] = float(terminated)
    mask = th.ones(4, horizon)
    for _ in range(2):
        update_encoder(learner, th.stack([observe() for _ in range(horizon + 1)], dim=1), actions, reward, ended, mask)
        set_scales(policy, scale, target_scale)
        priorities, _ = update_value_and_policy(learner, *(observe(), actions[:, 0], reward, ended, mask, observe()))
        assert th.isfinite(priorities).all() and (priorities > 0).all()
    for name, value in policy.state_dict().items():
        assert th.isfinite(value).all(), name


# -- whole models ------------------------------------------------------------------------------------------------------


@cases(
    60,
    observation_space=observation_spaces(),
    action_space=action_spaces(),
    rewards=REWARDS,
    lengths=LENGTHS,
    ends=ENDS,
    n_envs=st.integers(1, 2),
    normalise=st.booleans(),
    steps=st.integers(10, 40),
    seed=SEEDS,
)
@pytest.mark.filterwarnings("ignore:The image observations look like stacks")
def test_odd_environments(observation_space, action_space, rewards, lengths, ends, n_envs, normalise, steps, seed):
    """All spaces, rewards and episodes that are allowed: it learns."""
    env = DummyVecEnv([lambda: HostileEnv(observation_space, action_space, lengths, ends, rewards)] * n_envs)
    if normalise and can_be_normalised(observation_space):
        env = VecNormalize(env)
    model = quick_model(env, seed=seed)
    model.learn(steps)
    assert model.replay_buffer.size() > 0
    if min(lengths) < 10 or steps > 25:
        assert model._n_updates > 0
    assert_finite(model)
    assert_acts(model, HostileEnv(observation_space, action_space))
    check_buffer(model.replay_buffer)


def can_be_normalised(space):
    # In float16 VecNormalize overflows by itself
    return isinstance(space, spaces.Box) and not is_image_space(space) and space.dtype != np.float16


@cases(
    60,
    observation_space=observation_spaces(),
    action_space=action_spaces(),
    fault=st.sampled_from(sorted(FAULTS)),
    fault_step=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    ends=ENDS,
    n_envs=st.integers(1, 2),
    vec_env=st.sampled_from([DummyVecEnv, StackingVecEnv]),
    normalise=st.booleans(),
    reset_num_timesteps=st.booleans(),
    seed=SEEDS,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The image observations look like stacks", "ignore:Conversion of an array")
def test_faulty_environments(
    observation_space,
    action_space,
    fault,
    fault_step,
    lengths,
    ends,
    n_envs,
    vec_env,
    normalise,
    reset_num_timesteps,
    seed,
):
    """One environment goes wrong. If that is an error it is a clear one, and the model goes on with a good environment."""

    def fine():
        return HostileEnv(observation_space, action_space, lengths, ends)

    def normalised(env):
        return VecNormalize(env) if normalise and can_be_normalised(observation_space) else env

    faulty = HostileEnv(observation_space, action_space, lengths, ends, fault=fault, fault_step=fault_step)
    model = quick_model(normalised(vec_env([fine] * (n_envs - 1) + [lambda: faulty])), seed=seed)
    error = None
    try:
        model.learn(40)
    except Exception as caught:
        error = caught
        assert_clear(error)
    assert faulty.faults == 1
    if error is None:
        # What has no such values may have been cast on the way, by numpy or by DummyVecEnv
        assert fault.startswith("observation") or fault.startswith("final observation")
        # VecNormalize clips a final observation, and what it was is not known
        clipped = normalise and faulty.ended_by_fault and fault.endswith((" inf", " -inf", " too large"))
        assert "raises" not in fault and (clipped or not must_be_refused(fault, observation_space, vec_env))
    assert_finite(model)
    assert_acts(model, fine())
    check_buffer(model.replay_buffer)
    before = model.replay_buffer.size()
    model.set_env(normalised(vec_env([fine] * n_envs)))
    model.learn(20, reset_num_timesteps=reset_num_timesteps)
    assert model.replay_buffer.size() >= min(before, 20)
    assert_finite(model)
    check_buffer(model.replay_buffer)


def must_be_refused(fault, space, vec_env):
    """Whether there is no way to take a bad observation for a good one."""
    part = space.spaces[sorted(space.spaces)[0]] if isinstance(space, spaces.Dict) else space
    if "None" in fault or "text" in fault:
        return vec_env is StackingVecEnv
    if "longer" in fault or "axis more" in fault:
        return vec_env is StackingVecEnv
    if fault in INDEX_FAULTS:
        return isinstance(part, (spaces.Discrete, spaces.MultiDiscrete))
    return isinstance(part, spaces.Box) and part.dtype in (np.float32, np.float64) and "objects" not in fault


# -- processes that die ------------------------------------------------------------------------------------------------


# SB3's default if available. With fork a worker would keep the pipes of the others open, and SB3 would wait forever.
START_METHOD = "forkserver"


@cases(2, victim=st.integers(0, 1), step=st.integers(0, 20), signal_=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
@pytest.mark.skipif(START_METHOD not in multiprocessing.get_all_start_methods(), reason="no forkserver on this system")
def test_workers_that_die(victim, step, signal_):
    multiprocessing.set_forkserver_preload(["hostile"])  # or each worker would import torch
    env = SubprocVecEnv([worker] * 2, start_method=START_METHOD)
    model = quick_model(env)
    process = env.processes[victim]

    def kill(*_):
        if model.num_timesteps >= step and process.is_alive():
            os.kill(process.pid, signal_)
            process.join()
        return True

    with pytest.raises(RuntimeError, match=f"process of environment {victim} ") as info:
        model.learn(40, callback=kill)
    assert_clear(info.value)
    for process in env.processes:
        process.terminate()
    assert_finite(model)
    assert_acts(model, worker())
    check_buffer(model.replay_buffer)
    model.set_env(DummyVecEnv([worker] * 2))
    model.learn(20, reset_num_timesteps=False)
    assert_finite(model)
    check_buffer(model.replay_buffer)
