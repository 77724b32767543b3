"""
Greedy policies of discrete actions: their values and targets are those of each action by itself, they have no actor, and they
learn what an actor does not.
"""

import html
import itertools
from functools import partial

import numpy as np
import pytest
import recorded_graph
import torch as th
from envs import TINY_POLICY, VECTOR, SpaceEnv, tiny_model
from gymnasium import spaces
from helpers import make_learner, make_policy, set_scales, snapshot
from stable_baselines3.common.envs import IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mrq import DRQ, MRQ
from sb3_mrq.accelerate.graphs import Graph
from sb3_mrq.action_noise import hold_noise
from sb3_mrq.buffers import NStepSamples
from sb3_mrq.diagnostics import diagnose
from sb3_mrq.diagnostics.episodes import no_side_effects, play, wrap_env
from sb3_mrq.losses import n_step_return
from sb3_mrq.policies import MlpPolicy
from sb3_mrq.weights import load_weights, save_weights

# Spaces, and all of their actions in the form of the replay buffer
SPACES = {
    "discrete": (spaces.Discrete(4, start=-2), [[-2], [-1], [0], [1]]),
    "multi": (spaces.MultiDiscrete([2, 3], start=[5, 0]), [[5, 0], [5, 1], [5, 2], [6, 0], [6, 1], [6, 2]]),
    "binary": (spaces.MultiBinary(3), list(map(list, itertools.product([0, 1], repeat=3)))),
    "single": (spaces.Discrete(1), [[0]]),
}
DISCRETE = spaces.Discrete(3)


@pytest.fixture(params=SPACES)
def case(request):
    return SPACES[request.param]


def greedy_policy(space, **kwargs):
    th.manual_seed(0)
    policy = make_policy(VECTOR, space, **TINY_POLICY, greedy=True, **kwargs)
    # Targets are other networks
    for name in policy.networks:
        for parameter in getattr(policy, f"{name}_target").parameters():
            parameter.data.add_(0.1 * th.randn_like(parameter))
    return policy


def greedy_model(env=None, **kwargs):
    return tiny_model(SpaceEnv(action_space=DISCRETE) if env is None else env, discrete_policy="greedy", **kwargs)


def each_action(policy, actions, encoder, critic, obs):
    """Values of all actions, computed one by one, (B, K, n_critics)."""
    with th.no_grad():
        z_s = encoder.state(obs)
        vectors = policy.actions.encode(th.tensor(actions))
        values = [critic(encoder.state_action(z_s, vector.expand(len(obs), -1))) for vector in vectors]
    return th.stack(values, dim=1)


def test_all_actions(case):
    space, actions = case
    policy = greedy_policy(space)
    vectors = policy.actions.list_all(th.device("cpu"))
    assert policy.actions.decode(vectors).tolist() == actions
    assert policy.actions.n_actions == len(actions)


def test_takes_the_best_action(case):
    space, actions = case
    policy = greedy_policy(space, n_critics=3)
    # Less of the action, so that not the same one is the best everywhere
    policy.encoder.state_action.action_embedding[0].weight.data.mul_(0.05)
    obs = np.stack([VECTOR.sample() for _ in range(50)])
    values = each_action(policy, actions, policy.encoder, policy.critic, th.as_tensor(obs)).mean(dim=2)
    expected = np.array(actions)[values.argmax(dim=1)]
    for deterministic in (True, False):
        chosen = policy.predict(obs, deterministic=deterministic)[0]
        np.testing.assert_array_equal(chosen.reshape(len(obs), -1), expected)
        assert all(map(space.contains, chosen)) and chosen.dtype == space.dtype
    assert len(actions) == 1 or len(np.unique(expected, axis=0)) > 1
    # Any single observation gives the same
    assert policy.predict(obs[0])[0].tolist() == policy.predict(obs[:1])[0][0].tolist()


