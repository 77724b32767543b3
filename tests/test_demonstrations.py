"""A part of each batch comes from demonstrations, with priorities of their own."""

import numpy as np
import pytest
import torch as th
from envs import BOX, VECTOR, SpaceEnv, SwingEnv, tiny_model
from helpers import snapshot
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_offline import good_and_bad

from sb3_mrq import DRQ, MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.demonstrations import DemonstrationReplayBuffer
from sb3_mrq.persist.replay_files import ReplayFileError


@pytest.fixture
def demonstrations(tmp_path):
    """A file with 200 transitions, whose rewards are all 7."""
    model = tiny_model(SpaceEnv(), buffer_size=300)
    model.add_transitions(**(good_and_bad() | {"rewards": np.full(200, 7.0)}))
    model.save_replay_buffer(tmp_path / "demonstrations")
    return tmp_path / "demonstrations"


def demo_model(path, env=None, algorithm=MRQ, share=0.5, **kwargs):
    return tiny_model(
        SpaceEnv() if env is None else env,
        algorithm=algorithm,
        replay_buffer_class=DemonstrationReplayBuffer,
        replay_buffer_kwargs=dict(demonstration_buffer=path, demonstration_share=share),
        **({"seed": 0} | kwargs),
    )


@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
@pytest.mark.parametrize("n_envs, share", [(1, 0.5), (2, 0.25), (1, 0.0), (1, 1.0)])
def test_share_of_a_batch(demonstrations, algorithm, n_envs, share):
    model = demo_model(demonstrations, DummyVecEnv([SpaceEnv] * n_envs), algorithm, share).learn(40)
    for samples in (model.replay_buffer.sample(40), model.replay_buffer.sample_n_step(40)):
        assert len(samples.rewards) == len(samples.indices) == 40
        assert (samples.rewards[:, 0] == 7).sum() == share * 40
        assert (samples.indices >= model.replay_buffer.buffer_size * n_envs).sum() == share * 40
    assert model.replay_buffer.size() == 40


def test_priorities_are_their_own(demonstrations):
    model = demo_model(demonstrations).learn(40)
    buffer = model.replay_buffer
    samples = buffer.sample_n_step(40)
    before = buffer.priorities(), buffer.demonstrations.priorities()
    new = th.linspace(2, 3, 40)
    buffer.update_priorities(samples.indices, new)
    n_slots = buffer.buffer_size
    for k, (index, value) in enumerate(zip(samples.indices, new, strict=True)):
        if (samples.indices[k + 1 :] == index).any():
            continue
        where = buffer.demonstrations.priorities() if index >= n_slots else buffer.priorities()
        assert where[index % n_slots if index < n_slots else index - n_slots] == pytest.approx(value.item())
    for unchanged, now, drawn in (
        (before[0], buffer.priorities(), samples.indices[samples.indices < n_slots]),
        (before[1], buffer.demonstrations.priorities(), samples.indices[samples.indices >= n_slots] - n_slots),
    ):
        rest = np.setdiff1d(np.arange(len(now)), drawn)
        assert th.equal(unchanged[rest], now[rest])


def test_reward_scale(demonstrations):
    buffer = demo_model(demonstrations, share=0.25).learn(40).replay_buffer
    own = np.abs(buffer.rewards).sum() / buffer.size()
    assert buffer.mean_abs_reward() == pytest.approx(0.75 * own + 0.25 * 7, rel=1e-6)


def test_terminations(tmp_path):
    data = good_and_bad()
    data["terminated"], data["truncated"] = data["truncated"], data["terminated"]
    model = tiny_model(SpaceEnv())
    model.add_transitions(**data)
    model.save_replay_buffer(tmp_path / "terminated")
    assert demo_model(tmp_path / "terminated").replay_buffer.has_terminated


def test_normalised(demonstrations):
    env = VecNormalize(DummyVecEnv([SpaceEnv]))
    model = demo_model(demonstrations, env).learn(40)
    assert model.replay_buffer.sample(8, env).rewards.max() <= env.clip_reward


def test_resume_is_exact(demonstrations, tmp_path):
    def checkpoints(name):
        return ResumableCheckpointCallback(21, tmp_path / name)

    whole = demo_model(demonstrations, SwingEnv(VECTOR, BOX))
    whole.learn(42, callback=checkpoints("a"))
    demo_model(demonstrations, SwingEnv(VECTOR, BOX)).learn(21, callback=checkpoints("b"))
    resumed = MRQ.resume(tmp_path / "b", SwingEnv(VECTOR, BOX))
    resumed.learn(21, reset_num_timesteps=False)
    assert th.equal(resumed.replay_buffer.demonstrations.priorities(), whole.replay_buffer.demonstrations.priorities())
    for name, value in snapshot(whole.policy).items():
        assert th.equal(snapshot(resumed.policy)[name], value), name


@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
def test_demonstrations_do_not_fade(algorithm, tmp_path):
    """Whether they were saved by an agent with fading priorities, or an agent with such priorities learns from them."""
    teacher = tiny_model(SpaceEnv(), algorithm=DRQ, replay_fade=0.9)
    teacher.add_transitions(**good_and_bad())
    assert np.ptp(teacher.replay_buffer.sampling_probabilities()[1]) > 0
    teacher.save_replay_buffer(tmp_path / "faded")
    buffer = demo_model(tmp_path / "faded", algorithm=algorithm).replay_buffer
    assert buffer.demonstrations.sampling_probabilities()[1] == pytest.approx(1 / 200)


def test_bad_files(demonstrations, tmp_path):
    with pytest.raises(FileNotFoundError):
        demo_model(tmp_path / "missing")
    (tmp_path / "other.pkl").write_bytes(b"something else")
    with pytest.raises(ReplayFileError, match="other"):
        demo_model(tmp_path / "other")
    tiny_model(SpaceEnv()).save_replay_buffer(tmp_path / "empty")
    with pytest.raises(ValueError, match="no transitions that can be sampled"):
        demo_model(tmp_path / "empty")
    with pytest.raises(ValueError, match="action space"):
        demo_model(demonstrations, SpaceEnv(VECTOR, type(BOX)(-2, 2, (3,))))
    with pytest.raises(ValueError, match="demonstration_share"):
        demo_model(demonstrations, share=1.5)
