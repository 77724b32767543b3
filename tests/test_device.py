"""
Training on the device: the replay buffer's copy there, captured training steps, and the way back where they fail.

With a GPU graphs are CUDA graphs. recorded_graph.py replays them without one, with the same restrictions: numbers are
constants, tensors keep their addresses, and nothing can be read from the device.
"""

import threading
import warnings
import weakref
from copy import deepcopy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import recorded_graph
import torch as th
from envs import TINY, TINY_POLICY, SpaceEnv, policy_for
from gymnasium import spaces
from helpers import NETWORKS
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_buffer import assert_frequencies
from torch.nn import functional as F

from sb3_mrq import DRQ, MRQ
from sb3_mrq.accelerate.device_copy import DeviceCopy
from sb3_mrq.accelerate.graphs import CaptureError, Graph, Staging, detect_host_sync
from sb3_mrq.accelerate.updates import Updates
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.priorities import PriorityTree

CPU = th.device("cpu")
BOX = spaces.Box(-1, 1, (2,), np.float32)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
STACK = spaces.Box(0, 255, (3, 8, 8), np.uint8)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
OBSERVATIONS = {
    "vector": VECTOR,
    "stack": STACK,
    "dict": spaces.Dict({"image": STACK, "vector": VECTOR, "count": spaces.Discrete(4)}),
}

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def equal(first, second):
    """Whether two samples hold the same."""
    pairs = zip(first, second, strict=True)
    return all(equal(a.values(), b.values()) if isinstance(a, dict) else np.array_equal(host(a), host(b)) for a, b in pairs)


def host(array):
    return array.cpu().numpy() if isinstance(array, th.Tensor) else array


class TestPriorities:
    @pytest.mark.parametrize("device", DEVICES)
    def test_draws_follow_the_priorities(self, device):
        th.manual_seed(0)
        n = 3 * PriorityTree.DEVICE_FAN_OUT + 100
        priorities = PriorityTree(n, th.device(device))
        weights = th.zeros(n, dtype=th.float64)
        some = th.randperm(n)[:200]
        weights[some] = th.rand(200, dtype=th.float64) + 0.5
        priorities.set(th.arange(n, device=device), weights.to(device))
        draws = np.concatenate([priorities.sample(1000).cpu().numpy() for _ in range(30)])
        assert_frequencies(draws, (weights / weights.sum()).numpy())

    def test_changes(self):
        priorities = PriorityTree(2000, CPU)
        priorities.set(th.tensor([3, 1500]), th.tensor([1.0, 2.0]))
        assert set(priorities.sample(100).tolist()) == {3, 1500}
        priorities.set(th.tensor([3]), th.tensor([0.0]))
        assert set(priorities.sample(100).tolist()) == {1500}
        # Tiny ones are not lost next to an earlier large one
        priorities.set(th.tensor([1500, 7]), th.tensor([1e20, 1e-20]))
        priorities.set(th.tensor([1500]), th.tensor([0.0]))
        assert set(priorities.sample(100).tolist()) == {7}
        priorities.leaves[:2] = th.tensor([0.0, 3.0])
        priorities.rebuild(0, 2)
        assert set(priorities.sample(100).tolist()) == {1}
        assert priorities.get(th.tensor([7, 3])).tolist() == [float(np.float32(1e-20)), 0]