def test_values_of_all_actions():
    """Of a Discrete space, in ascending order."""
    space, actions = SPACES["discrete"]
    policy = greedy_policy(space)
    policy.critic.reward_scale.fill_(3.0)
    obs = np.stack([VECTOR.sample() for _ in range(5)])
    expected = 3 * each_action(policy, actions, policy.encoder, policy.critic, th.as_tensor(obs))
    np.testing.assert_allclose(policy.q_values(obs), expected, rtol=1e-5, atol=1e-6)


def random_samples(space, batch_size=64, n_steps=3):
    space.seed(0)
    generator = th.Generator().manual_seed(0)
    ended = (th.rand((batch_size, n_steps), generator=generator) < 0.2).float()
    mask = th.cat([th.ones(batch_size, 1), th.cumprod(1 - ended[:, :-1], dim=1)], dim=1)
    actions = th.as_tensor(np.stack([np.ravel(space.sample()) for _ in range(batch_size)])).long()
    observations, next_observations = (2 * th.rand((batch_size, 3), generator=generator) - 1 for _ in range(2))
    rewards = th.randn((batch_size, n_steps), generator=generator)
    return NStepSamples(observations, actions, rewards, ended, mask, next_observations)


@pytest.mark.parametrize("n_critics", [1, 3])
def test_target(case, n_critics):
    """The best action by the minimum of the target heads, in units of the targets."""
    space, actions = case
    policy = greedy_policy(space, n_critics=n_critics)
    set_scales(policy, 2.0, 5.0)
    learner = make_learner(policy)
    samples = random_samples(space)
    target, z_s, z_sa = learner.value_target(samples._replace(actions=policy.actions.encode(samples.actions)), None)
    values = each_action(policy, actions, policy.encoder_target, policy.critic_target, samples.next_observations)
    best = values.amin(dim=2).amax(dim=1, keepdim=True)
    returns, discount = n_step_return(samples.rewards, samples.terminated, samples.mask, 0.99)
    th.testing.assert_close(target, (returns + discount * 5.0 * best) / 2.0)
    assert not any(tensor.requires_grad for tensor in (target, z_s, z_sa))


def test_an_update(case):
    """It changes the value heads alone, and is the same as that of an agent with an actor, given the same target."""
    space, _ = case
    policy = greedy_policy(space)
    learner = make_learner(policy)
    before = snapshot(policy)
    priorities, metrics = learner.update_value_and_policy(random_samples(space))
    after = snapshot(policy)
    changed = {name for name in before if not th.equal(before[name], after[name])}
    assert changed and all(name.startswith("critic.") for name in changed)
    assert priorities.shape == (64,) and "actor_loss" not in metrics and "critic_loss" in metrics

    th.manual_seed(0)
    other = make_policy(VECTOR, space, **TINY_POLICY)
    other.load_state_dict(before, strict=False)
    with_actor = make_learner(other)
    with_actor.next_value = lambda next_z_s, noise: learner.next_value(next_z_s, None)
    with_actor.update_value_and_policy(random_samples(space))
    for name, value in snapshot(other.critic).items():
        th.testing.assert_close(value, after[f"critic.{name}"])


def test_no_actor(tmp_path):
    """Neither weights nor an optimiser, also in files."""
    model = greedy_model(SpaceEnv(action_space=DISCRETE)).learn(30)
    assert model.actor is None and model.actor_target is None
    assert not [name for name in model.policy.state_dict() if name.startswith("actor")]
    assert set(model.get_parameters()) == {"policy", "encoder.optimizer", "critic.optimizer"}
    assert not [name for name in model.logger.name_to_value if "actor" in name]
    model.save(tmp_path / "model")
    loaded = MRQ.load(tmp_path / "model", env=SpaceEnv(action_space=DISCRETE), device="cpu")
    obs = np.stack([VECTOR.sample() for _ in range(20)])
    np.testing.assert_array_equal(model.predict(obs)[0], loaded.predict(obs)[0])
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates
    model.policy.save(tmp_path / "policy")
    np.testing.assert_array_equal(MlpPolicy.load(tmp_path / "policy").predict(obs)[0], model.predict(obs)[0])
    save_weights(model, tmp_path / "weights")
    other = greedy_model(seed=1)
    load_weights(other, tmp_path / "weights")
    np.testing.assert_array_equal(other.predict(obs)[0], model.predict(obs)[0])
    with pytest.raises(ValueError, match=r"another architecture: actor\S* has the shape none"):
        load_weights(tiny_model(SpaceEnv(action_space=DISCRETE)), tmp_path / "weights")


