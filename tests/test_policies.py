"""
Everything that policy_kwargs can change, and policies on their own.
"""

from copy import deepcopy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch as th
from envs import BOX, IMAGE, TINY_POLICY, VECTOR, SpaceEnv, changed, learn_and_check, policy_for, tiny_model
from gymnasium import spaces
from helpers import NETWORKS, make_policy, same, snapshot
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_mrq import MRQ, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_mrq.extractors import CNNExtractor, MultiInputExtractor
from sb3_mrq.policies import MRQPolicy

DICT = spaces.Dict(image=IMAGE, vector=VECTOR)
FLOAT_IMAGE = spaces.Box(0, 1, (3, 36, 36), dtype=np.float32)
BYTE_IMAGE = spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8)
BYTES_AND_VECTOR = spaces.Dict(image=BYTE_IMAGE, vector=VECTOR)
ALIASES = {"MlpPolicy": (MlpPolicy, VECTOR), "CnnPolicy": (CnnPolicy, IMAGE), "MultiInputPolicy": (MultiInputPolicy, DICT)}


class NoisyExtractor(BaseFeaturesExtractor):
    """An extractor of a user's own that behaves differently in training, with weights, buffers and an unused parameter."""

    def __init__(self, observation_space, features_dim=8):
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(observation_space.shape[0], features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5)
        )
        self.unused = nn.Parameter(th.zeros(2))

    def forward(self, observations):
        return self.layers(observations)


class WholeCNN(CNNExtractor):
    """As it would be with batch normalisation."""

    images_at_once = None


class WholeMultiInput(MultiInputExtractor):
    images_at_once = None


class SmallCNN(CNNExtractor):
    """With its own constructor."""

    def __init__(self, observation_space, normalized_image=False):
        super().__init__(observation_space, normalized_image=normalized_image)


def layer_sizes(network):
    return [(layer.in_features, layer.out_features) for layer in network.modules() if isinstance(layer, nn.Linear)]


def optimized(optimizer):
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def shapes(network):
    return [tuple(parameter.shape) for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("extractor", "space", "kwargs"),
    [
        (NoisyExtractor, VECTOR, {"features_dim": 5}),
        (FlattenExtractor, VECTOR, {}),
        (NatureCNN, IMAGE, {"features_dim": 32}),
        (CombinedExtractor, DICT, {"cnn_output_dim": 16}),
        (SmallCNN, IMAGE, {}),
    ],
)
def test_features_extractor_class(extractor, space, kwargs):
    model = tiny_model(
        SpaceEnv(space),
        policy_for(space),
        policy_kwargs={"features_extractor_class": extractor, "features_extractor_kwargs": kwargs},
    )
    online, target = (encoder.state.features_extractor for encoder in (model.encoder, model.encoder_target))
    assert type(online) is type(target) is extractor
    for parameter, copy in zip(online.parameters(), target.parameters(), strict=True):
        assert id(parameter) in optimized(model.encoder.optimizer)
        assert id(parameter) not in optimized(model.critic.optimizer) | optimized(model.actor.optimizer)
        assert parameter.data_ptr() != copy.data_ptr()
        assert parameter.requires_grad and not copy.requires_grad
    before = snapshot(model.policy)
    learn_and_check(model, 20)
    if extractor is not FlattenExtractor:
        after = snapshot(model.policy)
        assert changed(before, after, "encoder.state.features_extractor")
        assert changed(before, after, "encoder_target.state.features_extractor")


def test_extractors_train_in_training_only():
    model = tiny_model(SpaceEnv(), policy_kwargs={"features_extractor_class": NoisyExtractor})
    model.learn(20)
    running_mean = "encoder.state.features_extractor.layers.2.running_mean"
    before = snapshot(model.policy)
    assert before[running_mean].abs().sum() > 0
    obs = np.stack([VECTOR.sample() for _ in range(8)])
    first, second = model.predict(obs)[0], model.predict(obs)[0]
    np.testing.assert_array_equal(first, second)
    assert same(before, snapshot(model.policy))
    for _ in range(2):
        model.policy.set_training_mode(True)
        assert model.encoder.training and model.actor.training and model.critic.training
        assert not (model.encoder_target.training or model.actor_target.training or model.critic_target.training)
        # Torch's own takes the targets along
        model.policy.train()


