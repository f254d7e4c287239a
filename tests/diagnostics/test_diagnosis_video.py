"""States read from observations, and films of them."""

import io
import os
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from sb3_mbpo.diagnostics.report_video import HEIGHT, CannotShow, find_reading, frames, video

pytest.importorskip("mujoco")
pytest.importorskip("pygame")


def walked(name: str, n: int = 30, **kwargs):
    env = gym.make(name, **kwargs)
    env.action_space.seed(1)
    obs = [env.reset(seed=1)[0]]
    for _ in range(n):
        next_obs, _, terminated, *_ = env.step(0.3 * env.action_space.sample())
        obs.append(next_obs)
        if terminated:
            break
    return env, np.array(obs, dtype=float)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("InvertedPendulum-v5", 0),
        ("InvertedDoublePendulum-v5", 0),
        ("Hopper-v5", 1),
        ("HalfCheetah-v5", 1),
        ("Walker2d-v5", 1),
        ("Swimmer-v5", 2),
        ("Ant-v5", 2),
        ("Humanoid-v5", 2),
        ("Pendulum-v1", 0),
        ("MountainCarContinuous-v0", 0),
    ],
)
def test_state_from_an_observation(name, hidden):
    """After a state is set from an observation, the env shows that observation."""
    env, obs = walked(name)
    read, found_hidden = find_reading(env)
    assert found_hidden == hidden
    inner = env.unwrapped
    parts = read(obs[-1])
    if len(parts) == 1:
        inner.state = parts[0]
        again = inner._get_obs() if hasattr(inner, "_get_obs") else parts[0]
    else:
        inner.set_state(*parts)
        again = inner._get_obs()
    n = {"Ant-v5": 27, "Humanoid-v5": 45}.get(name, len(again))
    # A constraint's force is no part of the state.
    n = 8 if name == "InvertedDoublePendulum-v5" else n
    np.testing.assert_allclose(np.ravel(again)[:n], obs[-1][:n], atol=1e-3)


class Blind(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("env", [Blind, lambda: gym.make("Reacher-v5")])
def test_states_that_observations_do_not_show(env):
    with pytest.raises(CannotShow, match="the simulator's state cannot be computed from an observation"):
        find_reading(env())


def test_a_hidden_position_follows_from_the_velocity():
    """What is set is where the real simulator was, to first order."""
    env, obs = walked("HalfCheetah-v5", 40)
    end = env.unwrapped.data.qpos[0] - 0.0
    other = gym.make("HalfCheetah-v5")
    seen = []
    other.unwrapped.set_state = lambda qpos, qvel: seen.append(qpos[0])
    other.unwrapped.render = lambda: np.zeros((2, 2, 3), np.uint8)
    other.reset(seed=1)
    list(frames(other.unwrapped, obs, 1))
    # Before come those of `reset`.
    moved = seen[-1] - seen[-41]
    start = walked("HalfCheetah-v5", 0)[0].unwrapped.data.qpos[0]
    assert moved == pytest.approx(end - start, abs=0.05)


def test_film(monkeypatch):
    monkeypatch.setitem(os.environ, "SDL_VIDEODRIVER", "dummy")
    env, obs = walked("Pendulum-v1")
    other = obs.copy()
    other[20:] = np.nan
    film = Image.open(io.BytesIO(video(partial(gym.make, env.spec), obs, other)))
    assert film.format == "WEBP" and film.n_frames == 31 and film.height == HEIGHT + 22
    film.seek(5)
    left, right = np.split(np.asarray(film.convert("RGB"))[:HEIGHT, : 2 * HEIGHT + 4], [HEIGHT + 2], axis=1)
    np.testing.assert_allclose(left[:, :-2].astype(float), right[:, 2:], atol=60)
    film.seek(25)
    assert (np.asarray(film.convert("RGB"))[20:200, HEIGHT + 20 :] > 200).all()


def test_long_films_skip_frames(monkeypatch):
    monkeypatch.setattr("sb3_mbpo.diagnostics.report_video.MOST_FRAMES", 10)
    env, obs = walked("Pendulum-v1")
    assert Image.open(io.BytesIO(video(partial(gym.make, env.spec), obs, obs))).n_frames == 8


def test_rendering_that_fails_is_a_reason(monkeypatch):
    env, obs = walked("Pendulum-v1", 2)
    monkeypatch.setattr(type(env.unwrapped), "render", lambda self: 1 / 0)
    with pytest.raises(CannotShow, match=r"rendering fails here \(ZeroDivisionError: .*MUJOCO_GL=egl may help"):
        video(partial(gym.make, env.spec), obs, obs)
    monkeypatch.setattr(type(env.unwrapped), "metadata", {"render_modes": []})
    with pytest.raises(CannotShow, match="the env does not render pictures"):
        video(partial(gym.make, env.spec), obs, obs)