@pytest.mark.parametrize(
    "space, choice, greedy",
    [
        (spaces.MultiDiscrete([4, 8]), "auto", True),
        (spaces.MultiDiscrete([3, 11]), "auto", False),
        (spaces.MultiDiscrete([3, 11]), "greedy", True),
        (DISCRETE, "actor", False),
        (spaces.Box(-1, 1, (2,)), "greedy", False),
        (spaces.Box(-1, 1, (2,)), "auto", False),
    ],
)
@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
def test_choice(space, choice, greedy, algorithm):
    model = tiny_model(SpaceEnv(action_space=space), algorithm=algorithm, discrete_policy=choice)
    assert model.policy.greedy == greedy == (model.actor is None)


@pytest.mark.parametrize("scale", [0.25, 1.5])
def test_exploration(scale):
    """Half of the environments take the action of the highest value, the others a sample of softmax(values / (2 scale))."""
    space, actions = SPACES["multi"]
    policy = greedy_policy(space)
    n = 40_000
    obs = th.full((1, 3), 0.5)
    with th.no_grad():
        values = policy.all_values(policy.encoder, policy.critic, policy.encoder.state(obs))[0].mean(dim=1)
    np.random.seed(0)
    noise = scale * th.as_tensor(hold_noise(None, (n, len(actions))), dtype=th.float32)
    taken = policy.actions.decode(policy.explore(obs.expand(n, 3), noise)).tolist()
    counts = np.array([taken.count(action) for action in actions])
    expected = 0.5 * (values / (2 * scale)).softmax(dim=0).numpy()
    assert 0.005 < expected.min() < expected.max() < 0.45
    expected[values.argmax()] += 0.5
    np.testing.assert_allclose(counts / n, expected, atol=5 * np.sqrt(0.25 / n))


def test_noise_is_held():
    """Each environment keeps its noise for four steps on average."""
    np.random.seed(0)
    noise, n_changed = hold_noise(None, (100, 5)), 0
    for _ in range(1000):
        before, noise = noise, hold_noise(noise, (100, 5))
        changed = (noise != before).any(axis=1)
        n_changed += changed.sum()
        assert (noise[~changed] == before[~changed]).all()
    # One renewed noise in four is none, as the one before it
    assert n_changed / 100_000 == pytest.approx(0.25 * 0.75, abs=0.01)
    assert (noise == 0).all(axis=1).mean() == pytest.approx(0.5, abs=0.2)
    assert hold_noise(noise, (3, 5)).shape == (3, 5)


def test_exploration_in_rollouts():
    model = greedy_model(DummyVecEnv([partial(SpaceEnv, action_space=DISCRETE)] * 300))
    obs = np.zeros((300, 3), dtype=np.float32)
    for noise, n_taken in ((0.0, 1), (1e6, 3)):
        model.exploration_noise = noise
        assert len(np.unique(model._explore(obs, with_noise=True))) == n_taken
        assert len(np.unique(model._explore(obs, with_noise=False))) == 1


@pytest.mark.filterwarnings("error:.*could not be")
@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
@pytest.mark.parametrize("way", ["compiled", "captured"])
def test_ways_of_updating(way, algorithm, monkeypatch):
    """Compiled code and graphs train as eager code."""
    if way == "captured":
        monkeypatch.setattr(Graph, "can_capture", staticmethod(lambda device: True))
        monkeypatch.setattr(Graph, "capture", staticmethod(recorded_graph.capture))
        monkeypatch.setattr("sb3_mrq.accelerate.updates.CompiledFunction", lambda function, *_: function)
    else:
        monkeypatch.setattr(th, "compile", partial(th.compile, backend="aot_eager"))
    model = greedy_model(algorithm=algorithm, compile_updates=True).learn(40)
    assert (model.updates.captured, model.updates.compiled) == (way == "captured", True)
    assert model._n_updates == 30
    assert all(value.isfinite().all() for value in snapshot(model.policy).values())
    if way == "compiled":
        eager = greedy_model(algorithm=algorithm, compile_updates=False).learn(40)
        for name, value in snapshot(eager.policy).items():
            th.testing.assert_close(snapshot(model.policy)[name], value, rtol=1e-3, atol=1e-3)


