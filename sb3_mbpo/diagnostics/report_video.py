"""A real episode and the imagined one from the same start and actions, side by side."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Maximum number of frames, and their height in pixels. They limit the size of the embedded video.
MOST_FRAMES, HEIGHT = 120, 240
# Number of real steps that a reconstruction is tested on.
TRIED_STEPS = 20

# Maps an observation to the simulator's state: two arrays for MuJoCo (qpos, qvel), one for other envs.
Reading = Callable[[np.ndarray], tuple[np.ndarray, ...]]


class CannotShow(Exception):
    """There is no video. The message is the reason, as the end of a sentence."""


def _joints(obs: np.ndarray, hidden: int, nq: int, nv: int) -> tuple[np.ndarray, ...]:
    """Positions, except the first ``hidden``, then velocities."""
    return np.concatenate([np.zeros(hidden), obs[: nq - hidden]]), obs[nq - hidden : nq - hidden + nv]


def _double_pendulum(obs: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.concatenate([obs[:1], np.arctan2(obs[1:3], obs[3:5])]), obs[5:8]


def _pendulum(obs: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.array([np.arctan2(obs[1], obs[0]), obs[2]]),)


def _state(obs: np.ndarray) -> tuple[np.ndarray, ...]:
    return (obs,)


def _candidates(env: Any) -> list[tuple[Reading, int]]:
    """:return: possible readings, and the number of leading positions that are hidden in each"""
    if hasattr(env, "set_state") and hasattr(env, "model"):
        size = {"nq": env.model.nq, "nv": env.model.nv}
        return [*((partial(_joints, hidden=n, **size), n) for n in (0, 1, 2)), (_double_pendulum, 0)]
    return [(_pendulum, 0), (_state, 0)] if hasattr(env, "state") else []


def _truth(env: Any) -> tuple[np.ndarray, ...]:
    return (env.data.qpos.copy(), env.data.qvel.copy()) if hasattr(env, "set_state") else (np.array(env.state, dtype=float),)


def find_reading(env: gym.Env) -> tuple[Reading, int]:
    """
    Find out how observations of this env contain the simulator's state, by testing common readings on real steps.

    :param env: an env with Gymnasium's API; it is reset and stepped
    :return: the reading, and the number of leading positions that are hidden in observations
    :raises CannotShow: no reading is correct
    """
    inner: Any = env.unwrapped
    env.action_space.seed(0)
    obs, seen = env.reset(seed=0)[0], []
    # Some envs have no state before the first reset.
    candidates = _candidates(inner) if isinstance(env.observation_space, gym.spaces.Box) else []
    for _ in range(TRIED_STEPS if candidates else 0):
        seen.append((np.asarray(obs, dtype=float).ravel(), _truth(inner)))
        # Small actions, because Hopper clips observed velocities to 10.
        obs, _, terminated, truncated, _ = env.step(0.1 * env.action_space.sample())
        if terminated or truncated:
            obs = env.reset()[0]
    for read, hidden in candidates:
        if all(_fits(read, hidden, obs, truth) for obs, truth in seen):
            return read, hidden
    raise CannotShow("the simulator's state cannot be computed from an observation")


def _fits(read: Reading, hidden: int, obs: np.ndarray, truth: tuple[np.ndarray, ...]) -> bool:
    try:
        found, real = (np.concatenate([parts[0][hidden:], *parts[1:]]) for parts in (read(obs), truth))
    except (IndexError, ValueError):
        return False
    if found.shape != real.shape:
        return False
    # Angles may differ by full turns.
    apart = np.abs(found - real)
    return bool(np.minimum(apart, np.abs(apart - 2 * np.pi * np.round(apart / (2 * np.pi)))).max() < 1e-3)


def frames(env: gym.Env, trajectory: np.ndarray, every: int) -> Iterator[np.ndarray]:
    """
    Render a trajectory. Hidden positions are integrated from the velocities.

    :param env: an env that renders ``rgb_array``
    :param trajectory: observations ``(T, obs_dim)``
    :param every: render one of this many observations
    :raises CannotShow: see :func:`find_reading`
    """
    inner: Any = env.unwrapped
    read, hidden = find_reading(env)
    env.reset(seed=0)
    start = _truth(inner)[0][:hidden]
    for t, obs in enumerate(trajectory):
        position, *velocity = read(obs)
        if velocity:
            position[:hidden] = start
            start = start + inner.dt * velocity[0][:hidden]
        if t % every == 0:
            if velocity:
                inner.set_state(position, velocity[0])
            else:
                inner.state = position
                # Pendulum draws its last action.
                inner.last_u = None
            yield np.asarray(env.render())


def beside(real: np.ndarray, imagined: np.ndarray | None, caption: str) -> Image.Image:
    """:return: two pictures ``(height, width, 3)`` side by side; ``None``: the trajectory was not finite from here on"""
    width = round(HEIGHT * real.shape[1] / real.shape[0])
    sheet = Image.new("RGB", (2 * width + 4, HEIGHT + 22), "#f4f4f4")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    texts = f"real, {caption}", "imagined" if imagined is not None else "imagined: not finite"
    for left, picture, text in zip((0, width + 4), (real, imagined), texts, strict=True):
        if picture is not None:
            sheet.paste(Image.fromarray(picture).resize((width, HEIGHT)), (left, 0))
        draw.text((left + 6, HEIGHT + 3), text, fill="black", font=font)
    return sheet


def video(make: Callable[..., gym.Env], real: np.ndarray, imagined: np.ndarray) -> bytes:
    """
    Make a video of a real and an imagined episode.

    :param make: function that makes an env; ``render_mode`` is passed to it
    :param real: real observations ``(T, obs_dim)``
    :param imagined: imagined observations ``(T, obs_dim)``
    :return: an animated WebP
    :raises CannotShow: the env or this machine cannot render
    """
    if "rgb_array" not in make().metadata.get("render_modes", []):
        raise CannotShow("the env does not render pictures")
    every = -(-len(real) // MOST_FRAMES)
    finite = np.isfinite(imagined).all(axis=1)
    try:
        env = make(render_mode="rgb_array")
        left = list(frames(env, real, every))
        right: list[Any] = list(frames(env, imagined[np.logical_and.accumulate(finite)], every))
        seconds = getattr(env.unwrapped, "dt", 1 / env.metadata.get("render_fps", 30))
        env.close()
    except CannotShow:
        raise
    except Exception as error:  # drivers, missing displays and simulators raise many kinds of exceptions
        hint = "without a display, MUJOCO_GL=egl may help"
        raise CannotShow(f"rendering fails here ({type(error).__name__}: {error}); {hint}") from error
    right += [None] * (len(left) - len(right))
    sheets = [beside(a, b, f"step {every * i}") for i, (a, b) in enumerate(zip(left, right, strict=True))]
    file = io.BytesIO()
    duration = max(round(1000 * every * seconds), 20)
    sheets[0].save(file, "WEBP", save_all=True, append_images=sheets[1:], duration=duration, loop=0, quality=40)
    return file.getvalue()