class TestStaging:
    @pytest.mark.parametrize("device", DEVICES)
    def test_arrays_arrive(self, device):
        staging = Staging({"a": ((3,), th.int64), None: ((2, 2), th.uint8), "b": ((1, 3), th.float32)}, th.device(device))
        for k in range(3 * Staging.DEPTH):
            slots = staging.begin()
            slots["a"][:] = k
            slots[None][:] = [[k, 1], [2, 3]]
            slots["b"][:] = k / 2
            staging.send()
            arrays = staging.device_arrays
            assert arrays["a"].tolist() == [k] * 3
            assert arrays[None].tolist() == [[k, 1], [2, 3]]
            assert arrays["b"].tolist() == [[k / 2] * 3]

    def test_waits_for_the_copy_before(self):
        """A buffer is filled again only after the copy out of it has ended."""
        staging = Staging({"a": ((1,), th.int64)}, CPU)
        waited = []
        staging._sent = [SimpleNamespace(synchronize=lambda k=k: waited.append(k)) for k in range(Staging.DEPTH)]
        for _ in range(Staging.DEPTH + 1):
            staging.begin()
            staging.send()
        assert waited == [*range(Staging.DEPTH), 0]

    @needs_gpu
    def test_copies_that_are_late(self):
        """The values arrive although the device is far behind."""
        device = th.device("cuda")
        staging = Staging({"a": ((1000,), th.int64)}, device)
        arrived = []
        for k in range(50):
            th.cuda._sleep(1_000_000)
            staging.begin()["a"][:] = k
            staging.send()
            arrived.append(staging.device_arrays["a"].clone())
        assert [tensor.unique().tolist() for tensor in arrived] == [[k] for k in range(50)]


class Episodes:
    """Transitions of several environments at once, episodes of random lengths and ends, image stacks of random frames."""

    def __init__(self, space, n_envs, zero_filled, seed):
        self.space, self.n_envs, self.zero_filled = space, n_envs, zero_filled
        self.random = np.random.default_rng(seed)
        space.seed(seed)
        self.obs = [self.first() for _ in range(n_envs)]

    def first(self):
        return self.map(self.space, None, self.begin)

    def map(self, space, obs, function):
        if isinstance(space, spaces.Dict):
            return {key: function(part, None if obs is None else obs[key]) for key, part in space.spaces.items()}
        return function(space, obs)

    def begin(self, space, _):
        if space.shape == STACK.shape:
            frame = self.random.integers(1, 255, (1, 8, 8), dtype=np.uint8)
            older = np.zeros_like(frame) if self.zero_filled else frame
            return np.concatenate([older, older, frame])
        return space.sample()

    def go_on(self, space, obs):
        if space.shape == STACK.shape:
            return np.concatenate([obs[1:], self.random.integers(1, 255, (1, 8, 8), dtype=np.uint8)])
        return space.sample()

    def stack(self, obs):
        if isinstance(self.space, spaces.Dict):
            return {key: np.stack([o[key] for o in obs]) for key in self.space.spaces}
        return np.stack(obs)

    def step(self):
        """Arguments of the next ``add``."""
        next_obs = [self.map(self.space, obs, self.go_on) for obs in self.obs]
        done = self.random.random(self.n_envs) < 0.15
        truncated = self.random.random(self.n_envs) < 0.5
        arguments = (
            self.stack(self.obs),
            self.stack(next_obs),
            self.random.uniform(-1, 1, (self.n_envs, 2)),
            self.random.normal(size=self.n_envs).astype(np.float32),
            done,
            [{"TimeLimit.truncated": bool(t)} for t in truncated],
        )
        # Some are reset in the middle of an episode
        again = done | (self.random.random(self.n_envs) < 0.03)
        self.obs = [self.first() if a else obs for a, obs in zip(again, next_obs, strict=True)]
        return arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_filled", [True, False], ids=["zeros", "copies"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kind, fade", [(kind, 1.0) for kind in OBSERVATIONS] + [("vector", 0.97)])