def test_agreement(tmp_path):
    """The diagnosis says in how many states the policy takes the action of the highest value."""
    env = SpaceEnv(action_space=spaces.MultiDiscrete([2, 3]))
    greedy = greedy_model(env).learn(30)
    diagnosis = diagnose(greedy, SpaceEnv(action_space=env.action_space), n_episodes=3)
    assert diagnosis.agreement == diagnosis.numbers()["policy/agreement"] == 1
    page = diagnosis.report(tmp_path / "greedy").read_text()
    assert "in 100 % of the states" in page and diagnosis.verdicts[-1].level == "green"

    model = tiny_model(SpaceEnv(action_space=env.action_space)).learn(30)
    episodes = []
    with no_side_effects(model):
        episodes = play(model, wrap_env(model, SpaceEnv(action_space=env.action_space)), 5, 0, 0.0, 10**6)
    z_s = np.concatenate([e.z_s for e in episodes])
    with th.no_grad():
        values = model.policy.all_values(model.encoder, model.critic, th.as_tensor(z_s)).mean(dim=2)
        # The actor prefers the second best action in the first ten states
        second = model.policy.actions.list_all(th.device("cpu"))[values.argsort(dim=1)[:, -2]]
        best = model.policy.actions.list_all(th.device("cpu"))[values.argmax(dim=1)]
    wanted = th.where(th.arange(len(z_s))[:, None] < 10, second, best)
    model.policy.choose = lambda z, sample=False: wanted[[np.abs(z_s - row.numpy()).sum(axis=1).argmin() for row in z]]
    diagnosis = diagnose(model, SpaceEnv(action_space=env.action_space), n_episodes=5)
    assert diagnosis.agreement == pytest.approx(1 - 10 / len(z_s))
    verdict = diagnosis.verdicts[-1]
    assert verdict.level == "amber" and "greedy" in verdict.advice
    assert html.escape(verdict.advice) in diagnosis.report(tmp_path / "actor").read_text()

    box = tiny_model(SpaceEnv()).learn(30)
    diagnosis = diagnose(box, SpaceEnv(), n_episodes=2)
    assert np.isnan(diagnosis.agreement) and "policy/agreement" not in diagnosis.numbers()
    assert "policy" not in " ".join(verdict.name for verdict in diagnosis.verdicts)


def test_bad_argument():
    with pytest.raises(ValueError, match="discrete_policy is 'gready', but must"):
        tiny_model(SpaceEnv(action_space=DISCRETE), discrete_policy="gready")


def test_too_many_actions():
    with pytest.raises(ValueError, match=r"10,000 of them, more than 4,096: pass discrete_policy='actor'"):
        greedy_model(SpaceEnv(action_space=spaces.MultiDiscrete([100, 100])))
    with pytest.raises(ValueError, match="continuous: pass discrete_policy='actor'"):
        greedy_policy(spaces.Box(-1, 1, (2,)))


def test_learns():
    """A task of SB3's own tests: to name the action that is shown."""
    env = IdentityEnvMultiDiscrete(2)
    env.action_space.seed(0)
    sizes = dict(net_arch=dict(encoder=[64, 64], qf=[64, 64], pi=[64]), z_s_dim=64, z_sa_dim=64, z_a_dim=32)
    settings = dict(batch_size=128, precision="float32", compile_updates=False, seed=0, device="cpu")
    settings |= dict(exploration_noise=0.5, learning_starts=400, policy_kwargs=sizes)
    model = MRQ("MlpPolicy", env, discrete_policy="greedy", gamma=0.4, **settings)
    model.learn(2100)
    assert evaluate_policy(model, env, 5, warn=False)[0] >= 95
