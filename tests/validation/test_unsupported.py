import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces, wrappers
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_util import make_vec_env
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.validation import unsupported

BOX = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
UNBOUNDED = spaces.Box(-np.inf, np.inf, (2,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Discrete(3), BOX, "observation space Discrete.*needs a Box or a Dict of Boxes.*FlattenObservation"),
        (spaces.MultiBinary(3), BOX, "observation space MultiBinary.*FlattenObservation"),
        (IMAGE, BOX, "vectors, not images. Use SAC or another model-free algorithm$"),
        (spaces.Dict(a=BOX, camera=IMAGE), BOX, r"vectors, not images.*FilterObservation\(env, \['a'\]\)"),
        (spaces.Dict(a=spaces.Sequence(BOX)), BOX, "no fixed size.*TransformObservation"),
        (spaces.Dict(a=BOX, b=spaces.Box(0, 9, ())), BOX, "without a dimension.*FlattenObservation"),
        (spaces.Box(0, 9, (0,)), BOX, "empty.*TransformObservation"),
        (spaces.Dict(), BOX, "empty"),
        (BOX, spaces.Discrete(2), "action space Discrete.*Use DQN or PPO$"),
        (BOX, spaces.MultiDiscrete([2, 3]), "action space MultiDiscrete.*Use PPO$"),
        (BOX, spaces.MultiBinary(3), "action space MultiBinary.*Use PPO$"),
        (BOX, spaces.Dict(a=BOX, b=spaces.Discrete(2)), r"Make one with .*TransformAction\(env, function, box"),
        (BOX, spaces.Box(-1, 1, (0,)), "no entries"),
        (BOX, spaces.Box(-3e38, 3e38, (1,), np.float32), "unbounded"),
        (BOX, UNBOUNDED, r"unbounded.*ClipAction.*TransformAction.*Box\(-1, 1, \(2,\)\)"),
        (BOX, spaces.Box(np.zeros(2, np.float32), np.array([1, np.inf], np.float32)), "unbounded"),
        (
            BOX,
            spaces.Box(np.zeros(2), np.array([1.0, 0.0]), dtype=np.float64),
            r"entries \[1\] have low = high.*TransformAction",
        ),
    ],
)
def test_refused_spaces(observation_space, action_space, message):
    with pytest.raises(ValueError, match=f"env: (?s:.*){message}"):
        unsupported.check_spaces(observation_space, action_space)


def test_accepted_spaces():
    unsupported.check_spaces(spaces.Box(-np.inf, np.inf, (2, 3), np.float64), spaces.Box(-2, 5, (2, 2)))
    unsupported.check_spaces(spaces.Box(0, 9, (4,), np.int64), BOX)
    unsupported.check_spaces(spaces.Dict(a=BOX, b=spaces.Box(0, 9, (1,), np.int64)), BOX)


class Draws(gym.Env):
    """Observations are drawn from their space."""

    def __init__(self, observation_space, action_space=BOX):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        space = self.action_space
        assert space.contains(np.asarray(action, space.dtype) if isinstance(space, spaces.Box) else action)
        return self.observation_space.sample(), 0.1, False, False, {}


def last_two(obs):
    return np.concatenate([np.zeros((2, 3), np.float32), *(part[None] for part in obs["a"])])[-2:]


@pytest.mark.parametrize(
    ("env", "remedy", "policy"),
    [
        (Draws(spaces.Discrete(3)), wrappers.FlattenObservation, "MlpPolicy"),
        (Draws(spaces.MultiDiscrete([3, 2])), wrappers.FlattenObservation, "MlpPolicy"),
        (Draws(spaces.MultiBinary(4)), wrappers.FlattenObservation, "MlpPolicy"),
        (Draws(spaces.Dict(a=BOX, b=spaces.Discrete(3))), wrappers.FlattenObservation, "MlpPolicy"),
        (Draws(spaces.Dict(a=spaces.Dict(b=BOX))), wrappers.FlattenObservation, "MlpPolicy"),
        (Draws(spaces.Tuple([BOX, spaces.Discrete(2)])), wrappers.FlattenObservation, "MlpPolicy"),
        (
            Draws(spaces.Dict(a=spaces.Sequence(BOX))),
            lambda env: wrappers.TransformObservation(env, last_two, spaces.Box(-1, 1, (2, 3))),
            "MlpPolicy",
        ),
        (Draws(spaces.Dict(a=BOX, b=IMAGE)), lambda env: wrappers.FilterObservation(env, ["a"]), "MultiInputPolicy"),
        (
            Draws(BOX, UNBOUNDED),
            lambda env: wrappers.TransformAction(env, lambda action: action, spaces.Box(-1, 1, (2,))),
            "MlpPolicy",
        ),
        (wrappers.ClipAction(Draws(BOX)), lambda env: env.env, "MlpPolicy"),
        (
            Draws(BOX, spaces.Dict(a=BOX, b=spaces.Tuple([spaces.Box(0, 2, (2,))]))),
            lambda env: wrappers.TransformAction(
                env,
                lambda action, space=env.action_space: spaces.unflatten(space, action),  # type: ignore[misc]
                spaces.flatten_space(env.action_space),
            ),
            "MlpPolicy",
        ),
        (
            Draws(BOX, spaces.Box(np.array([0, 2]), np.array([1, 2]), dtype=np.float64)),
            lambda env: wrappers.TransformAction(env, lambda action: np.append(action, 2.0), spaces.Box(0, 1, (1,))),
            "MlpPolicy",
        ),
        (
            Draws(BOX, spaces.Box(-2, 3, ())),
            lambda env: wrappers.TransformAction(env, lambda action: action[0], spaces.Box(-2.0, 3.0, (1,))),
            "MlpPolicy",
        ),
        (Draws(spaces.Box(-1, 1, ())), wrappers.FlattenObservation, "MlpPolicy"),
        (Draws(spaces.Text(5)), wrappers.FlattenObservation, "MlpPolicy"),
        (gym.make_vec("Pendulum-v1", num_envs=2), lambda env: make_vec_env("Pendulum-v1", 2), "MlpPolicy"),
    ],
    ids=lambda part: "" if isinstance(part, type) else str(getattr(part, "observation_space", ""))[:30],
)
def test_remedies_work(env, remedy, policy):
    """Of each refusal, the way that its message names."""
    with pytest.raises(ValueError, match=r"^env") as refused:
        MBPO(policy, env)
    names = (
        "FlattenObservation",
        "TransformObservation",
        "FilterObservation",
        "TransformAction",
        "ClipAction",
        "make_vec_env",
    )
    assert any(name in str(refused.value) for name in names)
    agent = MBPO(policy, remedy(env), **FAST).learn(30)
    assert len(agent.replay_buffer.model_buffer) > 0


def test_a_policy_for_dicts_without_dicts():
    with pytest.raises(ValueError, match=r"policy='MultiInputPolicy' is for Dict observations, not Box.*Pass 'MlpPolicy'"):
        MBPO("MultiInputPolicy", "Pendulum-v1")


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vectorised_envs_of_gymnasium_are_refused(mode):
    """They reset in ways of their own, and SB3 does not take them either."""
    env = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
    with pytest.raises(ValueError, match=r"vectorized env of Gymnasium, .*make_vec_env"):
        unsupported.check_env(env)
