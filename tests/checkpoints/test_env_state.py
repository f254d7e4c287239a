import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from reach import reach
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnvWrapper, VecFrameStack, VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.checkpoints.env_state import (
    CannotRestoreError,
    RestorableEnv,
    put_envs,
    put_statistics,
    take_envs,
    take_statistics,
)
from sb3_mbpo.checkpoints.training_state import put_training, take_training

ids = pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5", "Ant-v5", "Humanoid-v5"])


def go_on_alike(make, n_envs=2, before=37, after=400):
    """Take the state of one env after some steps, put it into another, and step both: the same to the last bit."""
    first, second = make(1), make(2)
    rng = np.random.default_rng(0)
    low, high = np.clip(first.action_space.low, -5, 5), np.clip(first.action_space.high, -5, 5)
    actions = rng.uniform(low, high, size=(before + after, n_envs, *low.shape)).astype(np.float32)
    first.reset()
    for action in actions[:before]:
        first.step(action)
    tensors = {}
    state = json.loads(json.dumps(take_envs(first, tensors, "envs"), allow_nan=False))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second.reset()
    put_envs(second, state, tensors)
    ends = 0
    for action in actions[before:]:
        (*ours, our_infos), (*theirs, their_infos) = first.step(action), second.step(action)
        np.testing.assert_equal(ours, theirs)
        for a, b in zip(our_infos, their_infos, strict=True):
            assert [a.get("episode", {}).get(key) for key in "rl"] == [b.get("episode", {}).get(key) for key in "rl"]
            assert a["TimeLimit.truncated"] == b["TimeLimit.truncated"]
            ends += "episode" in a
    first.close(), second.close()
    return ends


@ids
def test_they_go_on_to_the_last_bit(env_id):
    if env_id.startswith("Mountain"):
        assert go_on_alike(lambda seed: make_vec_env(env_id, 2, seed=seed), after=1000) == 2
    else:
        # Episodes end, by falling or by time, and the next ones begin alike.
        assert go_on_alike(lambda seed: make_vec_env(env_id, 2, seed=seed), after=1000 if env_id == "Ant-v5" else 400) >= 2


@pytest.mark.parametrize(
    "wrap", [VecNormalize, lambda env: VecFrameStack(env, 3), lambda env: VecFrameStack(VecNormalize(env), 2)]
)
@pytest.mark.parametrize("env_id", ["Pendulum-v1", reach])
def test_wrappers_of_vectorised_envs(wrap, env_id):
    assert go_on_alike(lambda seed: wrap(make_vec_env(env_id, 2, seed=seed))) >= 2


MUJOCO = [
    *(
        "HalfCheetah",
        "HumanoidStandup",
        "InvertedDoublePendulum",
        "InvertedPendulum",
        "Pusher",
        "Reacher",
        "Swimmer",
        "Walker2d",
    ),
]


@pytest.mark.parametrize("env_id", [f"{task}-v5" for task in MUJOCO] + ["Reacher-v4", "Ant-v4", "Humanoid-v4"])
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_all_of_gymnasiums_mujoco(env_id):
    go_on_alike(lambda seed: make_vec_env(env_id, 2, seed=seed), after=60)


STOCK = {
    "transform_reward": lambda env: gym.wrappers.TransformReward(env, lambda reward: 0.1 * float(reward)),
    "transform_observation": lambda env: gym.wrappers.TransformObservation(env, lambda obs: 2 * obs, env.observation_space),
    "transform_action": lambda env: gym.wrappers.TransformAction(env, lambda action: -action, env.action_space),
    "clip_and_rescale": lambda env: gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))),
    "clip_reward": lambda env: gym.wrappers.ClipReward(env, -1, 1),
    "normalize_observation": gym.wrappers.NormalizeObservation,
    "normalize_reward": gym.wrappers.NormalizeReward,
    "time_aware": gym.wrappers.TimeAwareObservation,
    "delay": lambda env: gym.wrappers.DelayObservation(env, 3),
    "frames": lambda env: gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, 3)),
    "sticky": lambda env: gym.wrappers.StickyAction(env, 0.5),
    "statistics": lambda env: gym.wrappers.RecordEpisodeStatistics(env, 5, "more"),
}


