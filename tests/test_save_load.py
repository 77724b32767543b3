"""
Saving includes everything that training depends on, and loaded models train and act.
"""

import gc
import io
import warnings
import weakref
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from envs import BOX, IMAGE, VECTOR, CounterEnv, SpaceEnv, check_counter_transitions, learn_and_check, policy_for, tiny_model
from gymnasium import spaces
from helpers import NETWORKS, same, snapshot
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import save_to_pkl, save_to_zip_file
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mrq import DRQ, MRQ
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.persist.replay_files import ReplayFileError

ZOO_CUSTOM_OBJECTS = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}


def in_memory(model):
    """The saved model, as a file in memory."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def buffer_in_memory(model):
    """The saved replay buffer of a model, as a file in memory."""
    file = io.BytesIO()
    model.save_replay_buffer(file)
    file.seek(0)
    return file


def assert_equal(first, second):
    """Whether nested dicts, lists and tensors are equal to the last bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_equal(value, second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert th.equal(first, second) if isinstance(first, th.Tensor) else first == second


def arrays_in(thing, seen=None):
    """All arrays and tensors that can be reached from an object."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (np.ndarray, th.Tensor)):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from arrays_in(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from arrays_in(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from arrays_in(vars(thing), seen)


@pytest.fixture(scope="module", params=["Box", "MultiBinary", "image", "Dict"])
def trained(request):
    """A trained model, not to be changed, and what makes its environment."""
    observation_space = {"image": IMAGE, "Dict": spaces.Dict(image=IMAGE, vector=VECTOR)}.get(request.param, VECTOR)
    action_space = spaces.MultiBinary(3) if request.param == "MultiBinary" else BOX

    def make_env():
        return SpaceEnv(observation_space, action_space)

    model = tiny_model(make_env(), policy_for(observation_space), exploration_noise=0.17, gamma=0.91)
    model.learn(27)
    return model, make_env


def some_obs(env):
    env.observation_space.seed(1)
    return env.observation_space.sample()


@pytest.mark.parametrize("where", ["path", "str", "BytesIO"])
@pytest.mark.parametrize("with_env", [True, False])
def test_loaded_model_is_the_same(trained, where, with_env, tmp_path):
    model, make_env = trained
    file = {"path": tmp_path / "model.zip", "str": str(tmp_path / "model"), "BytesIO": io.BytesIO()}[where]
    model.save(file)
    if where == "BytesIO":
        file.seek(0)
    loaded = MRQ.load(file, env=make_env() if with_env else None, device="cpu")
    assert (loaded.get_env() is not None) == with_env
    obs = some_obs(make_env())
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert same(snapshot(loaded.policy), snapshot(model.policy))
    assert loaded.device == th.device("cpu")


def test_everything_is_in_the_file(trained):
    model, _ = trained
    loaded = MRQ.load(in_memory(model), device="cpu")
    # Networks, targets and optimisers
    for name in NETWORKS:
        online, target = getattr(loaded, name), getattr(loaded, f"{name}_target")
        assert online is getattr(loaded.policy, name) and target is getattr(loaded.policy, f"{name}_target")
        assert same(snapshot(online), snapshot(getattr(model, name)))
        assert same(snapshot(target), snapshot(getattr(model, f"{name}_target")))
        assert not same(snapshot(online), snapshot(target))
        state = online.optimizer.state_dict()
        assert len(state["state"]) == len(list(online.parameters()))
        assert_equal(state, getattr(model, name).optimizer.state_dict())
        assert {id(p) for p in online.optimizer.param_groups[0]["params"]} == {id(p) for p in online.parameters()}
    # Counters and scales
    assert loaded._n_updates == model._n_updates == 17
    assert loaded.num_timesteps == model.num_timesteps == 27
    assert loaded.reward_scale == model.reward_scale != 1.0
    assert loaded.target_reward_scale == model.target_reward_scale not in (0.0, model.reward_scale)
    # Hyperparameters
    for name in ("exploration_noise", "gamma", "learning_starts", "batch_size", "target_update_interval", "buffer_size"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.learner.hyperparameters.gamma == 0.91
    assert loaded.replay_buffer.horizon == model.replay_buffer.horizon


@pytest.mark.parametrize("n_envs", [1, 2])
def test_training_goes_on_as_if_never_saved(trained, n_envs):
    """With model and buffer from files, further training steps are the same to the last bit."""
    _, make_env = trained
    env = make_vec_env(make_env, n_envs)
    model = tiny_model(env, policy_for(make_env().observation_space))
    model.learn(28)
    assert model._n_updates % model.target_update_interval != 0
    loaded = MRQ.load(in_memory(model), env=make_vec_env(make_env, n_envs), device="cpu")
    loaded.load_replay_buffer(buffer_in_memory(model))
    loaded.set_logger(model.logger)
    for one in (model, loaded):
        set_random_seed(11)
        one.train(gradient_steps=8, batch_size=8)
    assert loaded._n_updates == model._n_updates
    assert same(snapshot(loaded.policy), snapshot(model.policy))
    for name in NETWORKS:
        assert_equal(getattr(loaded, name).optimizer.state_dict(), getattr(model, name).optimizer.state_dict())
    assert (loaded.reward_scale, loaded.target_reward_scale) == (model.reward_scale, model.target_reward_scale)


def test_learn_after_load(trained):
    model, make_env = trained
    loaded = MRQ.load(in_memory(model), env=make_env(), device="cpu")
    before = snapshot(loaded.policy)
    loaded.learn(12, reset_num_timesteps=False)
    assert loaded.num_timesteps == 39
    assert loaded._n_updates > model._n_updates
    assert not same(before, snapshot(loaded.policy))


def test_load_for_another_number_of_environments(trained):
    model, make_env = trained
    loaded = MRQ.load(in_memory(model), env=make_vec_env(make_env, 3), device="cpu")
    assert loaded.n_envs == loaded.replay_buffer.n_envs == 3
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.replay_buffer.size() == 30


def test_load_without_env_then_set_env(trained):
    model, make_env = trained
    loaded = MRQ.load(in_memory(model), device="cpu")
    with pytest.raises(AssertionError, match="environment"):
        loaded.learn(20)
    loaded.set_env(make_env())
    loaded.learn(20)
    assert loaded._n_updates > model._n_updates


def test_load_checks_the_environment(trained):
    model, _ = trained
    with pytest.raises(ValueError, match="spaces do not match"):
        MRQ.load(in_memory(model), env=SpaceEnv(spaces.Box(-1, 1, (99,))), device="cpu")


@pytest.mark.parametrize("where", ["custom_objects", "keyword"])
def test_load_to_act_as_rl_zoo3_does(trained, where):
    model, make_env = trained
    small = {"buffer_size": 1}
    if where == "custom_objects":
        loaded = MRQ.load(in_memory(model), env=make_env(), device="cpu", custom_objects=ZOO_CUSTOM_OBJECTS | small)
    else:
        kwargs = small | {"optimize_memory_usage": False}
        loaded = MRQ.load(in_memory(model), env=make_env(), device="cpu", custom_objects=ZOO_CUSTOM_OBJECTS, **kwargs)
    obs = some_obs(make_env())
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match=r"buffer_size of \d+ or more"):
        loaded.learn(20)


def test_load_with_other_learning_rates(trained):
    model, make_env = trained
    loaded = MRQ.load(
        in_memory(model), env=make_env(), device="cpu", custom_objects={"learning_rate": 0.0}, encoder_learning_rate=0.0
    )
    before = snapshot(loaded.policy)
    loaded.learn(20)
    after = snapshot(loaded.policy)
    assert loaded._n_updates > model._n_updates
    for network in NETWORKS:
        assert all(th.equal(before[name], after[name]) for name, _ in getattr(loaded, network).named_parameters(network))


def test_load_with_another_horizon(trained):
    """Hyperparameters given to load reach the replay buffer."""
    model, make_env = trained
    loaded = MRQ.load(in_memory(model), env=make_env(), device="cpu", encoder_horizon=2, n_steps=1)
    assert (loaded.replay_buffer.horizon, loaded.replay_buffer.n_steps) == (2, 1)
    loaded.learn(20)


def test_loaded_model_reserves_no_replay_memory():
    model = MRQ("CnnPolicy", SpaceEnv(spaces.Box(0, 255, (84, 84, 4), dtype=np.uint8)), device="cpu")
    loaded = MRQ.load(in_memory(model), env=SpaceEnv(spaces.Box(0, 255, (84, 84, 4), dtype=np.uint8)), device="cpu")
    loaded.predict(loaded.get_env().reset())
    assert loaded.buffer_size == 1_000_000
    for one in (model, loaded):
        arrays = list(arrays_in(one.replay_buffer))
        assert arrays
        assert sum(array.nbytes for array in arrays) < 1e6


@pytest.mark.parametrize("replay_buffer_class", [None, SubtrajectoryReplayBuffer])
@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Dict(vector=VECTOR)], ids=["Box", "Dict"])
def test_no_warnings(replay_buffer_class, observation_space):
    """``n_steps`` above one means another replay buffer to the base class, or a warning."""

    def make_env():
        return SpaceEnv(observation_space)

    policy = policy_for(observation_space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model(make_env(), policy, replay_buffer_class=replay_buffer_class, n_steps=3)
        assert type(model.replay_buffer) is SubtrajectoryReplayBuffer
        model.learn(20)
        model.learn(20, reset_num_timesteps=False)
        loaded = MRQ.load(in_memory(model), env=make_env(), device="cpu")
        assert type(loaded.replay_buffer) is SubtrajectoryReplayBuffer
        loaded.load_replay_buffer(buffer_in_memory(model))
        loaded.learn(20, reset_num_timesteps=False)
        MRQ.load(in_memory(loaded), device="cpu").predict(some_obs(make_env()))


def test_get_and_set_parameters(trained):
    model, make_env = trained
    other = tiny_model(make_env(), policy_for(make_env().observation_space), seed=1)
    parameters = deepcopy(model.get_parameters())
    assert set(parameters) == {"policy", *(f"{name}.optimizer" for name in NETWORKS)}
    assert model.reward_scale != other.reward_scale
    assert not same(snapshot(other.policy), snapshot(model.policy))
    other.set_parameters(parameters, device="cpu")
    assert same(snapshot(other.policy), snapshot(model.policy))
    for name in NETWORKS:
        assert_equal(getattr(other, name).optimizer.state_dict(), getattr(model, name).optimizer.state_dict())
    # The units of the values
    assert (other.reward_scale, other.target_reward_scale) == (model.reward_scale, model.target_reward_scale)
    # In place: the networks that learn also act
    other.learn(20)
    assert not same(snapshot(other.policy), snapshot(model.policy))


def test_set_parameters_from_a_file(trained):
    model, make_env = trained
    other = tiny_model(make_env(), policy_for(make_env().observation_space), seed=1)
    other.set_parameters(in_memory(model), device="cpu")
    assert same(snapshot(other.policy), snapshot(model.policy))
    assert other.reward_scale == model.reward_scale


def test_values_keep_their_units():
    """Returns that the values stand for carry over."""
    model, other = (tiny_model(SpaceEnv(reward=100.0, length=5), gamma=0.5, seed=seed) for seed in (0, 1))
    model.learn(100)
    other.learn(15)
    other.set_parameters(model.get_parameters(), device="cpu")
    values = []
    for each in (model, other):
        with th.no_grad():
            z_s = each.encoder.state(th.zeros(1, *VECTOR.shape))
            values.append(each.reward_scale * each.critic(each.encoder.state_action(z_s, th.zeros(1, 2))).mean())
    assert values[0] == values[1]
    assert model.reward_scale > 10


def test_set_parameters_errors():
    model = tiny_model(SpaceEnv())
    parameters = model.get_parameters()
    del parameters["actor.optimizer"]
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters(parameters, exact_match=True)
    model.set_parameters(parameters, exact_match=False)
    with pytest.raises(ValueError, match="invalid object name"):
        model.set_parameters({"no.such.thing": {}}, exact_match=False)
    weights = dict(parameters["policy"])
    name, value = weights.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({"policy": weights}, exact_match=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.set_parameters({"policy": {**weights, name: th.zeros(len(value) + 1)}}, exact_match=False)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("observation", ["vector", "frames", "Dict"])
def test_replay_buffer_survives(observation, n_envs, tmp_path):
    space = {"frames": IMAGE, "Dict": spaces.Dict(image=IMAGE, vector=VECTOR)}.get(observation, VECTOR)
    env = make_vec_env(lambda: SpaceEnv(space), n_envs)
    model = tiny_model(env, policy_for(space), min_td_error=1e-3)
    model.learn(36)
    assert model.replay_buffer.max_priority != 1.0 or len(set(model.replay_buffer.sampling_probabilities()[1])) > 1
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = tiny_model(make_vec_env(lambda: SpaceEnv(space), n_envs), policy_for(space))
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    ours, theirs = model.replay_buffer, other.replay_buffer
    assert theirs.size() == ours.size() == 36
    assert theirs.max_priority == ours.max_priority
    for mine, loaded in zip(ours.sampling_probabilities(), theirs.sampling_probabilities(), strict=True):
        np.testing.assert_array_equal(mine, loaded)
    indices = ours.sampling_probabilities()[0]
    for method in ("get_subtrajectories", "get_n_step"):
        for mine, loaded in zip(getattr(ours, method)(indices), getattr(theirs, method)(indices), strict=True):
            for key in mine if isinstance(mine, dict) else [...]:
                np.testing.assert_array_equal(mine[key], loaded[key])
    other.learn(12, reset_num_timesteps=False)
    assert theirs.size() == 48


@pytest.mark.parametrize(
    ("difference", "change"),
    [
        ("number of environments", {"n_envs": 2}),
        ("observation space", {"observation_space": spaces.Box(-1, 1, (4,))}),
        ("action space", {"action_space": spaces.Discrete(3)}),
        ("horizon", {"encoder_horizon": 4}),
        ("n_steps", {"n_steps": 2}),
    ],
)
def test_replay_buffer_of_another_model(difference, change, tmp_path):
    spaces_ = {"observation_space": VECTOR, "action_space": BOX}

    def make_model(n_envs=1, encoder_horizon=5, n_steps=3, **changed_space):
        env = make_vec_env(lambda: SpaceEnv(**(spaces_ | changed_space)), n_envs)
        return tiny_model(env, encoder_horizon=encoder_horizon, n_steps=n_steps)

    other = make_model(**change)
    other.learn(20)
    other.save_replay_buffer(tmp_path / "buffer.pkl")
    model = make_model()
    model.learn(20)
    present = model.replay_buffer
    with pytest.raises(ValueError, match=difference):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is present
    model.learn(10, reset_num_timesteps=False)
    assert present.size() == 30


def test_replay_buffer_of_another_algorithm():
    model = tiny_model(SpaceEnv())
    present = model.replay_buffer
    file = io.BytesIO()
    save_to_pkl(file, ReplayBuffer(10, VECTOR, BOX, device="cpu"))
    file.seek(0)
    with pytest.raises(ValueError, match="The file is a pickle"):
        model.load_replay_buffer(file)
    assert model.replay_buffer is present


@pytest.mark.parametrize("trained", [True, False])
def test_replay_buffer_loaded_after_the_present_one_was_freed(trained, tmp_path):
    """As TD3 allows: there is never a second one in memory."""
    source = tiny_model(SpaceEnv()).learn(30)
    source.save_replay_buffer(tmp_path / "b")
    model = tiny_model(SpaceEnv(), buffer_size=80, encoder_horizon=5)
    if trained:
        model.learn(20)
    freed = weakref.ref(model.replay_buffer)
    model.replay_buffer = None
    gc.collect()
    assert freed() is None
    with pytest.raises(ValueError, match="no replay buffer to learn from"):
        model.learn(5)
    (tmp_path / "half.pkl").write_bytes((tmp_path / "b.pkl").read_bytes()[:-9])
    with pytest.raises(ReplayFileError, match="truncated"):
        model.load_replay_buffer(tmp_path / "half.pkl")
    assert model.replay_buffer is None
    model.load_replay_buffer(tmp_path / "b")
    assert model.replay_buffer.size() == 30
    learn_and_check(model, 20)
    assert model.replay_buffer.size() == 50


def test_loaded_replay_buffer_is_on_the_device_of_the_model(tmp_path):
    model = tiny_model(SpaceEnv()).learn(20)
    model.save_replay_buffer(tmp_path / "b")
    model.device = "meta"
    model.load_replay_buffer(tmp_path / "b")
    assert model.replay_buffer.device == th.device("meta")
    assert model.replay_buffer.sample(4).rewards.device.type == "meta"


def test_missing_replay_buffer_file(tmp_path):
    model = tiny_model(SpaceEnv())
    present = model.replay_buffer
    with pytest.raises(FileNotFoundError):
        model.load_replay_buffer(tmp_path / "none.pkl")
    assert model.replay_buffer is present


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_no_false_transition_after_loading(end, tmp_path):
    """The episode that the saved buffer ends with does not go on in the environment of the loaded model."""
    model = tiny_model(CounterEnv(end=end))
    model.learn(24)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    for reset_num_timesteps in (True, False):
        loaded = MRQ.load(tmp_path / "model", env=CounterEnv(end=end), device="cpu")
        loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.learn(24, reset_num_timesteps=reset_num_timesteps)
        assert loaded.replay_buffer.size() == 48
        numbers = check_counter_transitions(loaded.replay_buffer, 7, end)
        # All but those whose horizon is not complete can be sampled, also those before the cut
        assert len(numbers) == len(set(numbers)) == 48 - 3


def test_vec_normalize(tmp_path):
    def make_env():
        return DummyVecEnv([lambda: SpaceEnv(reward=1000.0)])

    env = VecNormalize(make_env())
    model = tiny_model(env)
    model.learn(30)
    model.save(tmp_path / "model")
    env.save(tmp_path / "statistics")
    loaded_env = VecNormalize.load(tmp_path / "statistics", make_env())
    loaded = MRQ.load(tmp_path / "model", env=loaded_env, device="cpu")
    assert loaded.get_vec_normalize_env() is loaded_env
    raw = VECTOR.sample()
    actions = [one.predict(one.get_vec_normalize_env().normalize_obs(raw), deterministic=True)[0] for one in (model, loaded)]
    np.testing.assert_array_equal(*actions)
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates


def test_schedules_survive(tmp_path):
    model = tiny_model(SpaceEnv(), learning_rate=lambda p: 1e-3 * (1 + p), encoder_learning_rate=lambda p: 5e-4 * (1 + p))
    model.learn(20)
    model.save(tmp_path / "model")
    loaded = MRQ.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    loaded.learn(30)
    assert loaded.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert loaded.encoder.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(("saved", "loading"), [(MRQ, DRQ), (DRQ, MRQ)])
def test_siblings(saved, loading, tmp_path):
    """Models and checkpoints of MRQ are none of DRQ, and the reverse; subclasses may load them."""

    class Mine(saved):
        pass

    model = tiny_model(SpaceEnv(), algorithm=saved)
    model.learn(20, callback=ResumableCheckpointCallback(20, tmp_path / "checkpoints"))
    model.save(tmp_path / "model")
    message = f"holds a model of {saved.__name__}, not of {loading.__name__}"
    with pytest.raises(ValueError, match=message):
        loading.load(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        loading.resume(tmp_path / "checkpoints", SpaceEnv())
    assert Mine.load(tmp_path / "model").algorithm == saved.__name__
    saved.resume(tmp_path / "checkpoints", SpaceEnv())


@pytest.mark.parametrize("algorithm", [TD3, SAC, PPO])
def test_model_of_another_algorithm(algorithm, tmp_path):
    """Told before anything in the file is unpickled."""
    path = tmp_path / "t"
    model = algorithm("MlpPolicy", "Pendulum-v1", device="cpu", **({} if algorithm is PPO else {"buffer_size": 10}))
    model.save(path)
    file = io.BytesIO(b"")
    model.save(file)
    file.seek(3)
    for where, name in ((path, path), (str(path), path), (f"{path}.zip", f"{path}.zip"), (file, "The file")):
        with pytest.raises(ValueError, match=f"{name} holds a model of {algorithm.__name__}, not of MRQ"):
            MRQ.load(where)
    assert file.tell() == 3 and not file.closed


def test_model_of_an_algorithm_nobody_knows(tmp_path):
    save_to_zip_file(tmp_path / "t", {"policy_class": None, "gamma": 0.9}, {})
    with pytest.raises(ValueError, match="holds a model of another algorithm, not of MRQ"):
        MRQ.load(tmp_path / "t")


def test_set_parameters_of_another_algorithm(tmp_path):
    TD3("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10).save(tmp_path / "t")
    with pytest.raises(ValueError, match="holds a model of TD3, not of MRQ"):
        tiny_model("Pendulum-v1").set_parameters(tmp_path / "t")
