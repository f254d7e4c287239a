import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_mbpo.codec import Codec

ACT = spaces.Box(np.array([[-2.0, 0.0]]), np.array([[3.0, 10.0]]), dtype=np.float64)
BOX = spaces.Box(-1, 1, (2, 3), np.float64)
# Not in alphabetical order.
DICT = spaces.Dict(
    [("c", spaces.Box(-2, 2, (2, 2), np.float64)), ("a", spaces.Box(0, 9, (), np.int64)), ("b", spaces.Box(-1, 1, (3,)))]
)


def stack(space, batch):
    samples = [space.sample() for _ in range(int(np.prod(batch)))]
    if isinstance(space, spaces.Dict):
        return {key: np.reshape([one[key] for one in samples], (*batch, *space[key].shape)) for key in space}
    return np.reshape(samples, (*batch, *space.shape))


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("space", [BOX, DICT], ids=["Box", "Dict"])
def test_observations_there_and_back(space, batch):
    codec, obs = Codec(space, ACT), stack(space, batch)
    flat = codec.flatten(obs)
    assert flat.shape == (*batch, codec.obs_dim) and flat.dtype == codec.flat_space.dtype
    np.testing.assert_equal(codec.unflatten(flat), obs)
    for part in codec.unflatten(flat).items() if space is DICT else ():
        assert part[1].dtype == DICT[part[0]].dtype
    as_tensors = {key: th.as_tensor(part).float() for key, part in obs.items()} if space is DICT else th.as_tensor(obs).float()
    again = codec.unflatten(codec.flatten(as_tensors))
    for key in DICT if space is DICT else ():
        assert th.equal(again[key], as_tensors[key])
    assert space is DICT or th.equal(again, as_tensors)


@pytest.mark.parametrize("space", [BOX, DICT], ids=["Box", "Dict"])
def test_the_order_is_gymnasiums(space):
    codec, obs = Codec(space, ACT), space.sample()
    np.testing.assert_array_equal(codec.flatten(obs), spaces.flatten(space, obs))
    assert codec.flat_space == spaces.flatten_space(space)
    assert codec.obs_dim == spaces.flatdim(space)


@pytest.mark.parametrize("batch", [(1,), (7,), (2, 3)])
def test_actions_there_and_back(batch):
    codec, actions = Codec(BOX, ACT), stack(ACT, batch)
    encoded = codec.encode_actions(actions)
    assert encoded.shape == (*batch, 2) and np.abs(encoded).max() <= 1
    np.testing.assert_allclose(codec.decode_actions(encoded), actions, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(codec.decode_actions(th.as_tensor(encoded)), actions, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(codec.encode_actions(th.as_tensor(actions)), encoded, rtol=1e-6, atol=1e-6)


def test_actions_are_scaled_as_stable_baselines3_scales_them():
    codec, actions = Codec(BOX, ACT), stack(ACT, (7,))
    policy = SAC.policy_aliases["MlpPolicy"](BOX, ACT, lambda progress: 1e-3, net_arch=[4])
    encoded = codec.encode_actions(actions)
    np.testing.assert_array_equal(encoded, policy.scale_action(actions).reshape(7, 2))
    np.testing.assert_array_equal(codec.decode_actions(encoded), policy.unscale_action(encoded.reshape(7, 1, 2)))


def test_transitions_as_user_functions_get_them():
    codec = Codec(DICT, ACT)
    obs, actions, next_obs = codec.decode(th.rand(5, codec.obs_dim), -th.ones(5, 2), th.rand(5, codec.obs_dim))
    assert {key: tuple(part.shape) for key, part in obs.items()} == {"c": (5, 2, 2), "a": (5,), "b": (5, 3)}
    assert obs.keys() == next_obs.keys() and actions.shape == (5, 1, 2)
    assert th.equal(actions, th.as_tensor(ACT.low).float().expand(5, 1, 2))