@pytest.mark.parametrize("wrap", STOCK.values(), ids=STOCK)
def test_stock_wrappers(wrap):
    assert go_on_alike(lambda seed: make_vec_env("Pendulum-v1", 2, seed=seed, wrapper_class=wrap), after=210) >= 2


def test_the_zoos_wrappers():
    from rl_zoo3 import wrappers
    from sb3_contrib.common.wrappers import TimeFeatureWrapper

    def wrap(env):
        env = TimeFeatureWrapper(wrappers.DelayedRewardWrapper(wrappers.ActionSmoothingWrapper(env), 7))
        return wrappers.HistoryWrapper(wrappers.FrameSkip(env, 2), 2)

    assert go_on_alike(lambda seed: make_vec_env("Pendulum-v1", 2, seed=seed, wrapper_class=wrap), after=210) >= 2


def into(first, second):
    """The state of one env put into another."""
    tensors = {}
    state = json.loads(json.dumps(take_envs(first, tensors, "envs"), allow_nan=False))
    second.reset()
    put_envs(second, state, {name: tensor.clone() for name, tensor in tensors.items()})


def test_arguments_are_those_of_now():
    """Whatever the envs of the checkpoint were made with."""

    def make(g, gamma, steps, factor, **kwargs):
        def wrap(env):
            return gym.wrappers.TimeLimit(gym.wrappers.TransformReward(env, lambda reward: factor * reward), steps)

        env = make_vec_env("Pendulum-v1", 1, seed=0, wrapper_class=wrap, env_kwargs={"g": g}, monitor_kwargs=kwargs)
        return VecNormalize(env, gamma=gamma, norm_obs=factor < 1)

    first = make(10.0, 0.9, 50, 0.1, info_keywords=())
    second = make(5.0, 0.8, 30, 10, info_keywords=("a",))
    first.reset()
    for _ in range(3):
        first.step(np.zeros((1, 1)))
    into(first, second)
    pendulum, limit = second.envs[0].unwrapped, second.envs[0]
    assert pendulum.g == 5 and second.gamma == 0.8 and not second.norm_obs
    assert limit._max_episode_steps == 30 and limit.get_wrapper_attr("info_keywords") == ("a",)
    assert limit.env.func(1) == 10
    # What had changed came back.
    assert np.array_equal(pendulum.state, first.envs[0].unwrapped.state) and limit._elapsed_steps == 3


def test_a_repaired_model_stays_repaired():
    """MuJoCo's constants are made with the env."""
    first, second = make_vec_env("InvertedPendulum-v5", 1, seed=0), make_vec_env("InvertedPendulum-v5", 1, seed=0)
    first.reset()
    second.envs[0].unwrapped.model.opt.gravity[2] = -5
    into(first, second)
    assert second.envs[0].unwrapped.model.opt.gravity[2] == -5


def test_another_model(tmp_path):
    model = (Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "hopper.xml").read_text()
    more = '<body><joint type="slide" range="0 1"/><geom size="0.1"/></body></worldbody>'
    (tmp_path / "more.xml").write_text(model.replace("</worldbody>", more))
    first = make_vec_env("Hopper-v5", 1)
    second = make_vec_env("Hopper-v5", 1, env_kwargs={"xml_file": str(tmp_path / "more.xml")})
    first.reset()
    with pytest.raises(ValueError, match=r"MuJoCo model has integration of shape"):
        into(first, second)


def test_before_the_first_reset():
    """A seed that waits for the first reset is not applied twice."""
    first, second = make_vec_env("Pendulum-v1", 2, seed=1), make_vec_env("Pendulum-v1", 2, seed=1)
    first.reset()
    tensors = {}
    state = take_envs(first, tensors, "envs")
    put_envs(second, state, tensors)
    assert np.array_equal(first.reset(), second.reset())


class Fickle(gym.Wrapper):
    """Holds something that cannot be taken out."""

    def __init__(self, env):
        super().__init__(env)
        self.secret = iter(range(10))