class CountingExtractor(FlattenExtractor):
    """With a buffer that is not saved."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.register_buffer("count", th.zeros(()), persistent=False)

    def forward(self, observations):
        if self.training:
            self.count += 1
        return super().forward(observations)


def test_all_buffers_are_copied_to_targets():
    model = tiny_model(SpaceEnv(), policy_kwargs={"features_extractor_class": CountingExtractor})
    model.learn(20)
    extractor, target = (encoder.state.features_extractor for encoder in (model.encoder, model.encoder_target))
    assert 0 < target.count < extractor.count
    model.learner.replace_targets()
    assert target.count == extractor.count


@pytest.mark.parametrize(
    ("net_arch", "encoder", "qf", "pi"),
    [
        ({"encoder": [10, 11], "qf": [12], "pi": [13, 14]}, [10, 11], [12], [13, 14]),
        ({"pi": [13]}, [512, 512], [512, 512, 512], [13]),
        ({"qf": []}, [512, 512], [], [512, 512]),
        ([9, 8], [512, 512], [9, 8], [9, 8]),
        ([], [512, 512], [], []),
        (None, [512, 512], [512, 512, 512], [512, 512]),
    ],
)
def test_net_arch(net_arch, encoder, qf, pi):
    model = tiny_model(SpaceEnv(), policy_kwargs={"net_arch": net_arch}, learning_starts=10, target_update_interval=2)
    actions, z = BOX.shape[0], 16

    def widths(sizes):
        return list(pairwise(sizes))

    assert layer_sizes(model.actor) == widths([z, *pi, actions])
    assert layer_sizes(model.encoder.state) == widths([VECTOR.shape[0], *encoder, z])
    assert sum(np.prod(shape) for shape in shapes(model.critic)) == 2 * sum(
        (inputs + 1) * outputs for inputs, outputs in widths([z, *qf, 1])
    )
    sizes = [8 + z, *encoder, z]
    expected = sum((inputs + 1) * outputs for inputs, outputs in [(actions, 8), *widths(sizes)])
    assert sum(np.prod(shape) for shape in shapes(model.encoder.state_action)) == expected
    learn_and_check(model, 14)


def test_activation_functions():
    model = tiny_model(SpaceEnv(), policy_kwargs={"activation_fn": nn.Tanh, "actor_activation_fn": nn.SiLU})
    kinds = [{type(module) for module in network.modules()} for network in (model.encoder, model.critic, model.actor)]
    for kind in kinds[:2]:
        assert nn.Tanh in kind and not kind & {nn.ELU, nn.SiLU}
    assert nn.SiLU in kinds[2] and nn.Tanh not in kinds[2]
    learn_and_check(model, 20)


@pytest.mark.parametrize(("policy", "space"), [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_activation_function_of_images(policy, space):
    model = tiny_model(SpaceEnv(space), policy, policy_kwargs={"activation_fn": nn.GELU})
    kind = {type(module) for module in model.encoder.modules()}
    assert nn.GELU in kind and nn.ELU not in kind


def test_embedding_sizes():
    sizes = {"z_s_dim": 7, "z_a_dim": 6, "z_sa_dim": 5, "n_reward_bins": 11, "reward_bins_limit": 3.0}
    model = tiny_model(SpaceEnv(), policy_kwargs=sizes)
    z_s = model.encoder.state(th.zeros(4, VECTOR.shape[0]))
    z_sa = model.encoder.state_action(z_s, th.zeros(4, BOX.shape[0]))
    assert z_s.shape == (4, 7)
    assert z_sa.shape == (4, 5)
    terminated, next_z_s, reward_logits = model.encoder.predictor(z_sa)
    assert next_z_s.shape == (4, 7)
    assert reward_logits.shape == (4, 11)
    assert terminated.numel() == 4
    np.testing.assert_allclose(model.encoder.predictor.bins[[0, -1]], [1 - np.exp(3), np.exp(3) - 1], rtol=1e-5)
    learn_and_check(model, 20)


@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_n_critics(n_critics):
    model = tiny_model(SpaceEnv(), policy_kwargs={"n_critics": n_critics})
    assert model.critic(th.zeros(4, 16)).shape == (4, n_critics)
    learn_and_check(model, 20)


@pytest.mark.parametrize(
    "space", [FLOAT_IMAGE, spaces.Dict(image=FLOAT_IMAGE, vector=VECTOR)], ids=["CnnPolicy", "MultiInputPolicy"]
)
def test_float_images(space):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy"
    model = tiny_model(SpaceEnv(space), policy, policy_kwargs={"normalize_images": False})
    learn_and_check(model, 20)


@pytest.mark.parametrize("extractor", [NatureCNN, CombinedExtractor])
def test_float_images_with_extractors_of_sb3(extractor):
    space = FLOAT_IMAGE if extractor is NatureCNN else spaces.Dict(image=FLOAT_IMAGE, vector=VECTOR)
    policy = "CnnPolicy" if extractor is NatureCNN else "MultiInputPolicy"
    kwargs = {"normalize_images": False, "features_extractor_class": extractor}
    learn_and_check(tiny_model(SpaceEnv(space), policy, policy_kwargs=kwargs), 20)


def test_normalize_images_decides_about_the_scale():
    """The same picture as bytes and as floats in [0, 1] leads to the same action."""
    of_bytes = tiny_model(SpaceEnv(BYTE_IMAGE), "CnnPolicy")
    of_floats = tiny_model(SpaceEnv(FLOAT_IMAGE), "CnnPolicy", policy_kwargs={"normalize_images": False})
    image = of_bytes.observation_space.sample()
    action = of_floats.predict(image.astype(np.float32) / 255)[0]
    np.testing.assert_allclose(of_bytes.predict(image)[0], action, atol=1e-5)
    np.testing.assert_allclose(of_bytes.predict(image.astype(np.float32))[0], action, atol=1e-5)


@pytest.mark.parametrize("space", [BYTE_IMAGE, FLOAT_IMAGE, BYTES_AND_VECTOR], ids=["bytes", "floats", "Dict"])
def test_images_embedded_a_few_at_a_time(space):
    """As where all of a batch are embedded at once, gradients included; the last part may be smaller."""
    is_dict = space is BYTES_AND_VECTOR
    policy_class = MultiInputPolicy if is_dict else CnnPolicy
    policy = make_policy(space, BOX, policy_class, normalize_images=space is not FLOAT_IMAGE, **TINY_POLICY)
    encoder = policy.encoder.state
    sizes = []
    encoder.features_extractor.register_forward_pre_hook(
        lambda _, args: sizes.append(len(args[0]["image"] if is_dict else args[0]))
    )
    n = 8 * th.get_num_threads()
    space.seed(0)
    samples = [space.sample() for _ in range(2 * n + 3)]
    batch = {key: np.stack([sample[key] for sample in samples]) for key in space} if is_dict else np.stack(samples)
    obs = policy.preprocess(policy.obs_to_tensor(batch)[0])
    results = []
    for at_once in (8, None):
        encoder.images_at_once = at_once
        encoder.zero_grad()
        z_s = encoder(obs)
        z_s.square().sum().backward()
        results.append([z_s.detach(), *(p.grad for p in encoder.parameters())])
    assert sizes == [n, n, 3, 2 * n + 3]
    for parts, whole in zip(*results, strict=True):
        assert whole.any()
        th.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize(
    ("policy_class", "space", "kwargs", "at_once"),
    [
        (CnnPolicy, BYTE_IMAGE, {}, 8),
        (MultiInputPolicy, BYTES_AND_VECTOR, {}, 8),
        (MultiInputPolicy, spaces.Dict(vector=VECTOR), {}, None),
        (MlpPolicy, VECTOR, {}, None),
        (CnnPolicy, BYTE_IMAGE, {"features_extractor_class": NatureCNN}, None),
        (CnnPolicy, BYTE_IMAGE, {"features_extractor_class": WholeCNN}, None),
        (MultiInputPolicy, BYTES_AND_VECTOR, {"features_extractor_class": WholeMultiInput}, None),
    ],
)
def test_what_is_embedded_a_few_at_a_time(policy_class, space, kwargs, at_once):
    """An extractor of a user's own may treat a batch as one."""
    policy = make_policy(space, BOX, policy_class, **TINY_POLICY, **kwargs)
    assert policy.encoder.state.images_at_once == policy.encoder_target.state.images_at_once == at_once


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs", "setting", "value"),
    [
        (th.optim.AdamW, None, "weight_decay", 1e-4),
        (th.optim.AdamW, {"weight_decay": 0.5}, "weight_decay", 0.5),
        (th.optim.AdamW, {"betas": (0.5, 0.9)}, "weight_decay", 1e-4),
        (th.optim.Adam, {"eps": 1e-3}, "eps", 1e-3),
        (th.optim.SGD, {"momentum": 0.9}, "momentum", 0.9),
        (th.optim.RMSprop, None, "alpha", 0.99),
    ],
)
def test_optimizers(optimizer_class, optimizer_kwargs, setting, value):
    kwargs = {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    model = tiny_model(SpaceEnv(), policy_kwargs=kwargs, learning_rate=2e-3, encoder_learning_rate=3e-3)
    for name, learning_rate in zip(NETWORKS, (3e-3, 2e-3, 2e-3), strict=True):
        network = getattr(model, name)
        assert type(network.optimizer) is optimizer_class
        assert network.optimizer.param_groups[0][setting] == value
        assert network.optimizer.param_groups[0]["lr"] == learning_rate
        assert optimized(network.optimizer) == {id(parameter) for parameter in network.parameters()}
    learn_and_check(model, 20)


@pytest.mark.parametrize("decay", [None, 0.2])
def test_partial_optimizer(decay):
    """As TD3 takes it; the weight decay is MR.Q's where none is given."""
    optimizer_class = partial(th.optim.AdamW, eps=1e-5, **({} if decay is None else {"weight_decay": decay}))
    model = tiny_model(SpaceEnv(VECTOR), policy_kwargs=dict(optimizer_class=optimizer_class))
    for network in (model.encoder, model.critic, model.actor):
        (group,) = network.optimizer.param_groups
        assert group["eps"] == 1e-5 and group["weight_decay"] == (1e-4 if decay is None else decay)


def test_all_parameters_are_trained_or_targets():
    model = tiny_model(SpaceEnv(DICT), "MultiInputPolicy")
    trained = set().union(*(optimized(getattr(model, name).optimizer) for name in NETWORKS))
    for name, parameter in model.policy.named_parameters():
        is_target = name.split(".")[0].endswith("_target")
        assert (id(parameter) in trained) == parameter.requires_grad == (not is_target), name


def test_aliases_are_the_policys_networks():
    model = tiny_model(SpaceEnv())
    for name in ("encoder", "encoder_target", "critic", "critic_target", "actor", "actor_target"):
        assert getattr(model, name) is getattr(model.policy, name)


@pytest.mark.parametrize("action_space", [BOX, spaces.MultiDiscrete([3, 2], start=[1, 0])], ids=["Box", "MultiDiscrete"])
@pytest.mark.parametrize("alias", ALIASES)
def test_save_policy(alias, action_space, tmp_path):
    policy_class, space = ALIASES[alias]
    kwargs = {"net_arch": {"encoder": [12], "qf": [12], "pi": [11]}, "activation_fn": nn.Tanh, "gumbel_temperature": 3.0}
    model = tiny_model(SpaceEnv(space, action_space), alias, policy_kwargs=kwargs)
    model.learn(16)
    model.policy.save(tmp_path / "policy.pth")
    obs = model.get_env().reset()
    expected = model.predict(obs, deterministic=True)[0]
    for cls in (policy_class, MRQPolicy):
        loaded = cls.load(tmp_path / "policy.pth", device="cpu")
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        assert same(snapshot(loaded), snapshot(model.policy))
        assert loaded.actions.__dict__.get("temperature", 3.0) == 3.0


def test_save_policy_with_an_extractor(tmp_path):
    kwargs = {"features_extractor_class": NoisyExtractor, "features_extractor_kwargs": {"features_dim": 6}}
    model = tiny_model(SpaceEnv(), policy_kwargs=kwargs)
    model.policy.save(tmp_path / "policy.pth")
    loaded = MlpPolicy.load(tmp_path / "policy.pth", device="cpu")
    assert loaded.encoder.state.features_extractor.features_dim == 6
    obs = VECTOR.sample()
    np.testing.assert_array_equal(loaded.predict(obs)[0], model.predict(obs)[0])


def test_policy_can_be_copied():
    model = tiny_model(SpaceEnv())
    copy = deepcopy(model.policy)
    obs = VECTOR.sample()
    before = model.predict(obs)[0]
    model.learn(20)
    assert not np.array_equal(model.predict(obs)[0], before)
    np.testing.assert_array_equal(copy.predict(obs)[0], before)


def test_policy_kwargs_are_left_alone():
    kwargs = deepcopy(TINY_POLICY)
    MRQ("MlpPolicy", SpaceEnv(), policy_kwargs=kwargs, device="cpu")
    assert kwargs == TINY_POLICY


def test_forward_is_the_scaled_action():
    """policy.forward, which exports use, gives actions in [-1, 1]; predict gives actions of the space."""
    space = spaces.Box(np.float32(2), np.float32(6), (2,))
    model = tiny_model(SpaceEnv(action_space=space))
    obs = VECTOR.sample()
    with th.no_grad():
        scaled = model.policy(th.as_tensor(obs[None]), deterministic=True).numpy()[0]
    np.testing.assert_allclose(model.predict(obs)[0], 4 + 2 * scaled, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("space", [VECTOR, BYTE_IMAGE], ids=["vector", "image"])
def test_policy_can_be_exported(how, space):
    """As Stable-Baselines3's documentation does it, for C++ and others. Batches may be larger than the one it is done with."""
    policy = tiny_model(SpaceEnv(space), policy_for(space)).policy
    space.seed(0)
    obs = policy.obs_to_tensor(np.stack([space.sample() for _ in range(30)]))[0]
    if how == "export":
        exported = th.export.export(policy, (obs[:2],), dynamic_shapes={"observation": {0: th.export.Dim.AUTO}}).module()
    else:
        exported = th.jit.trace(policy, obs[:1])
    th.testing.assert_close(exported(obs), policy(obs))
