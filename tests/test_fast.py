"""
Compiled updates and bfloat16: the same training as eager float32, also where weights and learning rates are set from outside,
and a way back where compilation fails.
"""

import platform
import shutil
import sysconfig
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch._dynamo
from gymnasium import spaces
from helpers import NETWORKS, UPDATES, make_learner, make_policy, set_scales, update_encoder, update_value_and_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from sb3_mrq import MRQ
from sb3_mrq.accelerate.precision import automatic_precision, bfloat16_is_fast
from sb3_mrq.networks import StateEncoder
from sb3_mrq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

SIZES = dict(net_arch=dict(encoder=[32, 32], qf=[32, 32], pi=[32]), z_s_dim=32, z_sa_dim=32, z_a_dim=16)
SMALL = dict(learning_starts=20, batch_size=8, target_update_interval=20, policy_kwargs=SIZES, seed=0, device="cpu")
OBS_DIM, BATCH = 7, 64
ACTION_SPACES = {"box": spaces.Box(-1, 1, (3,)), "discrete": spaces.Discrete(3)}
IMAGES = spaces.Box(0, 255, (3, 40, 40), dtype=np.uint8)


PYTHON_HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not PYTHON_HEADER.exists(), reason="torch.compile needs g++ and Python.h"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch compiles a function for a limited number of models."""
    th.compiler.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Functions are traced and guarded as ever, but not translated, which takes long and needs a compiler."""
    monkeypatch.setattr(th, "compile", partial(th.compile, backend="eager"))


@pytest.fixture
def differentiated(monkeypatch):
    """As ``traced``, with the graphs of the backward passes too. Only the translation to C++ is left out."""
    monkeypatch.setattr(th, "compile", partial(th.compile, backend="aot_eager"))


def make(actions, seed=0, policy_class=None, **kwargs):
    th.manual_seed(seed)
    observations = spaces.Box(-np.inf, np.inf, (OBS_DIM,))
    policy = (
        make_policy(observations, ACTION_SPACES[actions], **SIZES)
        if policy_class is None
        else make_policy(IMAGES, ACTION_SPACES[actions], policy_class, **SIZES)
    )
    return policy, make_learner(policy, **kwargs)


def step(policy, learner, generator, lr, images=False):
    """One update of each kind on a random batch, with learning rates set as SB3 sets them."""

    def randn(*shape):
        return th.randn(shape, generator=generator)

    def observation():
        return th.rand((BATCH, *IMAGES.shape), generator=generator) if images else randn(BATCH, OBS_DIM)

    for network in (policy.encoder, policy.critic, policy.actor):
        for group in network.optimizer.param_groups:
            group["lr"] = lr
    dim = policy.actions.dim
    if isinstance(policy.action_space, spaces.Box):
        actions = randn(BATCH, 5, dim).clamp(-1, 1)
    else:
        actions = nn.functional.one_hot(th.randint(dim, (BATCH, 5), generator=generator), dim).float()
    terminated = (th.rand((BATCH, 5), generator=generator) < 0.05).float()
    mask = th.cat([th.ones(BATCH, 1), (1 - terminated[:, :-1]).cumprod(1)], dim=1)
    # Observations follow from one another, and rewards from these, so that there is something to learn
    obs = [observation()]
    for t in range(5):
        change = actions[:, t].mean(dim=1).view(-1, *[1] * (obs[0].ndim - 1))
        obs.append((obs[-1] + 0.1 * change).clamp(0, 1) if images else 0.9 * obs[-1] + 0.1 * change)
    rewards = th.stack([o.flatten(1)[:, 0] for o in obs[1:]], dim=1)
    if images:
        obs = [(255 * o).byte() for o in obs]
    encoder = update_encoder(learner, th.stack(obs, dim=1), actions, rewards, terminated, mask)
    noise = type(learner.sample_noise(1))(
        randn(BATCH, dim),
        *(
            None
            if isinstance(policy.action_space, spaces.Box)
            else -th.log(-th.log(th.rand((BATCH, dim), generator=generator)))
            for _ in range(2)
        ),
    )
    n = slice(0, 3)
    set_scales(policy, 0.5, 0.4)
    _, value = update_value_and_policy(
        learner, obs[0], actions[:, 0], rewards[:, n], terminated[:, n], mask[:, n], obs[3], noise
    )
    return [float(x) for x in (*vars(encoder).values(), *vars(value).values())]


