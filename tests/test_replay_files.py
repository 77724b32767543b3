"""
A replay buffer comes out of its file as it went in, and nothing else does.
"""

import io
import json
import os
import pickle
import struct
import sys
import zlib
from copy import deepcopy

import numpy as np
import pytest
from envs import BOX, IMAGE, VECTOR, SpaceEnv, policy_for, tiny_model
from gymnasium import spaces
from helpers import file_size_limit
from stable_baselines3.common.env_util import make_vec_env

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.persist import replay_files
from sb3_mrq.persist.replay_files import (
    MAGIC,
    PREAMBLE,
    ReplayFileError,
    load_replay_buffer,
    read_replay_buffer,
    save_replay_buffer,
    write_replay_buffer,
)
from sb3_mrq.persist.spaces import describe_space, show_space

FRAMES = spaces.Box(0, 255, (4, 36, 36), dtype=np.uint8)


class Stack:
    """Stacks of four frames, each observation one frame further, every episode of another number."""

    def __init__(self, rng, n_envs):
        self.rng, self.n_envs = rng, n_envs

    def first(self):
        frame = self.rng.integers(1, 255, (self.n_envs, 1, 36, 36), dtype=np.uint8)
        return np.repeat(frame, 4, axis=1)

    def next(self, obs):
        return np.concatenate([obs[:, 1:], self.rng.integers(1, 255, (self.n_envs, 1, 36, 36), dtype=np.uint8)], axis=1)


def fill(buffer, n_steps, seed=0, p_done=0.1):
    """Random transitions with random ends of episodes, and random priorities."""
    rng = np.random.default_rng(seed)
    n_envs, space = buffer.n_envs, buffer.observation_space
    space.seed(seed)
    buffer.action_space.seed(seed)
    stack = Stack(rng, n_envs) if space == FRAMES else None

    def sample():
        samples = [space.sample() for _ in range(n_envs)]
        return (
            {key: np.stack([s[key] for s in samples]) for key in space}
            if isinstance(space, spaces.Dict)
            else np.stack(samples)
        )

    obs = stack.first() if stack else sample()
    for _ in range(n_steps):
        next_obs = stack.next(obs) if stack else sample()
        done = rng.random(n_envs) < p_done
        if stack:
            done[:] = done[0]
        action = np.stack([buffer.action_space.sample() for _ in range(n_envs)]).reshape(n_envs, -1)
        infos = [{"TimeLimit.truncated": bool(rng.random() < 0.5)} for _ in range(n_envs)]
        buffer.add(obs, next_obs, action, rng.normal(size=n_envs), done, infos)
        obs = next_obs
        if done.any():
            obs = stack.first() if stack else sample()
        if buffer.n_sampleable:
            indices = buffer.sampling_probabilities()[0]
            chosen = rng.choice(indices, size=min(5, len(indices)))
            buffer.update_priorities(chosen, rng.uniform(0.5, 20, size=len(chosen)))
    return buffer


def make(space=VECTOR, action_space=BOX, size=60, n_envs=1, **kwargs):
    return SubtrajectoryReplayBuffer(size, space, action_space, device="cpu", n_envs=n_envs, **kwargs)


def to_bytes(buffer):
    file = io.BytesIO()
    write_replay_buffer(file, buffer)
    return file.getvalue()


def from_bytes(data, like):
    return read_replay_buffer(io.BytesIO(data), like, exact=True)


