"""Training from a replay buffer alone, with and without behaviour cloning."""

import numpy as np
import pytest
import torch as th
from envs import BOX, VECTOR, SpaceEnv, tiny_model
from gymnasium import spaces
from helpers import make_learner, make_policy, snapshot
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from torch.nn import functional as F

from sb3_mrq import DRQ, MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.offline import cloning_scale


def good_and_bad(n_episodes=20, action_space=BOX, seed=0):
    """Episodes of 10 random observations, whose reward is the first number of the action that was taken."""
    rng = np.random.default_rng(seed)
    action_space.seed(seed)
    n = 10 * n_episodes
    obs = rng.normal(size=(n_episodes, 11, 3)).astype(np.float32)
    actions = np.stack([action_space.sample() for _ in range(n)])
    ends = np.arange(n) % 10 == 9
    return dict(
        observations=obs[:, :-1].reshape(n, 3),
        actions=actions,
        rewards=actions.reshape(n, -1)[:, 0],
        next_observations=obs[:, 1:].reshape(n, 3),
        terminated=np.zeros(n, bool),
        truncated=ends,
    )


def filled_model(algorithm=MRQ, env=None, **kwargs):
    env = SpaceEnv() if env is None else env
    model = tiny_model(env, algorithm=algorithm, **({"seed": 0} | kwargs))
    model.add_transitions(**good_and_bad(action_space=model.action_space))
    return model


class Count(BaseCallback):
    def __init__(self):
        super().__init__()
        self.progress, self.ended = [], 0

    def _on_step(self):
        self.progress.append(self.model._current_progress_remaining)
        return True

    def _on_training_end(self):
        self.ended += 1


@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
def test_trains_without_steps(algorithm):
    model = filled_model(algorithm, learning_rate=lambda progress: 1e-3 * progress)
    env_steps, count = model.env.get_attr("total_steps"), Count()
    before = snapshot(model.policy)
    model.train_offline(20, count, progress_bar=False)
    assert (model._n_updates, model.num_timesteps, model.remaining_timesteps) == (20, 20, 0)
    assert model.env.get_attr("total_steps") == env_steps
    assert len(count.progress) == 20 and count.ended == 1
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(0)
    after = snapshot(model.policy)
    assert any(not th.equal(before[name], after[name]) for name in before)


def test_is_training_of_the_same_steps():
    """As many calls of ``train`` give the same weights."""
    offline, plain = filled_model(), filled_model()
    np.random.seed(1)
    th.manual_seed(1)
    offline.train_offline(12)
    np.random.seed(1)
    th.manual_seed(1)
    plain.train(12, plain.batch_size)
    for name, value in snapshot(plain.policy).items():
        assert th.equal(snapshot(offline.policy)[name], value), name


def test_log(monkeypatch):
    monkeypatch.setattr("sb3_mrq.offline.LOG_INTERVAL", 5)
    model = filled_model()
    model.require_logger()
    lines = []
    monkeypatch.setattr(model.logger, "dump", lambda step: lines.append((step, dict(model.logger.name_to_value))))
    model.train_offline(12)
    assert [step for step, _ in lines] == [5, 10]
    assert all({"train/critic_loss", "time/fps"} <= values.keys() for _, values in lines)


def test_callbacks_and_stopping(tmp_path):
    model = filled_model()
    model.train_offline(12, EvalCallback(SpaceEnv(), eval_freq=5, n_eval_episodes=1, verbose=0, warn=False, log_path=tmp_path))
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [5, 10]

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 3

    model = filled_model()
    model.train_offline(12, Stop())
    assert model._n_updates == 2
    filled_model().train_offline(3, StopTrainingOnMaxEpisodes(10**6))


def test_resume_is_exact(tmp_path):
    whole = filled_model()
    whole.train_offline(20, ResumableCheckpointCallback(10, tmp_path / "a"))
    cut = filled_model()

    class Kill(BaseCallback):
        def _on_step(self):
            if self.n_calls == 15:
                raise RuntimeError("killed")
            return True

    with pytest.raises(RuntimeError, match="killed"):
        cut.train_offline(20, [ResumableCheckpointCallback(10, tmp_path / "b"), Kill()])
    resumed = MRQ.resume(tmp_path / "b", SpaceEnv())
    assert resumed.remaining_timesteps == 10
    resumed.train_offline(resumed.remaining_timesteps)
    for name, value in snapshot(whole.policy).items():
        assert th.equal(snapshot(resumed.policy)[name], value), name


def test_fine_tuning():
    """Learning from an environment goes on, and cloning fades over the transitions that are collected."""
    model = filled_model(bc_weight=1.0, bc_steps=40, learning_starts=0)
    model.train_offline(5)
    assert cloning_scale(model) == 1
    model.learn(10)
    assert cloning_scale(model) == pytest.approx(0.75)
    assert model.learner.cloning_scale.item() == pytest.approx(0.75, abs=0.03)
    model.learn(50, reset_num_timesteps=False)
    assert cloning_scale(model) == 0


@pytest.mark.parametrize("space", [BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 4])])
def test_cloning_loss(space):
    """TD3+BC: values over their mean size, plus the distance to the stored actions."""
    policy = make_policy(VECTOR, space)
    learner = make_learner(policy, bc_weight=0.7, pre_activation_weight=0.0)
    actions = policy.actions.encode(th.as_tensor(np.stack([space.sample() for _ in range(16)]).reshape(16, -1)))
    z_s = policy.encoder.state(th.randn(16, 3))
    loss = learner.policy_loss(z_s, None, actions)
    u = policy.actor(z_s)
    q = policy.critic(policy.encoder.state_action(z_s, policy.actions.activation(u)))
    if space is BOX:
        cloning = (th.tanh(u) - actions).square().mean()
    else:
        parts = zip(u.split(policy.actions.sizes, dim=1), actions.split(policy.actions.sizes, dim=1), strict=True)
        cloning = th.stack([F.cross_entropy(part, chosen.argmax(dim=1)) for part, chosen in parts]).mean()
    expected = -q.mean() / q.abs().mean() + 0.7 * cloning
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    learner.cloning_scale.fill_(0.5)
    assert learner.policy_loss(z_s, None, actions).item() == pytest.approx((expected - 0.35 * cloning).item(), abs=1e-6)


def test_cloning_imitates():
    """A large weight leads to the stored actions, which here are a function of the observation."""
    rng = np.random.default_rng(0)
    data = good_and_bad(40)
    data["actions"] = np.tanh(2 * data["observations"][:, :2]).astype(np.float32)
    data["rewards"] = rng.normal(size=len(data["rewards"]))
    errors = []
    for weight in (0.0, 100.0):
        model = tiny_model(SpaceEnv(), bc_weight=weight, seed=0, learning_rate=3e-3, batch_size=64)
        model.add_transitions(**data)
        model.train_offline(300)
        actions, _ = model.predict(data["observations"], deterministic=True)
        errors.append(np.abs(actions - data["actions"]).mean())
    assert errors[1] < 0.25 < errors[0]


def test_empty_buffer():
    with pytest.raises(ValueError, match="no transitions to train from"):
        tiny_model(SpaceEnv()).train_offline(10)


@pytest.mark.parametrize("n", [-1, 1.5, "many"])
def test_number_of_updates(n):
    with pytest.raises((ValueError, TypeError), match="n_updates"):
        filled_model().train_offline(n)


def test_greedy_policies_are_not_cloned():
    with pytest.raises(ValueError, match="discrete_policy='actor'"):
        tiny_model(SpaceEnv(action_space=spaces.Discrete(3)), discrete_policy="greedy", bc_weight=1.0)