def train(policy, learner, steps, replace_every=50, **kwargs):
    """Losses of every step, with replaced targets and falling learning rates."""
    generator = th.Generator().manual_seed(1)
    losses = []
    for k in range(steps):
        if k % replace_every == 0:
            learner.replace_targets()
        losses.append(step(policy, learner, generator, 1e-3 * (1 - k / steps), **kwargs))
    return np.array(losses)


def weights(policy):
    return th.cat([p.detach().flatten() for name in NETWORKS for p in getattr(policy, name).parameters()])


def distance(policy, other, start):
    """How far two agents are from each other, in parts of the way they have come from where both started."""
    return float((weights(policy) - weights(other)).norm() / (weights(other) - start).norm())


@cache
def trained_plainly(actions):
    """In eager float32: the policy after 150 updates, and the losses."""
    agent = make(actions)
    return agent[0], train(*agent, 150)


@pytest.mark.parametrize(
    "actions, precision, compiled",
    [
        ("discrete", "bfloat16", ""),
        # Translation to C++ takes more than a minute
        pytest.param("box", "bfloat16", "inductor", marks=needs_compiler),
        ("discrete", "float32", "aot_eager"),
    ],
)
def test_many_updates(monkeypatch, actions, precision, compiled):
    """Compared with eager float32."""
    if compiled:
        monkeypatch.setattr(th, "compile", partial(th.compile, backend=compiled))
    bfloat16 = precision == "bfloat16"
    plain, expected = trained_plainly(actions)
    agent = make(actions, precision=precision, compiled=bool(compiled))
    start = weights(agent[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The updates could not be compiled")
        losses = train(*agent, 150)
    # Each of the four losses was compiled once, and as a whole, with the learning rate changing at every step
    assert counters["stats"]["unique_graphs"] == (4 if compiled else 0)
    assert not counters["graph_break"] and not counters["recompiles"]
    # The first losses are of the same weights
    np.testing.assert_allclose(losses[0], expected[0], rtol=0.05 if bfloat16 else 1e-4, atol=0.01 if bfloat16 else 1e-5)
    # The encoder loss falls, and ends alike
    assert expected[-50:, 0].mean() < 0.7 * expected[:50, 0].mean()
    np.testing.assert_allclose(losses[-50:].mean(0), expected[-50:].mean(0), rtol=0.1, atol=0.02)
    assert distance(agent[0], plain, start) < (0.3 if bfloat16 else 1e-4)


@pytest.mark.usefixtures("differentiated")
def test_images_compiled(monkeypatch):
    monkeypatch.setattr(StateEncoder, "COMPILED_PARTS", 2)
    agents = [make("discrete", policy_class=CnnPolicy), make("discrete", policy_class=CnnPolicy, compiled=True)]
    start = weights(agents[0][0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The updates could not be compiled")
        for agent in agents:
            train(*agent, 10, images=True)
    assert not counters["graph_break"]
    assert distance(agents[1][0], agents[0][0], start) < 1e-4


def test_values_are_not_rounded():
    """In steps of a bfloat16, values would hide what the actions of a state differ by: learning starts late."""
    policy, learner = make("box", precision="bfloat16")
    with th.no_grad():
        policy.critic.layers[-1].bias.fill_(100.0)  # bfloat16 has steps of a half there
    z_sa = th.randn(BATCH, SIZES["z_sa_dim"])
    _, q = learner.value_loss(z_sa, th.zeros(BATCH, 1))
    assert q.dtype == th.float32
    assert (q - 100).abs().max() < 50
    expected = policy.critic(z_sa)
    assert not th.allclose(expected, expected.bfloat16().float(), atol=0.1)
    th.testing.assert_close(q, expected, rtol=0, atol=0.05)


@pytest.mark.usefixtures("differentiated")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_set_from_outside(precision):
    """``load_state_dict`` of networks and optimisers counts at once, compiled code keeps nothing of the old ones."""
    fast = make("box", seed=0, precision=precision, compiled=True)
    other = make("box", seed=1, precision=precision, compiled=False)
    train(*fast, 5)
    train(*other, 5)
    policy, copy = fast[0], other[0]
    policy.load_state_dict(copy.state_dict())
    for name in NETWORKS:
        getattr(policy, name).optimizer.load_state_dict(deepcopy(getattr(copy, name).optimizer.state_dict()))
    start = weights(copy)
    assert th.equal(weights(policy), start)
    train(*fast, 20)
    train(*other, 20)
    assert distance(policy, copy, start) < (0.3 if precision == "bfloat16" else 1e-4)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("hooked_first", [False, True])
def test_hooks_count(hooked_first):
    """Also those that come after a model of the same kind, or the model itself, was compiled."""
    other, (policy, learner), (expected, eager) = make("box", compiled=True), make("box", compiled=True), make("box")
    start = weights(policy)
    if hooked_first:
        train(*other, 1)
    else:
        train(policy, learner, 1)
        train(expected, eager, 1)
    for each in (policy, expected):
        each.encoder.state.register_forward_hook(lambda module, args, output: output * 0.5)
    train(policy, learner, 2)
    train(expected, eager, 2)
    assert distance(policy, expected, start) < 1e-4


@pytest.mark.usefixtures("traced")
@torch._dynamo.config.patch(recompile_limit=2)
def test_many_models_compiled():
    """More of them than torch compiles one function for."""
    for k in range(4):
        th.manual_seed(0)
        policy = make_policy(spaces.Box(-1, 1, (OBS_DIM,)), ACTION_SPACES["box"], **SIZES | {"z_s_dim": 20 + k})
        train(policy, make_learner(policy, compiled=True), 1)
        # The loss of values does not depend on this size
        assert counters["stats"]["unique_graphs"] == 4 + 3 * k


@pytest.mark.usefixtures("traced")
def test_compiling_anew_fails(monkeypatch):
    """For example after a hyperparameter has changed and the compiler is gone. Training goes on without it."""
    (policy, learner), (expected, eager) = make("box", compiled=True), make("box")
    start = weights(policy)
    train(policy, learner, 1)
    train(expected, eager, 1)
    assert UPDATES[learner].compiled

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch._dynamo.convert_frame, "_compile", fail)
    for each in (learner, eager):
        each.hyperparameters = replace(each.hyperparameters, gamma=0.5)
    with pytest.warns(UserWarning, match="could not be compiled.*no space left on device"):
        train(policy, learner, 2)
    train(expected, eager, 2)
    assert not UPDATES[learner].compiled
    assert distance(policy, expected, start) < 1e-4


class RandomExtractor(BaseFeaturesExtractor):
    """Draws random numbers, and changes its buffers."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(OBS_DIM, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


@pytest.mark.usefixtures("traced")
def test_compiling_leaves_no_trace():
    """Neither in buffers nor in the random generator: the first update is as any other."""
    agents = []
    for compiled in (False, True):
        th.manual_seed(0)
        space = spaces.Box(-1, 1, (OBS_DIM,))
        policy = make_policy(space, ACTION_SPACES["box"], features_extractor_class=RandomExtractor, **SIZES)
        policy.set_training_mode(True)
        th.manual_seed(1)
        train(policy, make_learner(policy, compiled), 2)
        agents.append((policy, th.get_rng_state()))
    (eager, state), (compiled, state_compiled) = agents
    assert th.equal(state, state_compiled)
    assert len(list(eager.buffers())) > 3
    for ours, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        # Integers are equal: how many batches there were
        th.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 if ours.is_floating_point() else 0)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_models_in_threads(precision):
    """Several models, each trained in its own thread, learn what each learns alone."""
    alone, agents = ([make("box", seed=seed, precision=precision) for seed in range(3)] for _ in range(2))
    starts = [weights(policy) for policy, _ in alone]
    for agent in alone:
        train(*agent, 20)
    together = threading.Barrier(len(agents))

    def work(agent):
        together.wait()
        train(*agent, 20)

    with ThreadPoolExecutor(len(agents)) as pool:
        list(pool.map(work, agents))
    # Autocast's copies of weights are forgotten whenever one of the threads leaves it: gradients are then added up before or
    # after they are rounded
    bound = 0.02 if precision == "bfloat16" else 0
    for (policy, _), (other, _), start in zip(agents, alone, starts, strict=True):
        assert distance(policy, other, start) <= bound
    assert th.get_float32_matmul_precision() == "highest"


def test_under_autocast_of_a_user():
    """The copies of weights that autocast keeps do not outlive an optimiser step."""
    agents = [make("box", precision="bfloat16") for _ in range(2)]
    start = weights(agents[0][0])
    with th.autocast("cpu", th.bfloat16):
        train(*agents[0], 20)
    train(*agents[1], 20)
    assert distance(agents[0][0], agents[1][0], start) < 0.01


@pytest.mark.usefixtures("traced")
def test_copies_train_themselves():
    """Compiled functions of a copied model must not use the networks of the original."""
    compiled, plain = make("box", compiled=True), make("box")
    train(*compiled, 3)
    train(*plain, 3)
    before = weights(compiled[0])
    copies = deepcopy((*compiled, UPDATES[compiled[1]])), deepcopy(plain)
    for copy in copies:
        train(*copy[:2], 3)
    assert copies[0][2].compiled and copies[0][2].learner is copies[0][1]
    assert distance(copies[0][0], copies[1][0], before) < 1e-4
    assert th.equal(weights(compiled[0]), before)


def test_frozen_encoder():
    """A user may freeze pretrained layers. The agent then learns on top of them."""
    policy, learner = make("box")
    policy.encoder.requires_grad_(False)
    frozen, start = deepcopy(policy.encoder.state_dict()), weights(policy)
    train(policy, learner, 3)
    assert all(th.equal(value, frozen[name]) for name, value in policy.encoder.state_dict().items())
    assert not th.equal(weights(policy), start)


@pytest.mark.usefixtures("differentiated")
def test_no_gradient_of_fixed_weights():
    """The policy loss leaves nothing in the encoder and the heads, compiled or not."""
    for compiled in (False, True):
        policy, learner = make("box", compiled=compiled)
        train(policy, learner, 1)
        for module in (policy.encoder, policy.critic):
            module.zero_grad()
        loss = learner._policy_loss(th.randn(BATCH, 32), None, th.zeros(BATCH, policy.actions.dim))
        loss.backward()
        assert all(p.grad is None for module in (policy.encoder, policy.critic) for p in module.parameters())
        assert all(p.requires_grad for p in policy.critic.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.actor.parameters())


def test_falls_back_without_compiler(tmp_path):
    agents = [make("box"), make("box", compiled=True)]
    expected = train(*agents[0], 3)
    with fresh_cache(), inductor_config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        with pytest.warns(UserWarning, match="could not be compiled") as record:
            losses = train(*agents[1], 3)
    assert len([warning for warning in record if issubclass(warning.category, UserWarning)]) == 1
    assert not UPDATES[agents[1][1]].compiled
    np.testing.assert_array_equal(losses, expected)


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64"])
@pytest.mark.parametrize("instructions", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_processors_with_bfloat16(monkeypatch, machine, instructions):
    """Nothing is said of processors whose instructions torch does not name."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(th.cpu, name, lambda name=name: name == instructions)
    assert bfloat16_is_fast(th.device("cpu")) == (machine == "aarch64" or instructions is not None)
    # Chosen only if the processor certainly has the instructions
    expected = "float32" if instructions is None else "bfloat16"
    assert automatic_precision(th.device("cpu"), nn.Linear(2, 2)) == expected


class OwnActivation(nn.ELU):
    """What a class of a user's own computes is not known."""


@pytest.mark.parametrize(
    "space, kwargs, expected",
    [
        (spaces.Box(-1, 1, (3,)), {}, "bfloat16"),
        (spaces.Discrete(4), {}, "bfloat16"),
        (spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(2)}), {}, "bfloat16"),
        (spaces.Box(-1, 1, (3,)), {"activation_fn": nn.ReLU}, "bfloat16"),
        (spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": IMAGES}), {}, "float32"),
        (IMAGES, {}, "float32"),
        (spaces.Box(-1, 1, (3,)), {"features_extractor_class": FlattenExtractor}, "float32"),
        (spaces.Box(-1, 1, (3,)), {"activation_fn": OwnActivation}, "float32"),
    ],
)
def test_automatic_precision(monkeypatch, space, kwargs, expected):
    """On a processor with instructions for bfloat16, and not on a GPU."""
    monkeypatch.setattr("sb3_mrq.accelerate.precision.processor_has_bfloat16", lambda: True)
    policy_class = MultiInputPolicy if isinstance(space, spaces.Dict) else CnnPolicy if space is IMAGES else MlpPolicy
    policy = make_policy(space, ACTION_SPACES["box"], policy_class, **SIZES, **kwargs)
    assert automatic_precision(th.device("cpu"), policy.encoder, policy.critic, policy.actor) == expected
    assert automatic_precision(th.device("cuda"), policy.encoder, policy.critic, policy.actor) == "float32"


class GrowingEnv(gym.Env):
    """Rewards grow as training goes on, and episodes terminate from some step on."""

    observation_space = spaces.Box(-1, 1, (3,))
    action_space = ACTION_SPACES["box"]
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), float(self.steps), self.steps in (35, 45), False, {}

    def _observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


class FailsWhenCompiled(BaseFeaturesExtractor):
    """Does what the compiler does not take."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, observations):
        if th.compiler.is_compiling():
            raise NotImplementedError("not while compiling")
        return self.layer(observations)


class TestModel:
    @pytest.mark.usefixtures("traced")
    def test_what_changes_is_not_compiled_in(self, monkeypatch):
        """Reward scales, the switch of the termination term and learning rates: nothing is compiled again for them."""
        settings = SMALL | dict(compile_updates=True, target_update_interval=5, learning_rate=lambda left: 1e-3 * left)
        model = MRQ("MlpPolicy", GrowingEnv(), **settings)
        scales, switches = set(), set()
        update = model.learner.update_value_and_policy

        def note(samples):
            scales.add(model.reward_scale)
            switches.add(model.learner.termination_switch.item())
            return update(samples)

        monkeypatch.setattr(model.learner, "update_value_and_policy", note)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The updates could not be compiled")
            model.learn(60)
        assert len(scales) > 5 and switches == {0.0, 1.0}
        assert counters["stats"]["unique_graphs"] == 4 and not counters["recompiles"] and model.updates.compiled

    @pytest.mark.usefixtures("traced")
    def test_extractor_that_cannot_be_compiled(self):
        """It runs uncompiled, and training is the same."""
        settings = SMALL | {"policy_kwargs": SIZES | {"features_extractor_class": FailsWhenCompiled}}
        models = []
        for compiled in (False, True):
            models.append(MRQ("MlpPolicy", GrowingEnv(), compile_updates=compiled, **settings))
            start = weights(models[-1].policy)
            models[-1].learn(30)
            assert models[-1]._n_updates == 10
        assert counters["unimplemented"]
        assert distance(models[1].policy, models[0].policy, start) < 1e-3

    def test_arguments(self):
        with pytest.raises(ValueError, match="precision is 'half', but must be one of 'auto', 'float32', 'tf32', 'bfloat16'"):
            MRQ("MlpPolicy", "Pendulum-v1", precision="half")
        with pytest.raises(ValueError, match="compile_updates is 'yes', but must be one of 'auto', True, False"):
            MRQ("MlpPolicy", "Pendulum-v1", compile_updates="yes")
        model = MRQ("MlpPolicy", "Pendulum-v1", precision="bfloat16", compile_updates=True, **SMALL)
        assert model.learner.hyperparameters.precision == "bfloat16" and model.updates.compiled
        model = MRQ("MlpPolicy", "Pendulum-v1", precision="float32", **SMALL)
        assert model.learner.hyperparameters.precision == "float32" and not model.updates.compiled

    @pytest.mark.parametrize("supported", [True, False])
    def test_precision_by_default(self, monkeypatch, capsys, tmp_path, supported):
        """It depends on the processor that a model runs on, even if it was saved on another one."""
        expected = "bfloat16" if supported else "float32"
        monkeypatch.setattr("sb3_mrq.accelerate.precision.processor_has_bfloat16", lambda: not supported)
        MRQ("MlpPolicy", "Pendulum-v1", **SMALL).save(tmp_path / "elsewhere")
        monkeypatch.setattr("sb3_mrq.accelerate.precision.processor_has_bfloat16", lambda: supported)
        model = MRQ("MlpPolicy", "Pendulum-v1", verbose=1, **SMALL)
        assert ("Using bfloat16" in capsys.readouterr().out) == supported
        loaded = MRQ.load(tmp_path / "elsewhere", env=model.env, device="cpu")
        for agent in (model, loaded):
            assert agent.precision == "auto"
            agent.learn(21)
            assert agent.learner.hyperparameters.precision == expected
        model.precision = "float32"
        model.learn(1, reset_num_timesteps=False)
        assert model.learner.hyperparameters.precision == "float32"

    @pytest.mark.parametrize("fast", [True, False])
    def test_bfloat16_without_instructions_for_it(self, monkeypatch, fast):
        monkeypatch.setattr("sb3_mrq.mrq.bfloat16_is_fast", lambda device: fast)
        model = MRQ("MlpPolicy", "Pendulum-v1", precision="bfloat16", **SMALL)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            model.learn(21)
        found = [warning for warning in record if "many times slower" in str(warning.message)]
        assert len(found) == (0 if fast else 1)
        # At the line that can be changed
        assert all(warning.filename == __file__ for warning in found)

    def test_tf32(self, monkeypatch):
        """For the updates alone, backward passes included."""
        seen = []
        model = MRQ("MlpPolicy", "Pendulum-v1", precision="tf32", **SMALL)
        # The first call of learn also tries an update with copies
        model.learn(1)
        step, backward = model.learner._encoder_loss, th.Tensor.backward

        def note(function):
            def noted(*args, **kwargs):
                seen.append(th.get_float32_matmul_precision())
                return function(*args, **kwargs)

            return noted

        monkeypatch.setattr(model.learner, "_encoder_loss", note(step))
        monkeypatch.setattr(th.Tensor, "backward", note(backward))
        model.learn(21, reset_num_timesteps=False)
        assert len(seen) == 2 * 20 + 2 * 2 and set(seen) == {"high"}
        assert th.get_float32_matmul_precision() == "highest"

    @pytest.mark.usefixtures("differentiated")
    def test_automatic_choice(self, monkeypatch):
        monkeypatch.setattr(MRQ, "COMPILE_FROM", 10)
        model = MRQ("MlpPolicy", "Pendulum-v1", **SMALL)
        model.learn(29)
        assert not model.updates.compiled
        model = MRQ("MlpPolicy", "Pendulum-v1", **SMALL)
        model.learn(30)
        assert model.updates.compiled and model._n_updates == 10
        # Not where several models may be trained at once
        model = MRQ("MlpPolicy", "Pendulum-v1", **SMALL)
        thread = threading.Thread(target=model.learn, args=(30,))
        thread.start()
        thread.join()
        assert not model.updates.compiled and model._n_updates == 10
        model = MRQ("MlpPolicy", "Pendulum-v1", compile_updates=False, **SMALL)
        model.learn(30)
        assert not model.updates.compiled

    @pytest.mark.usefixtures("differentiated")
    def test_automatic_choice_stays(self, monkeypatch):
        """Compiled losses stay compiled in a short call of ``learn`` that follows."""
        monkeypatch.setattr(MRQ, "COMPILE_FROM", 10)
        model = MRQ("MlpPolicy", "Pendulum-v1", **SMALL)
        model.learn(30)
        compiled = model.learner._value_loss.compiled
        model.learn(5, reset_num_timesteps=False)
        assert model.learner._value_loss.compiled is compiled is not None

    @pytest.mark.usefixtures("differentiated")
    def test_automatic_choice_in_short_calls(self, monkeypatch, tmp_path):
        """Many short calls of ``learn`` that continue each other are a long run, after loading, too."""
        monkeypatch.setattr(MRQ, "COMPILE_FROM", 10)
        model = MRQ("MlpPolicy", "Pendulum-v1", **SMALL)
        chosen = []
        for steps in (25, 5, 5):
            model.learn(steps, reset_num_timesteps=False)
            chosen.append((model._n_updates, model.updates.compiled))
        assert chosen == [(5, False), (10, True), (15, True)]
        model.save(tmp_path / "model")
        loaded = MRQ.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
        loaded.learn(5, reset_num_timesteps=False)
        assert loaded.updates.compiled

    def test_compiling_is_tried_once(self, monkeypatch):
        """If compiling fails there is one warning, also over several calls of ``learn``."""
        monkeypatch.setattr(MRQ, "COMPILE_FROM", 10)

        def fail(*args, **kwargs):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(th, "compile", fail)
        model = MRQ("MlpPolicy", "Pendulum-v1", **SMALL)
        with pytest.warns(UserWarning, match="could not be compiled"):
            model.learn(30)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.learn(30, reset_num_timesteps=False)
        assert not model.updates.compiled

    @pytest.mark.usefixtures("differentiated")
    @pytest.mark.parametrize("compiled", [False, True])
    def test_hyperparameters_set_from_outside(self, tmp_path, compiled):
        """As in TD3, a changed attribute takes effect at the next training step."""
        given = dict(gamma=0.5, target_policy_noise=0.0, priority_alpha=0.0, reward_loss_weight=0.7, max_grad_norm=1e-3)
        # Compiled and eager updates round differently, in bfloat16 by more than the difference tested here
        model = MRQ("MlpPolicy", "Pendulum-v1", compile_updates=compiled, precision="float32", **SMALL)
        model.learn(40)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        for name, value in given.items():
            setattr(model, name, value)
        loaded, unchanged = (
            MRQ.load(tmp_path / "model", env=model.get_env(), compile_updates=False, **kwargs) for kwargs in (given, {})
        )
        for other in (loaded, unchanged):
            other.load_replay_buffer(tmp_path / "buffer")
            other.set_logger(model.logger)
        start = weights(model)
        for each in (model, loaded, unchanged):
            th.manual_seed(1)
            np.random.seed(1)
            each.train(5, batch_size=8)
        assert distance(model, loaded, start) < 1e-3
        assert distance(unchanged, loaded, start) > 0.1

    @pytest.mark.usefixtures("differentiated")
    def test_save_one_way_load_the_other(self, tmp_path):
        model = MRQ("MlpPolicy", "Pendulum-v1", compile_updates=True, precision="bfloat16", **SMALL)
        model.learn(40)
        model.save(tmp_path / "model")
        eager = MRQ.load(tmp_path / "model", compile_updates=False, precision="float32")
        assert not eager.updates.compiled and eager.learner.hyperparameters.precision == "float32"
        for name, value in model.policy.state_dict().items():
            assert value.dtype == th.float32 and "_orig_mod" not in name
            assert th.equal(eager.policy.state_dict()[name], value)
        eager.save(tmp_path / "eager")
        again = MRQ.load(tmp_path / "eager", env=gym.make("Pendulum-v1"), compile_updates=True)
        again.learn(30)
        assert again.updates.compiled and again._n_updates == 20 + 10