class OwnState(gym.Env):
    """Knows best how to save itself, and has what nobody else could save."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.position, self.handle = 0.0, iter(())

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform()
        return self._obs(), {}

    def step(self, action):
        self.position = 0.9 * self.position + float(action[0]) + self.np_random.normal()
        return self._obs(), -self.position, False, False, {}

    def _obs(self):
        return np.clip(np.array([self.position], dtype=np.float32), -9, 9)


def test_an_env_with_a_state_of_its_own():
    def make(seed):
        return make_vec_env(lambda: gym.wrappers.TimeLimit(OwnState(), 50), 2, seed=seed)

    # Noise and time limit are taken as well, which the env says nothing about.
    assert go_on_alike(make) >= 2


class Draws(gym.Wrapper):
    """Its rewards are drawn from a space, which no reset seeds."""

    def __init__(self, env):
        super().__init__(env)
        self.prizes = gym.spaces.Box(0, 1, ())

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs, float(self.prizes.sample()), *rest

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def test_spaces_of_an_env_go_on():
    go_on_alike(lambda seed: make_vec_env("Pendulum-v1", 2, seed=seed, wrapper_class=Draws), after=20)


class Shared(OwnState):
    """A helper draws from the env's own generator."""

    def reset(self, seed=None, options=None):
        if seed is not None or not hasattr(self, "helper"):
            obs, info = super().reset(seed=seed)
            self.helper = self.np_random.normal
            return obs, info
        return super().reset()

    def step(self, action):
        self.position += self.helper()
        return super().step(action)


def test_a_generator_is_put_back_in_its_place():
    def make(seed):
        return make_vec_env(lambda: gym.wrappers.TimeLimit(Shared(), 50), 2, seed=seed)

    assert go_on_alike(make) >= 2


class Broken(OwnState):
    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def get_state(self):
        if self.fails == "get_state":
            raise RuntimeError("no contact")
        return {"position": iter(())} if self.fails == "plain" else super().get_state()

    def set_state(self, state):
        raise RuntimeError("no contact")


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("get_state", r"Broken\.get_state\(\) raised RuntimeError: no contact"),
        ("set_state", r"Broken\.set_state\(\) raised RuntimeError: no contact"),
        ("plain", r"Broken contains what cannot be saved: .*position is a builtins.tuple_iterator"),
    ],
)
@pytest.mark.parametrize("wrap", [None, RestorableEnv])
def test_methods_of_an_env_that_fail(fails, message, wrap):
    first, second = (make_vec_env(lambda: Broken(fails), 1, wrapper_class=wrap) for _ in range(2))
    first.reset()
    with pytest.raises(CannotRestoreError, match=message):
        into(first, second)


