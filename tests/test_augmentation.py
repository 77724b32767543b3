"""Random shift (section 9) against padding with copies of the border and cutting a window out; where training uses it."""

from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats

from sb3_mrq import MRQ, CnnPolicy, MlpPolicy, augmentation
from sb3_mrq.augmentation import random_shift

PAD = 4


@pytest.fixture(autouse=True)
def seed():
    th.manual_seed(0)


def random_images(*shape, dtype=th.uint8):
    return th.randint(0, 256, shape).to(dtype)


def windows(images, pad=PAD):
    """All shifts of a batch of images, by offset, (2 pad + 1, 2 pad + 1, B, C, H, W)."""
    height, width = images.shape[-2:]
    padded = th.nn.functional.pad(images.double(), (pad, pad, pad, pad), mode="replicate").to(images.dtype)
    offsets = range(2 * pad + 1)
    return th.stack([th.stack([padded[..., y : y + height, x : x + width] for x in offsets]) for y in offsets])


def find_offsets(images, shifted, pad=PAD):
    """The one offset (y, x) from -pad to pad that makes each image the shifted one, (B, 2)."""
    matches = (windows(images, pad) == shifted).flatten(3).all(dim=3)
    assert (matches.sum(dim=(0, 1)) == 1).all(), "An image is not one of the windows, or several of them"
    return matches.permute(2, 0, 1).nonzero()[:, 1:] - pad


@pytest.mark.parametrize("dtype", [th.uint8, th.float32, th.float64, th.int64])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14), (9, 20, 10)])
def test_every_image_is_a_window_of_the_padded_one(dtype, shape):
    """Same shape and dtype, all channels of an image shifted together, the input left as it was."""
    images = random_images(50, *shape, dtype=dtype)
    before = images.clone()
    shifted = random_shift(images)
    assert (shifted.shape, shifted.dtype) == (images.shape, dtype)
    offsets = find_offsets(images, shifted)
    assert len(offsets) == 50
    assert th.equal(images, before)


@pytest.mark.parametrize("pad", [1, 2, 7])
def test_pad_is_the_largest_shift(pad):
    """Every offset up to it occurs, on both axes."""
    images = random_images(400, 1, 16, 16)
    offsets = find_offsets(images, random_shift(images, pad), pad)
    for axis in range(2):
        assert set(offsets[:, axis].tolist()) == set(range(-pad, pad + 1))


def test_images_smaller_than_the_pad():
    """Several offsets may then give the same image, but each image is one of the windows."""
    images = random_images(100, 2, 3, 2)
    assert (windows(images) == random_shift(images)).flatten(3).all(dim=3).any(dim=0).any(dim=0).all()


def test_offsets_are_uniform_and_independent():
    """Over the 81 pairs of offsets, and between one image and the next of the same batch."""
    images = random_images(8100, 1, 8, 8)
    offsets = find_offsets(images, random_shift(images)) + PAD
    pairs = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert pairs.min() > 0
    assert stats.chisquare(pairs).pvalue > 1e-3
    for axis in range(2):
        assert stats.chisquare(np.bincount(offsets[:, axis], minlength=9)).pvalue > 1e-3
        for other in range(2):
            neighbours = np.bincount(offsets[:-1, axis] * 9 + offsets[1:, other], minlength=81)
            assert stats.chisquare(neighbours).pvalue > 1e-3


def test_equal_images_of_a_batch_get_shifts_of_their_own():
    """A hundred copies become most of the 81 different images."""
    image = random_images(1, 1, 12, 12)
    shifted = random_shift(image.expand(100, 1, 12, 12))
    assert len(shifted.flatten(1).unique(dim=0)) > 40


def test_two_calls_differ():
    images = random_images(20, 1, 12, 12)
    assert not th.equal(random_shift(images), random_shift(images))


@pytest.mark.parametrize("leading", [(), (1,), (6,), (4, 5), (2, 3, 2)])
def test_leading_dimensions(leading):
    """Each image is shifted on its own, whatever axes there are before it."""
    images = random_images(*leading, 3, 12, 12)
    shifted = random_shift(images)
    assert shifted.shape == images.shape
    offsets = find_offsets(images.reshape(-1, 3, 12, 12), shifted.reshape(-1, 3, 12, 12))
    if len(offsets) >= 6:
        assert len({tuple(offset) for offset in offsets.tolist()}) > 1


def test_without_contiguous_memory():
    """As the steps of a sub-trajectory are, a slice of a larger batch."""
    images = random_images(30, 5, 2, 12, 12)[:, 2]
    assert len(find_offsets(images.contiguous(), random_shift(images))) == 30


def test_pad_of_zero_shifts_nothing():
    images = random_images(10, 3, 12, 12)
    assert th.equal(random_shift(images, 0), images)


# --------------------------------------------------------------------------------------------------------------------
# In training
# --------------------------------------------------------------------------------------------------------------------


class ImageEnv(gym.Env):
    """Images and a vector, without end."""

    observation_space = spaces.Dict(image=spaces.Box(0, 255, (2, 36, 36), np.uint8), vector=spaces.Box(-np.inf, np.inf, (3,)))
    action_space = spaces.Discrete(2)

    def __init__(self, key=None):
        self.key = key
        if key is not None:
            self.observation_space = self.observation_space[key]

    def _obs(self):
        obs = dict(image=self.np_random.integers(0, 256, (2, 36, 36), dtype=np.uint8), vector=np.ones(3, dtype=np.float32))
        return obs if self.key is None else obs[self.key]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), 1.0, False, False, {}


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
@pytest.mark.parametrize(
    "policy, key, pad",
    [("CnnPolicy", "image", 4), ("CnnPolicy", "image", 2), ("MultiInputPolicy", None, 4), ("MlpPolicy", "vector", 4)],
)
def test_training_shifts_every_image_of_a_batch_and_acting_none(policy, key, pad):
    """B times H + 1 images for the encoder, twice B for the value; vectors never."""
    model = MRQ(
        policy,
        ImageEnv(key),
        policy_kwargs=dict(net_arch=dict(encoder=[8], qf=[8], pi=[8]), z_s_dim=8, z_a_dim=4, z_sa_dim=8),
        batch_size=3,
        buffer_size=50,
        learning_starts=6,
        target_update_interval=2,
        random_shift_pad=pad,
        device="cpu",
        seed=0,
    )
    shifted = []

    def note(images, pad=PAD):
        assert images.dtype == th.uint8
        shifted.append((images.shape[:-3].numel(), pad))
        return augmentation.random_shift(images, pad)

    # Begins with a rehearsal of a training step
    model.learn(3)
    with mock.patch("sb3_mrq.learner.random_shift", note):
        model.learn(3, reset_num_timesteps=False)
        model.predict(model.env.reset())
        assert not shifted
        model.learn(1, reset_num_timesteps=False)
    n_images = 0 if policy == "MlpPolicy" else 2 * 3 * (5 + 1) + 3 + 3
    assert sum(count for count, _ in shifted) == n_images
    assert all(used == pad for _, used in shifted)


@pytest.mark.parametrize(("policy_class", "size", "is_image"), [(MlpPolicy, 8, False), (CnnPolicy, 36, True)])
def test_float_boxes_of_three_axes(policy_class, size, is_image):
    """With ``normalize_images=False`` they are images for the policies that take images, but not for MlpPolicy."""
    space = spaces.Box(0, 1, (2, size, size), np.float32)
    policy = policy_class(space, spaces.Discrete(2), lambda _: 1e-3, normalize_images=False)
    assert policy.is_image(space) == is_image