def test_copy_is_the_buffer(kind, fade, n_envs, zero_filled, device):
    """After any adds and new priorities, rings that wrap included, the copy gives what the buffer gives."""
    space = deepcopy(OBSERVATIONS[kind])
    arguments = dict(n_envs=n_envs, horizon=4, n_steps=3, fade=fade)
    buffer, twin = (SubtrajectoryReplayBuffer(60 * n_envs, space, BOX, device="cpu", **arguments) for _ in range(2))
    episodes = Episodes(space, n_envs, zero_filled, seed=n_envs)
    random = np.random.default_rng(0)
    copy = None
    for k in range(400):
        arguments = episodes.step()
        buffer.add(*arguments)
        twin.add(*arguments)
        if k < 5 or random.random() < 0.7:
            continue
        if copy is None or not copy.is_current(buffer):
            copy = DeviceCopy(buffer, th.device(device))
        copy.flush()
        # The first time after a bulk copy, then after copies of what has changed
        indices, probabilities = twin.sampling_probabilities()
        on_device = th.from_numpy(indices).to(device)
        assert equal(buffer.read(copy.slots, on_device, buffer.horizon), twin.get_subtrajectories(indices))
        assert equal(buffer.read_n_step(copy.slots, on_device), twin.get_n_step(indices))
        ours = copy.priorities.weight(th.arange(60 * n_envs, device=device)).cpu().numpy()
        np.testing.assert_allclose(copy.priorities.total, ours.sum(), rtol=1e-12)
        assert np.array_equal(np.flatnonzero(ours), indices)
        np.testing.assert_allclose(ours[indices] / ours.sum(), probabilities, rtol=1e-12)
        # Drawn from there, and with new priorities as of training
        samples = copy.sample_n_step(8)
        drawn = samples.indices.cpu().numpy()
        assert np.isin(drawn, indices).all()
        some = np.unique(drawn)
        new = random.uniform(0.2, 3, len(some)).astype(np.float32)
        copy.update_priorities(th.from_numpy(some).to(device), th.from_numpy(new).to(device))
        twin.update_priorities(some, new)
        if random.random() < 0.3:
            # Queries of the buffer are answered by the copy
            np.testing.assert_allclose(buffer.sampling_probabilities()[1], twin.sampling_probabilities()[1], rtol=1e-12)
            assert buffer.max_priority == twin.max_priority
        if random.random() < 0.3:
            # and updates of the buffer reach the copy
            for each in (buffer, twin):
                each.update_priorities(some, new + 1)
    assert buffer.full and copy is not None
    buffer.detach_copy()
    np.testing.assert_allclose(buffer.sampling_probabilities()[1], twin.sampling_probabilities()[1], rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_priorities_that_are_not_numbers(device):
    """After training has diverged, draws are still slots with a transition, until the error is raised."""
    buffer = SubtrajectoryReplayBuffer(60, VECTOR, BOX, device="cpu")
    episodes = Episodes(VECTOR, 1, True, seed=0)
    for _ in range(20):
        buffer.add(*episodes.step())
    copy = DeviceCopy(buffer, th.device(device))
    indices, _ = buffer.sampling_probabilities()
    drawn = copy.sample_n_step(8).indices
    copy.update_priorities(drawn, th.full((8,), th.nan, device=device))
    assert np.isin(host(copy.sample_n_step(200).indices), indices).all()
    assert np.isfinite(buffer.max_priority)


def test_new_copy_where_the_buffer_begins_anew():
    buffer = SubtrajectoryReplayBuffer(60, VECTOR, BOX, device="cpu")
    episodes = Episodes(VECTOR, 1, True, seed=0)
    for _ in range(20):
        buffer.add(*episodes.step())
    copy = DeviceCopy(buffer, CPU)
    assert copy.is_current(buffer)
    buffer.reset()
    for _ in range(20):
        buffer.add(*episodes.step())
    assert not copy.is_current(buffer)
    other = DeviceCopy(buffer, CPU)
    indices, _ = buffer.sampling_probabilities()
    other.flush()
    assert equal(buffer.read(other.slots, th.from_numpy(indices), buffer.horizon), buffer.get_subtrajectories(indices))


class TestGraph:
    @pytest.fixture(params=["recorded", pytest.param("cuda", marks=needs_gpu)])
    def device(self, request, monkeypatch):
        if request.param == "recorded":
            monkeypatch.setattr(Graph, "can_capture", staticmethod(lambda device: True))
            monkeypatch.setattr(Graph, "capture", staticmethod(recorded_graph.capture))
        return th.device("cpu" if request.param == "recorded" else "cuda")

    def test_every_call_counts_once(self, device):
        total, step = (th.zeros((), device=device) for _ in range(2))
        calls = []

        def function():
            calls.append(1)
            total.add_(step)
            return total * 2

        graph = Graph(function, device)
        for k in range(10):
            step.fill_(k)
            assert float(graph()) == 2 * sum(range(k + 1))
        # Those before the graph is captured, and the one that is
        assert len(calls) == Graph.WARM_UP + 1 and graph.captured

    def test_numbers_are_constants(self, device):
        """The danger itself: if this fails the tests below prove nothing."""
        number = [1.0]
        total = th.zeros((), device=device)
        graph = Graph(lambda: total.add_(number[0]), device)
        for _ in range(Graph.WARM_UP + 1):
            graph()
        number[0] = 100.0
        graph()
        assert float(total) == Graph.WARM_UP + 2

    def test_watch(self, device):
        place = [th.zeros((), device=device)]
        graph = Graph(lambda: place[0].add_(1), device, lambda: place[0].data_ptr())
        for _ in range(6):
            graph()
            assert graph.check()
        place[0] = th.zeros((), device=device)
        assert not graph.check() and not graph.captured
        for _ in range(6):
            graph()
        assert float(place[0]) == 6

    def test_cannot_be_captured(self, device):
        total = th.zeros((), device=device)
        graph = Graph(lambda: total.add_(float(total) + 1), device)
        with pytest.raises(CaptureError, match="captur"):
            for _ in range(10):
                graph()
        assert float(total) == 2**Graph.WARM_UP - 1


@needs_gpu
def test_capture_that_fails_leaves_the_device_as_it_was():
    total = th.zeros((), device="cuda")
    with pytest.raises(RuntimeError):
        Graph.capture(lambda: total.add_(1).item())
    assert th.rand(3, device="cuda").isfinite().all()
    th.cuda.empty_cache()
    replay, _ = Graph.capture(lambda: total.add_(1))
    replay()
    assert float(total) == 1
    th.cuda.empty_cache()


def test_waits_are_noted(monkeypatch):
    """What torch says of operations that wait for the device, while all other warnings remain."""
    modes = [0]
    monkeypatch.setattr(th.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(th.cuda, "set_sync_debug_mode", modes.append)

    def function(*messages):
        assert modes[-1] == "warn"
        for message in messages:
            warnings.warn(message, UserWarning, stacklevel=1)
        return 7

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detect_host_sync(function) == (7, None)
        outputs, waits = detect_host_sync(lambda: function("called a synchronizing CUDA operation (Triggered internally)"))
        assert outputs == 7 and waits.startswith("called a synchronizing")
    with pytest.warns(UserWarning, match="something else"):
        assert detect_host_sync(lambda: function("something else")) == (7, None)
    assert modes[-1] == 0


class LateEnd(SpaceEnv):
    """Rewards grow; the first episode to terminate is not the first one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        self.steps += 1
        terminated = self.steps > 60 and self.steps % 7 == 0
        return obs, reward * (1 + self.steps / 20), terminated, truncated, info


class ReadingExtractor(FlattenExtractor):
    """Works, but waits for the device."""

    def forward(self, observations):
        return super().forward(observations) * (1.0 if float(observations.sum()) > -1e9 else 0.0)


class TestTraining:
    """Captured training steps against uncaptured ones."""

    @pytest.fixture(params=["recorded", pytest.param("cuda", marks=needs_gpu)])
    def device(self, request, monkeypatch):
        self.captures = []
        capture = recorded_graph.capture if request.param == "recorded" else Graph.capture
        if request.param == "recorded":
            monkeypatch.setattr(Graph, "can_capture", staticmethod(lambda device: True))
            # As on a GPU, where torch does not look whether the numbers are in range
            monkeypatch.setattr(
                F, "one_hot", lambda numbers, num_classes: (numbers[..., None] == th.arange(num_classes)).long()
            )
        if request.param == "recorded" or request.function.__name__ != "test_many_updates":
            # Compiled code cannot be recorded, and takes long to make
            monkeypatch.setattr("sb3_mrq.accelerate.updates.CompiledFunction", lambda function, *_: function)

        def counted(function):
            if function.__name__ != "_write_staged":
                self.captures.append(function.__name__)
            return capture(function)

        monkeypatch.setattr(Graph, "capture", staticmethod(counted))
        return "cpu" if request.param == "recorded" else "cuda"

    def make(self, device, space=VECTOR, action_space=BOX, env=None, algorithm=MRQ, **kwargs):
        env = LateEnd(space, action_space, length=9) if env is None else env
        policy_kwargs = {**TINY_POLICY, **kwargs.pop("policy_kwargs", {})}
        arguments = {**TINY, "device": device, "compile_updates": True, **kwargs}
        return algorithm(policy_for(space), env, policy_kwargs=policy_kwargs, **arguments)

    def uncaptured(self, *args, **kwargs):
        """The same training steps on the device, none of them captured."""
        model = self.make(*args, **kwargs)
        updates = model.updates
        prepare = updates.prepare

        def prepare_without(*args):
            prepare(*args)
            for graph in (updates._encoder, updates._value, updates._act, updates._copy.write):
                graph.WARM_UP = 10**9

        updates.prepare = prepare_without
        return model

    def assert_same(self, model, other):
        networks = model.policy.networks
        for name in (*networks, *(f"{name}_target" for name in networks)):
            for ours, theirs in zip(getattr(model, name).parameters(), getattr(other, name).parameters(), strict=True):
                np.testing.assert_allclose(host(ours.detach()), host(theirs.detach()), rtol=1e-4, atol=1e-4)
        assert model.reward_scale == pytest.approx(other.reward_scale)
        np.testing.assert_allclose(
            model.replay_buffer.sampling_probabilities()[1], other.replay_buffer.sampling_probabilities()[1], rtol=2e-3
        )
        assert model.replay_buffer.max_priority == pytest.approx(other.replay_buffer.max_priority, rel=1e-4)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_many_updates(self, device, precision):
        """
        With target replacements, falling learning rates, a termination term that comes in late, growing reward scales and
        priorities: all that a graph would take for constants.
        """
        settings = dict(
            precision=precision,
            target_update_interval=50,
            learning_rate=lambda left: 1e-3 * left,
            encoder_learning_rate=lambda left: 5e-4 * left,
        )
        models = [make(device, **settings) for make in (self.make, self.uncaptured)]
        start = [p.detach().clone() for p in models[0].policy.parameters()]
        for model in models:
            th.manual_seed(1)
            model.learn(260)
            assert model._n_updates == 250 and model.replay_buffer.has_terminated
            assert model.max_grad_norm == 20
        assert sorted(self.captures) == ["_act_step", "_encoder_step", "_value_step"]
        self.assert_same(*models)
        assert any((p - s).abs().max() > 1e-2 for p, s in zip(models[0].policy.parameters(), start, strict=True))
        assert models[0].replay_buffer.max_priority > 1
        assert float(models[0].actor.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 * (1 - 260 / 260), abs=1e-5)

    @pytest.mark.parametrize("algorithm, greedy", [(MRQ, False), (DRQ, False), (MRQ, True)])
    def test_host_and_device_agree(self, device, algorithm, greedy, monkeypatch):
        """The same draws given, training from the host's buffer gives the same weights."""
        # A GPU may keep any of the new priorities of a transition that was drawn twice: there, they are all the same
        settings = dict(algorithm=algorithm) | (dict(min_td_error=100.0) if device == "cuda" else {})
        if greedy:
            settings |= dict(action_space=spaces.MultiDiscrete([3, 2]), discrete_policy="greedy")
        models = [self.make(device, **settings), self.make(device, compile_updates=False, **settings)]
        buffer, copies = models[1].replay_buffer, []

        def draw(batch_size):
            if not copies or not copies[0].is_current(buffer):
                copies[:] = [DeviceCopy(buffer, th.device(device))]
            copies[0].flush()
            return copies[0].priorities.sample(batch_size).cpu()

        monkeypatch.setattr(buffer, "_draw", draw)
        for model in models:
            th.manual_seed(1)
            np.random.seed(1)
            model.learn(60)
            model._log_encoder()
        self.assert_same(*models)

    @pytest.mark.parametrize(
        "space, actions",
        [
            (IMAGE, spaces.Discrete(3, start=2)),
            (spaces.Dict({"image": IMAGE, "vector": VECTOR}), BOX),
            (VECTOR, spaces.MultiBinary(2)),
            (spaces.MultiDiscrete([3, 2], start=[5, -1]), spaces.MultiDiscrete([2, 3])),
        ],
        ids=["image", "dict", "vector", "numbers"],
    )
    def test_spaces(self, device, space, actions):
        models = [make(device, space, actions, batch_size=4) for make in (self.make, self.uncaptured)]
        for model in models:
            th.manual_seed(1)
            model.learn(30)
            assert model._n_updates == 20
        assert len(self.captures) == 3
        self.assert_same(*models)

    def test_several_environments(self, device):
        def vec_env():
            return DummyVecEnv([lambda: LateEnd(VECTOR, BOX, length=9) for _ in range(3)])

        models = [make(device, env=vec_env()) for make in (self.make, self.uncaptured)]
        for model in models:
            th.manual_seed(1)
            model.learn(90)
        assert len(self.captures) == 3
        self.assert_same(*models)

    @pytest.mark.parametrize(
        "change",
        ["set_parameters", "optimizer", "learning_rate", "exploration_noise", "gamma", "random_shift_pad", "buffer"],
    )
    def test_changes_from_outside(self, device, change, tmp_path):
        """A graph uses newly set values, not the captured ones."""
        space = IMAGE if change == "random_shift_pad" else VECTOR
        models = [make(device, space) for make in (self.make, self.uncaptured)]
        other = self.make(device, space, seed=5, compile_updates=False)
        other.learn(40)
        parameters = other.get_parameters()
        other.save_replay_buffer(tmp_path / "buffer")
        for model in models:
            th.manual_seed(1)
            model.learn(60)
            if change == "set_parameters":
                model.set_parameters(deepcopy(parameters))
            elif change == "optimizer":
                model.critic.optimizer.load_state_dict(deepcopy(parameters["critic.optimizer"]))
                model.critic.optimizer.param_groups[0]["weight_decay"] = 0.5
            elif change == "learning_rate":
                model.lr_schedule = lambda _: 1e-2
            elif change == "exploration_noise":
                model.exploration_noise = 0.0
            elif change == "gamma":
                model.gamma = 0.5
            elif change == "random_shift_pad":
                model.random_shift_pad = 0
            else:
                model.load_replay_buffer(tmp_path / "buffer")
            th.manual_seed(2)
            np.random.seed(2)
            model.action_space.seed(2)
            model.learn(40, reset_num_timesteps=False)
        again = {"learning_rate": 0, "exploration_noise": 0, "optimizer": 1}
        self.assert_same(*models)
        assert len(self.captures) == 3 + again.get(change, 2), self.captures

    def test_losses_are_logged(self, device):
        logs = []
        for make in (self.make, self.uncaptured):
            model = make(device)
            model.learn(60)
            model._log_value_and_policy()
            logs.append({key: value for key, value in model.logger.name_to_value.items() if key.startswith("train/")})
        assert {"train/encoder_loss", "train/critic_loss", "train/actor_grad_norm", "train/learning_rate"} <= logs[0].keys()
        assert logs[0].keys() == logs[1].keys()
        for key, value in logs[0].items():
            assert value == pytest.approx(logs[1][key], rel=1e-3), key

    def test_save_and_load(self, device, tmp_path):
        model = self.make(device)
        model.learn(60)
        model.save(tmp_path / "model")
        for name in NETWORKS:
            optimizer = model.get_parameters()[f"{name}.optimizer"]
            assert all(isinstance(group["lr"], float) and not group["capturable"] for group in optimizer["param_groups"])
        eager = MRQ.load(tmp_path / "model", env=LateEnd(length=9), device=device, compile_updates=False)
        for name, value in model.policy.state_dict().items():
            assert th.equal(eager.policy.state_dict()[name], value)
        eager.learn(30)
        assert not eager.updates.may_capture
        eager.save(tmp_path / "eager")
        again = MRQ.load(tmp_path / "eager", env=LateEnd(length=9), device=device, compile_updates=True)
        self.captures.clear()
        again.learn(60)
        assert len(self.captures) == 3

    def test_buffer_saved_while_training(self, device, tmp_path):
        model = self.make(device)
        model.learn(60)
        model.save_replay_buffer(tmp_path / "buffer")
        probabilities = model.replay_buffer.sampling_probabilities()
        assert len(set(probabilities[1])) > 3
        other = self.make(device, compile_updates=False)
        other.load_replay_buffer(tmp_path / "buffer")
        for ours, theirs in zip(probabilities, other.replay_buffer.sampling_probabilities(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert other.replay_buffer.max_priority == model.replay_buffer.max_priority

    def fails_once(self, model, message, steps=60):
        """Trains all the same, after one warning."""
        with pytest.warns(UserWarning, match=message) as record:
            model.learn(steps)
        assert len([w for w in record if "captured" in str(w.message)]) == 1
        assert not model.updates.on_device and model.replay_buffer._copy is None
        assert model._n_updates == steps - 10
        assert all(isinstance(getattr(model, name).optimizer.param_groups[0]["lr"], float) for name in NETWORKS)
        assert all(th.isfinite(p).all() for p in model.policy.parameters())
        assert len(set(model.replay_buffer.sampling_probabilities()[1])) > 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.learn(20, reset_num_timesteps=False)

    @pytest.mark.parametrize("failing", ["_encoder_step", "_value_step", "_act_step"])
    def test_capture_fails(self, device, failing, monkeypatch):
        capture = Graph.capture

        def fail(function):
            if function.__name__ == failing:
                raise RuntimeError("CUDA error: no graphs today")
            return capture(function)

        monkeypatch.setattr(Graph, "capture", staticmethod(fail))
        self.fails_once(self.make(device), "no graphs today")

    def test_capture_of_copies_fails(self, device, monkeypatch):
        """New transitions arrive all the same."""
        models = [make(device) for make in (self.make, self.uncaptured)]
        capture = Graph.capture

        def fail(function):
            if function.__name__ == "_write_staged":
                raise RuntimeError("CUDA error: no graphs today")
            return capture(function)

        monkeypatch.setattr(Graph, "capture", staticmethod(fail))
        for model in models:
            th.manual_seed(1)
            model.learn(60)
        self.assert_same(*models)

    @pytest.mark.parametrize("compile_updates", [True, "auto"])
    def test_features_extractor_that_waits(self, device, compile_updates):
        policy_kwargs = dict(features_extractor_class=ReadingExtractor)
        model = self.make(device, policy_kwargs=policy_kwargs, compile_updates=compile_updates)
        self.fails_once(model, "could not be captured")

    def test_automatic_choice(self, device, capsys):
        """Captured without compiling. No warning if capturing is impossible from the outset."""
        model = self.make(device, compile_updates="auto")
        env = VecNormalize(DummyVecEnv([lambda: LateEnd(VECTOR, BOX, length=9)]))
        normalised = self.make(device, env=env, compile_updates="auto", verbose=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.learn(60)
            assert sorted(self.captures) == ["_act_step", "_encoder_step", "_value_step"]
            assert model.updates.captured and not model.updates.compiled
            normalised.learn(60)
        assert len(self.captures) == 3 and not normalised.updates.on_device and normalised._n_updates == 50
        assert "not captured as CUDA graphs: VecNormalize is not supported on a device." in capsys.readouterr().out

    def test_other_optimizer(self, device):
        self.fails_once(self.make(device, policy_kwargs=dict(optimizer_class=th.optim.SGD)), "SGD is not supported")

    def test_vec_normalize(self, device):
        env = VecNormalize(DummyVecEnv([lambda: LateEnd(VECTOR, BOX, length=9)]))
        self.fails_once(self.make(device, env=env), "VecNormalize is not supported on a device")

    def test_buffer_that_does_not_fit(self, device, monkeypatch):
        monkeypatch.setattr(Updates, "free_memory", lambda self: 1000)
        self.fails_once(self.make(device), "The replay buffer takes .* GB")

    def test_large_integers(self, device):
        """Torch stores these types, but can do little with them."""
        space = spaces.Box(0, 60000, (3,), np.uint16)
        self.fails_once(self.make(device, space), "dtype uint16 of observations None")

    def test_in_a_thread(self, device):
        model = self.make(device)
        with pytest.warns(UserWarning, match="only in the main thread"):
            thread = threading.Thread(target=model.learn, args=(30,))
            thread.start()
            thread.join()
        assert model._n_updates == 20 and not model.updates.on_device

    def test_deterministic_algorithms(self, device, monkeypatch):
        # Some versions of torch ask for it
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        th.use_deterministic_algorithms(True)
        try:
            self.fails_once(self.make(device), "use_deterministic_algorithms")
        finally:
            th.use_deterministic_algorithms(False)

    def test_two_in_turn(self, device):
        """Captured anew for a model whose optimisers were captured before, as with another batch size, and for a copy."""
        models = [make(device) for make in (self.make, self.uncaptured)]
        for model in models:
            th.manual_seed(1)
            model.learn(60)
            model.batch_size = 6
            model.learn(20, reset_num_timesteps=False)
        self.assert_same(*models)
        copy = deepcopy(models[0])
        assert not copy.updates.on_device and models[0].updates.on_device
        copy.learn(20, reset_num_timesteps=False)
        assert copy.updates.on_device

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_divergence_is_told(self, device, n_envs):
        model = self.make(device, env=DummyVecEnv([lambda: LateEnd(VECTOR, BOX, length=9) for _ in range(n_envs)]))
        model.learn(30)
        with th.no_grad():
            next(model.critic.parameters()).fill_(th.nan)
        with pytest.raises(ValueError, match="diverged"):
            model.learn(100, reset_num_timesteps=False)


def test_memory_of_models_before(monkeypatch):
    """Is free, although what captured graphs belong to refers to itself, and torch keeps memory for later."""

    class Model:
        def __init__(self):
            self.itself = self

    gone, kept = weakref.ref(Model()), [True]
    assert gone() is not None
    monkeypatch.setattr(th.cuda, "empty_cache", lambda: kept.__setitem__(0, gone() is not None))
    monkeypatch.setattr(th.cuda, "mem_get_info", lambda of: (100 if kept[0] else 1000, 1000))
    assert Updates.free_memory(SimpleNamespace(device=th.device("cuda"))) == 1000


def test_not_on_a_cpu():
    """Capturing changes nothing on a CPU."""
    model = MRQ("MlpPolicy", gym.make("Pendulum-v1"), device="cpu", compile_updates=True, policy_kwargs=TINY_POLICY)
    assert not model.updates.may_capture and model.updates.compiled
