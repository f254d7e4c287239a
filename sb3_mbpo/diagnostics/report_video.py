"""A real episode and the imagined one from the same start and actions, side by side."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Frames, and their height in pixels: as many as are worth looking at and embedding.
MOST_FRAMES, HEIGHT = 120, 240
# Real steps that a reconstruction is tried on.
TRIED_STEPS = 20

# The simulator's state from an observation. Two arrays for MuJoCo (qpos, qvel), one for the others.
Reading = Callable[[np.ndarray], tuple[np.ndarray, ...]]


class CannotShow(Exception):
    """There is no video, and why: the end of a sentence."""


def _plain(hidden: int, nq: int, nv: int) -> Reading:
    """Observations that begin with the positions but the first ``hidden``, then the velocities."""

    def read(obs: np.ndarray) -> tuple[np.ndarray, ...]:
        qpos, qvel = obs[: nq - hidden], obs[nq - hidden : nq - hidden + nv]
        return np.concatenate([np.zeros(hidden), qpos]), qvel

    return read


def _double_pendulum(obs: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.concatenate([obs[:1], np.arctan2(obs[1:3], obs[3:5])]), obs[5:8]


def _pendulum(obs: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.array([np.arctan2(obs[1], obs[0]), obs[2]]),)


def _state(obs: np.ndarray) -> tuple[np.ndarray, ...]:
    return (obs,)


def _candidates(env: Any) -> list[tuple[Reading, int]]:
    """:return: readings that may fit, and how many leading positions each hides"""
    if hasattr(env, "set_state") and hasattr(env, "model"):
        nq, nv = env.model.nq, env.model.nv
        return [*((_plain(hidden, nq, nv), hidden) for hidden in (0, 1, 2)), (_double_pendulum, 0)]
    return [(_pendulum, 0), (_state, 0)] if hasattr(env, "state") else []


def _truth(env: Any) -> tuple[np.ndarray, ...]:
    return (env.data.qpos.copy(), env.data.qvel.copy()) if hasattr(env, "set_state") else (np.array(env.state, dtype=float),)


def find_reading(env: gym.Env) -> tuple[Reading, int]:
    """
    How this env's observations show its simulator's state, found by trying on real steps what is common.

    :param env: with Gymnasium's API; it is reset and stepped
    :return: the reading, and the number of leading positions that observations hide
    :raises CannotShow: none fits
    """
    inner: Any = env.unwrapped
    env.action_space.seed(0)
    obs, seen = env.reset(seed=0)[0], []
    # Some have no state before they are reset.
    candidates = _candidates(inner)
    for _ in range(TRIED_STEPS if candidates else 0):
        seen.append((np.asarray(obs, dtype=float).ravel(), _truth(inner)))
        # Small actions: Hopper shows velocities cut at 10.
        obs, _, terminated, truncated, _ = env.step(0.1 * env.action_space.sample())
        if terminated or truncated:
            obs = env.reset()[0]
    for read, hidden in candidates:
        if all(_fits(read, hidden, obs, truth) for obs, truth in seen):
            return read, hidden
    raise CannotShow("the simulator's state cannot be told from an observation")


def _fits(read: Reading, hidden: int, obs: np.ndarray, truth: tuple[np.ndarray, ...]) -> bool:
    try:
        position, *velocity = read(obs)
    except (IndexError, ValueError):
        return False
    found, real = (np.concatenate([parts[0][hidden:], *parts[1:]]) for parts in ((position, *velocity), truth))
    if found.shape != real.shape:
        return False
    # An angle may be any number of turns away.
    apart = np.abs(found - real)
    return bool(np.minimum(apart, np.abs(apart - 2 * np.pi * np.round(apart / (2 * np.pi)))).max() < 1e-3)


def frames(env: gym.Env, trajectory: np.ndarray, every: int) -> Iterator[np.ndarray]:
    """
    Pictures of a trajectory; hidden positions follow from the velocities.

    :param env: renders ``rgb_array``
    :param trajectory: observations ``(T, obs_dim)``
    :param every: of so many, one is drawn
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
            if hasattr(inner, "last_u"):
                inner.last_u = None
            yield np.asarray(env.render())


def beside(real: np.ndarray, imagined: np.ndarray | None, caption: str) -> Image.Image:
    """
    :param real: picture ``(height, width, 3)``
    :param imagined: ``None``: it has ended
    :param caption: a few words below
    """
    pictures = [Image.fromarray(one) if one is not None else None for one in (real, imagined)]
    width = round(HEIGHT * real.shape[1] / real.shape[0])
    sheet = Image.new("RGB", (2 * width + 4, HEIGHT + 22), "#f4f4f4")
    for i, one in enumerate(pictures):
        if one is not None:
            sheet.paste(one.resize((width, HEIGHT)), (i * (width + 4), 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((6, HEIGHT + 3), f"real, {caption}", fill="black", font=font)
    draw.text(
        (width + 10, HEIGHT + 3), "imagined" if imagined is not None else "imagined: not finite", fill="black", font=font
    )
    return sheet


def video(make: Callable[..., gym.Env], real: np.ndarray, imagined: np.ndarray) -> bytes:
    """
    :param make: an env of the kind; ``render_mode`` may be passed to it
    :param real: observations ``(T, obs_dim)``
    :param imagined: the same
    :return: an animated WebP
    :raises CannotShow: no rendering here, or of this env
    """
    if "rgb_array" not in make().metadata.get("render_modes", []):
        raise CannotShow("the env does not render pictures")
    every = -(-len(real) // MOST_FRAMES)
    n_finite = len(imagined) if np.isfinite(imagined).all() else int(np.isfinite(imagined).all(axis=1).argmin())
    try:
        env = make(render_mode="rgb_array")
        left, right = list(frames(env, real, every)), list(frames(env, imagined[:n_finite], every))
        seconds = getattr(env.unwrapped, "dt", 1 / env.metadata.get("render_fps", 30))
        env.close()
    except CannotShow:
        raise
    except Exception as error:  # whatever a driver, a missing display or a simulator may raise
        hint = "without a display, MUJOCO_GL=egl may help"
        raise CannotShow(f"rendering fails here ({type(error).__name__}: {error}); {hint}") from error
    right += [None] * (len(left) - len(right))  # type: ignore[list-item]
    sheets = [beside(a, b, f"step {every * i}") for i, (a, b) in enumerate(zip(left, right, strict=True))]
    file = io.BytesIO()
    duration = max(round(1000 * every * seconds), 20)
    sheets[0].save(file, "WEBP", save_all=True, append_images=sheets[1:], duration=duration, loop=0, quality=40)
    return file.getvalue()