class Closure(gym.Env):
    """Nobody could know all that it holds: two names for one array, one of two parts, a state in a closure."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.array = self.alias = np.zeros(1)
        self.parts = [np.zeros(1), np.ones(1)]
        self.part = self.parts[1]
        count = [0]
        self.next = lambda: count.append(1)


class Renamed(PendulumEnv):
    """More than its parent, perhaps."""


@pytest.mark.parametrize("kind", [Closure, Renamed])
def test_an_unknown_env_is_not_guessed(kind):
    env = make_vec_env(kind, 1)
    with pytest.raises(CannotRestoreError, match=rf"^{kind.__name__} is not among those.*get_state\(\) and set_state"):
        take_envs(env, {}, "envs")


class NoStatistics(VecEnvWrapper):
    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def test_statistics_by_themselves():
    """Of the wrappers that are known, whatever is around or inside them."""
    first, second = (NoStatistics(VecNormalize(make_vec_env(Closure, 1))) for _ in range(2))
    first.venv.obs_rms.mean = np.full(1, 3.0)
    tensors = {}
    state = take_statistics(first, tensors, "wrappers")
    put_statistics(second, state, tensors)
    assert state[0] is None and second.venv.obs_rms.mean == 3


class OwnNormalize(VecNormalize):
    """The statistics are those of the base class."""


class LostState(OwnNormalize):
    def get_state(self):
        raise KeyError("mine")

    set_state = get_state


@pytest.mark.parametrize("kind", [OwnNormalize, LostState])
def test_statistics_of_a_subclass(kind):
    first, second = (kind(make_vec_env("Pendulum-v1", 1), clip_obs=clip) for clip in (3, 7))
    first.obs_rms.mean, first.ret_rms.var = np.full(3, 3.0), np.float64(5)
    tensors = {}
    state = json.loads(json.dumps(take_statistics(first, tensors, "wrappers")))
    assert put_statistics(second, state, tensors) == []
    assert np.array_equal(second.obs_rms.mean, first.obs_rms.mean) and second.ret_rms.var == 5 and second.clip_obs == 7
    with pytest.raises(CannotRestoreError, match=kind.__name__):
        take_envs(first, {}, "envs")


class Refuses(NoStatistics):
    def get_state(self):
        return {}

    def set_state(self, state):
        raise KeyError("mine")


def test_a_wrapper_that_refuses_its_state():
    """The run goes on at the start of an episode, with all else."""
    first, second = (
        MBPO("MlpPolicy", Refuses(VecNormalize(make_vec_env("Pendulum-v1", 1))), **FAST).learn(n) for n in (12, 5)
    )
    tensors = {}
    state = json.loads(json.dumps(take_training(first, [], tensors)))
    reason = "Refuses.set_state() raised KeyError: 'mine'"
    lost = put_training(second, [], state, tensors)
    assert lost.startswith("The run goes on at the start of an episode") and lost.count(reason) == 1
    assert second.num_timesteps == 12 and second.env.venv.obs_rms.count == pytest.approx(first.env.venv.obs_rms.count + 1)
    # It is said as well where the envs were lost for another reason.
    lost = put_training(second, [], state | {"envs": None, "envs_lost": "no envs"}, tensors)
    assert lost.endswith(f"no envs; {reason}")


@pytest.mark.expensive
def test_a_wrapper_outside_of_ours():
    """Its state would be lost without a word."""
    env = SubprocVecEnv([lambda: gym.wrappers.TimeLimit(RestorableEnv(gym.make("Pendulum-v1")), 9)] * 2)
    with pytest.raises(CannotRestoreError, match="as the outermost wrapper of each"):
        take_envs(env, {}, "envs")
    env.close()


@pytest.mark.expensive
def test_noise_of_the_global_generator_in_other_processes():
    from rl_zoo3.wrappers import ActionNoiseWrapper

    def wrap(env):
        return RestorableEnv(ActionNoiseWrapper(env))

    assert (
        go_on_alike(lambda seed: make_vec_env("Pendulum-v1", 2, seed=seed, vec_env_cls=SubprocVecEnv, wrapper_class=wrap)) >= 2
    )


@pytest.mark.expensive
def test_other_processes():
    def make(seed):
        return make_vec_env("Hopper-v5", 2, seed=seed, vec_env_cls=SubprocVecEnv, wrapper_class=RestorableEnv)

    assert go_on_alike(make) >= 2


@pytest.mark.expensive
def test_other_processes_without_help():
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv)
    with pytest.raises(CannotRestoreError, match=r"SubprocVecEnv.*RestorableEnv"):
        take_envs(env, {}, "envs")
    env.close()


@pytest.mark.expensive
def test_processes_that_have_ended():
    """As by a signal to all of a group."""
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv, wrapper_class=RestorableEnv)
    env.reset()
    for process in env.processes:
        process.terminate()
        process.join()
    for _ in range(2):
        with pytest.raises(CannotRestoreError, match="their processes have ended"):
            take_envs(env, {}, "envs")


def test_what_cannot_be_taken_is_named():
    env = make_vec_env("Pendulum-v1", 1, wrapper_class=Fickle)
    with pytest.raises(CannotRestoreError, match=r"^Fickle is not among those"):
        take_envs(env, {}, "envs")


def test_another_number_of_wrappers():
    first, second = make_vec_env("Pendulum-v1", 1), make_vec_env("Pendulum-v1", 1, wrapper_class=gym.wrappers.ClipAction)
    tensors = {}
    state = take_envs(first, tensors, "envs")
    with pytest.raises(ValueError, match=r"has 5 wrappers.*has 6"):
        put_envs(second, state, tensors)