def assert_same(one, other):
    """All attributes of two objects are equal to the last bit, spaces and devices included."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, spaces.Space) or not hasattr(one, "__dict__"):
        assert one == other
    else:
        assert_same(vars(one), vars(other))


def assert_same_samples(one, other, n=4):
    for method in ("sample", "sample_n_step"):
        for _ in range(n):
            np.random.seed(3)
            mine = getattr(one, method)(16)
            np.random.seed(3)
            theirs = getattr(other, method)(16)
            for a, b in zip(mine, theirs, strict=True):
                for key in a if isinstance(a, dict) else [...]:
                    np.testing.assert_array_equal(a[key], b[key])


SPACES = {
    "vector": VECTOR,
    "frames": FRAMES,
    "image": spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8),
    "Dict": spaces.Dict(image=FRAMES, vector=VECTOR, choice=spaces.Discrete(4)),
    "Discrete": spaces.Discrete(5),
}
ACTIONS = {
    "Box": BOX,
    "Discrete": spaces.Discrete(3, start=-1),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(4),
}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("steps", [0, 3, 17, 200], ids=["empty", "short", "half", "wrapped"])
@pytest.mark.parametrize("space", SPACES)
def test_equal_after_loading(space, steps, n_envs, tmp_path):
    buffer = fill(make(SPACES[space], size=60 * n_envs, n_envs=n_envs), steps)
    save_replay_buffer(tmp_path / "buffer", buffer)
    assert [path.name for path in tmp_path.iterdir()] == ["buffer.pkl"]
    loaded = load_replay_buffer(tmp_path / "buffer", make(SPACES[space], size=7 * n_envs, n_envs=n_envs))
    assert_same(loaded, buffer)
    if steps:
        assert loaded.size() == buffer.size() > 0
    if buffer.n_sampleable:
        assert buffer.max_priority > 1
        assert_same_samples(loaded, buffer)
        # And it goes on as the other does
        assert_same(fill(loaded, 30, seed=5), fill(buffer, 30, seed=5))


@pytest.mark.parametrize("action_space", ACTIONS)
def test_action_spaces(action_space):
    buffer = fill(make(action_space=ACTIONS[action_space]), 80)
    assert_same(from_bytes(to_bytes(buffer), make(action_space=ACTIONS[action_space])), buffer)


@pytest.mark.parametrize(
    "space",
    [
        *SPACES.values(),
        *ACTIONS.values(),
        spaces.Box(np.array([-np.inf, 0.1, 3]), np.array([np.inf, 0.2, 4]), dtype=np.float64),
        spaces.MultiBinary([2, 3]),
        spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, 1]]),
    ],
    ids=str,
)
def test_spaces_as_text(space):
    text = json.dumps(describe_space(space))
    assert json.loads(text) == describe_space(deepcopy(space))
    assert space.__class__.__name__ in show_space(json.loads(text))
    assert len(text) < 500


def test_conversion_of_frames_survives():
    """Where a stack turned out not to be one, it stays stored whole."""
    with pytest.warns(UserWarning, match="stored whole"):
        buffer = fill(make(FRAMES, size=100), 20)
        for key in range(3):
            obs = np.full((1, *FRAMES.shape), key, dtype=np.uint8)
            obs[:, 2] += 7
            buffer.add(obs, obs[:, ::-1].copy(), np.zeros((1, 2)), np.zeros(1), np.zeros(1, bool), [{}])
    assert_same(from_bytes(to_bytes(buffer), make(FRAMES)), buffer)


def test_only_what_was_written_is_stored(tmp_path):
    sizes = []
    for steps in (100, 200):
        save_replay_buffer(tmp_path / "buffer.pkl", fill(make(FRAMES, size=100_000, n_envs=2), steps))
        sizes.append((tmp_path / "buffer.pkl").stat().st_size)
    assert sizes[0] < 250 * 36 * 36 * 1.1
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.1)


def test_more_than_one_chunk(monkeypatch):
    buffer = fill(make(size=400, n_envs=2), 150)
    expected = to_bytes(buffer)
    monkeypatch.setattr(replay_files, "CHUNK", 100)
    monkeypatch.setattr(SubtrajectoryReplayBuffer, "CHUNK", 96)
    data = to_bytes(buffer)
    assert len(data) > len(expected)
    assert_same(from_bytes(data, make(n_envs=2)), buffer)


@pytest.mark.parametrize("name", ["b", "b.pkl", "b.replay", "b.v2"])
def test_names(name, tmp_path):
    buffer = fill(make(), 20)
    save_replay_buffer(str(tmp_path / name), buffer)
    (file,) = tmp_path.iterdir()
    assert file.name == (name if "." in name else f"{name}.pkl")
    other = file.rename(tmp_path / "anything")
    assert_same(load_replay_buffer(other, make()), buffer)


def test_folders(tmp_path):
    buffer = fill(make(), 20)
    with pytest.warns(UserWarning, match="Will create it"):
        save_replay_buffer(tmp_path / "new" / "b.pkl", buffer)
    (tmp_path / "new.pkl").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        save_replay_buffer(tmp_path / "new.pkl", buffer)
    assert_same(load_replay_buffer(tmp_path / "new" / "b.pkl", make()), buffer)
    assert_same(load_replay_buffer(tmp_path / "new.pkl_2", make()), buffer)


@pytest.fixture(scope="module")
def saved():
    buffer = fill(make(SPACES["Dict"], size=120, n_envs=2), 40)
    return buffer, to_bytes(buffer)


def refused(data, match="", like=None):
    """Whether the data is refused, with a message that says why."""
    like = make(SPACES["Dict"], size=120, n_envs=2) if like is None else like
    with pytest.raises(ReplayFileError, match=match):
        from_bytes(data, like)


def test_truncated(saved):
    data = saved[1]
    rng = np.random.default_rng(0)
    for n in (0, 1, len(MAGIC), 15, 30, len(data) - 1, *rng.integers(0, len(data), 60)):
        refused(data[:n], "truncated")


def test_truncated_without_a_size(saved):
    """From a stream that cannot tell how much of it is left."""

    class Stream(io.BytesIO):
        def seekable(self):
            return False

    data = saved[1]
    for n in np.random.default_rng(1).integers(40, len(data), 30):
        with pytest.raises(ReplayFileError, match="truncated"):
            read_replay_buffer(Stream(data[:n]), make(SPACES["Dict"], size=120, n_envs=2))


def test_flipped_bits(saved):
    data = saved[1]
    rng = np.random.default_rng(0)
    for position in (*range(24), *rng.integers(24, len(data), 300)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.integers(8)
        refused(bytes(damaged), "damaged|version|truncated|does not begin")
    from_bytes(data, make(SPACES["Dict"], size=120, n_envs=2))


def test_too_long(saved):
    refused(saved[1] + b"x", "1 additional bytes")


def test_something_follows_in_a_file_object(saved):
    file = io.BytesIO(b"before" + saved[1] + b"after")
    file.seek(6)
    assert_same(read_replay_buffer(file, make(SPACES["Dict"], n_envs=2)), saved[0])
    assert file.read() == b"after"


def test_version(saved):
    data = bytearray(saved[1])
    data[len(MAGIC) : len(MAGIC) + 4] = struct.pack("<I", 2)
    refused(bytes(data), "version 2")


def edited(data, edit):
    """A file whose header was changed by someone who knows how."""
    start = len(MAGIC) + PREAMBLE.size
    version, length, _ = PREAMBLE.unpack(data[len(MAGIC) : start])
    header = json.loads(data[start : start + length])
    edit(header)
    text = json.dumps(header).encode()
    return MAGIC + PREAMBLE.pack(version, len(text), zlib.crc32(text)) + text + data[start + length :]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda h: h["arrays"][-1][2].append(2), "type and shape"),
        (lambda h: h["arrays"][-1].__setitem__(1, "<f4"), "type and shape"),
        (lambda h: h["arrays"].pop(), "arrays instead of"),
        (lambda h: h.__setitem__("buffer_size", 30), "type and shape"),
        (lambda h: h.__setitem__("buffer_size", 2), "are inconsistent"),
        (lambda h: h.__setitem__("buffer_size", "a"), "inconsistent|invalid"),
        (lambda h: h["written"].__setitem__(0, 1000), "slots"),
        (lambda h: h.__setitem__("written", [40]), "slots"),
        (lambda h: h.pop("n_steps"), "header of the file is invalid"),
        (lambda h: h["numbers"]["storages"][1][1].__setitem__("frame_channels", 3), "cannot be stacks"),
        (lambda h: h["written"].__setitem__(0, h["written"][0] - 1), "damaged|additional bytes"),
    ],
)
def test_header_that_does_not_fit(saved, edit, match):
    refused(edited(saved[1], edit), match)


def test_numbers_that_do_not_fit(monkeypatch):
    """Checksums are right, contents are not."""
    for name, value in (("n_stored", 3), ("n_sampleable", 1), ("max_priority", float("inf")), ("max_priority", "high")):
        buffer = fill(make(), 20)
        state = buffer.get_state()
        monkeypatch.setattr(
            buffer, "get_state", lambda state=state, n=name, v=value: state._replace(numbers=state.numbers | {n: v})
        )
        refused(to_bytes(buffer), "are inconsistent", like=make())


@pytest.mark.parametrize(
    ("difference", "change"),
    [
        ("number of environments", {"n_envs": 2}),
        ("observation space", {"space": spaces.Box(-1, 1, (4,))}),
        ("observation space", {"space": spaces.Box(-1, 2, (3,))}),
        ("observation space", {"space": spaces.Dict(a=VECTOR)}),
        ("action space", {"action_space": spaces.Discrete(2)}),
        ("action space", {"action_space": spaces.Box(-1, np.array([1, 2], dtype=np.float32))}),
        ("horizon", {"horizon": 6}),
        ("n_steps", {"n_steps": 4}),
    ],
)
def test_buffer_for_something_else(difference, change):
    data = to_bytes(fill(make(), 20))
    with pytest.raises(ValueError, match=f"another {difference}") as error:
        from_bytes(data, make(**change))
    # Not damaged, so no reason to look for an older one
    assert not isinstance(error.value, ReplayFileError)


class Malicious:
    def __reduce__(self):
        return (os.system, ("exit 3",))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickle(protocol, tmp_path, monkeypatch):
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Malicious(), protocol=protocol))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code was run"))
    model = tiny_model(SpaceEnv())
    with pytest.raises(
        ReplayFileError, match=r"b\.pkl cannot be loaded as a replay buffer\. The file is a pickle.*runs the code"
    ):
        model.load_replay_buffer(tmp_path / "b.pkl")


def test_other_files(tmp_path):
    model = tiny_model(SpaceEnv())
    present = model.replay_buffer
    model.save(tmp_path / "model")
    (tmp_path / "text").write_text("no buffer at all")
    for name, match in (("model.zip", "zip file"), ("text", "does not begin")):
        with pytest.raises(ReplayFileError, match=match):
            model.load_replay_buffer(tmp_path / name)
    assert model.replay_buffer is present


def test_no_unpickling(saved, monkeypatch):
    """Reading a file uses nothing that could run code from it."""
    for module, name in ((pickle, "load"), (pickle, "loads"), (np, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    from_bytes(saved[1], make(SPACES["Dict"], n_envs=2))


def test_model_goes_on_with_a_buffer_of_another_size(tmp_path):
    """As before: the buffer that is loaded has the size it had."""
    model = tiny_model(make_vec_env(SpaceEnv, 2), buffer_size=300)
    model.learn(40)
    model.save_replay_buffer(tmp_path / "b")
    other = tiny_model(make_vec_env(SpaceEnv, 2), buffer_size=80)
    other.load_replay_buffer(tmp_path / "b")
    assert other.replay_buffer.buffer_size == 150
    other.learn(20, reset_num_timesteps=False)
    assert other.replay_buffer.size() == 60


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_failed_save_leaves_the_file_that_was_there(tmp_path):
    model = tiny_model(SpaceEnv(IMAGE), policy_for(IMAGE))
    model.learn(20)
    model.save_replay_buffer(tmp_path / "b.pkl")
    before = (tmp_path / "b.pkl").read_bytes()
    model.learn(20, reset_num_timesteps=False)
    with file_size_limit(30_000), pytest.raises(OSError, match="File too large"):
        model.save_replay_buffer(tmp_path / "b.pkl")
    assert (tmp_path / "b.pkl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b.pkl"]
    model.save_replay_buffer(tmp_path / "b.pkl")
    assert (tmp_path / "b.pkl").read_bytes() != before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_little_memory():
    """Neither file nor buffer is ever in memory twice, and loading does not touch unused slots."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    space = spaces.Box(-1, 1, (1000,), dtype=np.float32)
    buffer = make(space, size=1_000_000)
    obs = np.ones((1, 1000), dtype=np.float32)
    for _ in range(8_000):
        buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1, dtype=bool), [{}])
    with open("/dev/shm/sb3-mrq-test", "w+b") if os.path.isdir("/dev/shm") else io.BytesIO() as file:
        try:
            before = resident()
            write_replay_buffer(file, buffer)
            assert resident() - before < 10e6
            file.seek(0)
            loaded = read_replay_buffer(file, make(space), exact=True)
            # 8,001 of a million observations
            # with what other tests have left in memory
            assert 30e6 < resident() - before < 100e6
            assert loaded.size() == 8000
        finally:
            if os.path.exists("/dev/shm/sb3-mrq-test"):
                os.unlink("/dev/shm/sb3-mrq-test")
