"""
A report on the accuracy of an agent's dynamics, measured on new episodes, as a single HTML file.

    python -m sb3_mbpo report agent.zip --env Hopper-v5 --earlier agent_10000_steps.zip agent_20000_steps.zip

The agents of --earlier are checkpoints of the same run. They are needed to measure the policy shift and k*.
"""

import argparse
import ast
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

try:
    from sb3_mbpo.diagnostics.report_page import Findings, write_page
    from sb3_mbpo.diagnostics.report_video import CannotShow, video
except ModuleNotFoundError as error:
    if (error.name or "").startswith("sb3_mbpo"):
        raise
    MISSING = f'sb3_mbpo report needs {error.name}: in the checkout of sb3_mbpo, pip install ".[plots]"'
    raise (SystemExit if __name__ == "__main__" else ImportError)(MISSING) from None

from sb3_mbpo import dhmbpo, mbpo, variants
from sb3_mbpo.compare.html import counted
from sb3_mbpo.diagnostics.diagnosis import diagnose
from sb3_mbpo.diagnostics.metrics import N_SAMPLES
from sb3_mbpo.diagnostics.open_loop import (
    another,
    imagined_returns,
    on_policy_episodes,
    open_loop,
    own_env,
    segments,
    untouched,
)
from sb3_mbpo.diagnostics.policy_shift import policy_shift, snapshot
from sb3_mbpo.runtime.provenance import hardware, versions
from sb3_mbpo.saving.safe_files import read_bytes, read_json, read_members
from sb3_mbpo.saving.safe_loading import MEMBER
from sb3_mbpo.validation.rules import did_you_mean

ALGORITHMS = ("MBPO", "DHMBPO", "MBTD3", "MBTQC", "MBCrossQ")
# Maximum number of steps in the video.
MOST_FILMED = 300


@dataclass(frozen=True)
class Report:
    """
    A report that was written. It can be used as a path: ``open(report)``. A notebook shows the page.

    :param path: the HTML file
    :param findings: the numbers on the page
    """

    path: Path
    findings: Findings = field(repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        # The page itself, because many notebooks cannot load a file by its path.
        page = escape(self.path.read_text(encoding="utf-8"))
        return (
            f'<iframe srcdoc="{page}" title="{escape(self.path.name)}" style="border: 0; width: 100%; height: 40rem"></iframe>'
        )


def load_agent(path: Path, env: VecEnv | gym.Env, safe: bool) -> Any:
    """
    Load an agent of any algorithm of this package.

    :param path: a file written by ``save``
    :param env: an env with the agent's spaces
    :param safe: see ``load``
    :return: the agent
    :raises ValueError: the file does not exist, is not an agent, or is an agent of another env; the message is one sentence
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        members = read_members(read_bytes(path, "zip"))
    except ValueError as error:
        raise ValueError(f"{path} is not an agent of sb3_mbpo: {error}") from error
    if "dynamics.pth" not in members:
        raise ValueError(f"{path} contains no dynamics: it was not saved by an algorithm of sb3_mbpo")
    name = read_json(members[MEMBER])["class"] if MEMBER in members else "MBPO"
    if name not in ALGORITHMS:
        raise ValueError(f"{path} is an agent of {name!r}, not of {', '.join(ALGORITHMS)}; call write_report with it instead")
    agent_class = getattr({"MBPO": mbpo, "DHMBPO": dhmbpo}.get(name, variants), name)
    try:
        return agent_class.load(path, env, safe=safe, buffer_size=1, verbose=0)
    except ValueError as error:
        if "spaces do not match" in str(error):
            raise ValueError(f"{path} was trained in another env: {error}") from error
        raise


def env_arguments(items: Sequence[str]) -> dict[str, Any]:
    """
    Parse ``--env-kwargs``.

    :param items: ``KEY:VALUE`` each, with a Python literal as value, as for the Zoo
    :return: keyword arguments
    :raises ValueError: an item has another form
    """
    found = {}
    for item in items:
        key, _, value = item.partition(":")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"--env-kwargs {item}: write KEY:VALUE, and a string as KEY:\"'text'\"") from None
    return found


def make_env(make: Callable[[], gym.Env], name: str, statistics: Path | None) -> VecEnv:
    """
    Make the env of the report.

    :param make: function that makes the env
    :param name: id of the env, for errors
    :param statistics: pickle of a VecNormalize, written by its ``save`` or by the Zoo
    :return: a VecEnv with one env
    :raises ValueError: the env or the file does not exist, or the env does not take the arguments
    """
    try:
        env: VecEnv = DummyVecEnv([make])
    except TypeError as error:
        raise ValueError(f"--env {name} cannot be made with these --env-kwargs: {error}") from error
    except gym.error.Error as error:
        raise ValueError(f"--env {name}: {str(error).splitlines()[0]}{did_you_mean(name, gym.registry)}") from error
    if statistics is None:
        return env
    if not statistics.is_file():
        raise ValueError(f"there is no file {statistics}")
    env = VecNormalize.load(str(statistics), env)
    env.training = False
    return env


def episode_video(agent: Any, env: VecEnv, longest: Any) -> bytes | str:
    """
    :param agent: a ModelBased algorithm
    :param env: see :func:`.open_loop.own_env`
    :param longest: a real episode
    :return: a video of this episode and the imagined one, or the reason why there is none
    """
    episode = longest._replace(
        obs=longest.obs[: MOST_FILMED + 1], actions=longest.actions[:MOST_FILMED], rewards=longest.rewards[:MOST_FILMED]
    )
    n_steps = len(episode.rewards)
    piece = segments([episode], n_steps, most=1)
    imagined = open_loop(agent.imagined_dynamics, piece, 1)[0, 0, :, 1:]
    try:
        make = partial(another, env.get_attr("spec")[0])
        return video(make, episode.obs, np.concatenate([episode.obs[:1], imagined]))
    except (CannotShow, ValueError) as error:
        return str(error)


def _about_process() -> dict[str, str]:
    """When, with what and on what the report is written."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "hardware": ", ".join(f"{name}: {value}" for name, value in hardware().items() if value),
    }


def _source(agent: Any) -> str:
    """:return: where the agent's deterministic actions come from, as the end of a sentence; empty: from its policy"""
    if getattr(agent.policy, "deterministic_actor", agent.actor) is agent.actor:
        return ""
    return "; deterministic actions come from an average of the actor's weights (<code>actor_tau</code>)"


def _termination(agent: Any) -> str:
    if isinstance(agent.termination, str):
        return "learned"
    return "known" if agent.termination_fn is None else "given"


def write_report(
    agent: Any,
    path: Path | str,
    *,
    env: Any = None,
    earlier: Sequence[Any] = (),
    n_episodes: int = 5,
    horizon: int = 50,
    max_episode_steps: int = 1000,
    seed: int = 0,
    origin: Sequence[tuple[str, str]] = (),
) -> Report:
    """
    Play new episodes, compare the dynamics with them, and write a report.

    :param agent: a ModelBased algorithm with a fitted dynamics; it is not changed
    :param path: the HTML file to write
    :param env: see :class:`.ModelErrorCallback`
    :param earlier: the same agent at earlier times, to measure the policy shift
    :param n_episodes: number of new episodes
    :param horizon: number of steps of the longer predictions
    :param max_episode_steps: maximum length of an episode
    :param seed: seed of the episodes and of all random draws
    :param origin: additional names and texts for the end of the page
    :return: the report, which a notebook shows
    :raises ValueError: the dynamics has had no good fit, or the env does not match the agent
    """
    if agent.dynamics_fitted_at is None or not agent.dynamics.usable:
        raise ValueError("this agent's dynamics has had no good fit yet: there is nothing to report")
    with untouched(agent):
        env = own_env(agent, env)
        env.seed(seed)
        spec = env.get_attr("spec")[0]
        agent.dynamics.seed(seed)
        # Also the GPU's generator, which the policy uses.
        th.manual_seed(seed)
        diagnosis = diagnose(agent, env, n_episodes, horizon, max_episode_steps)
        first = np.array([episode.obs[0] for episode in diagnosis.episodes])
        # The same seed, so that an env without randomness in its steps has the same first states.
        env.seed(seed)
        deterministic = on_policy_episodes(agent, env, n_episodes, max_episode_steps, deterministic=True)
        limit = min(max_episode_steps, (spec.max_episode_steps if spec else None) or max_episode_steps)
        # A time limit may be missing in the spec.
        limit = max((len(episode.rewards) for episode in diagnosis.episodes if not episode.terminated), default=limit)
        shots = [one for one in map(snapshot, earlier) if one is not None]
        findings = Findings(
            diagnosis,
            imagined_returns=imagined_returns(agent, first, N_SAMPLES, limit),
            deterministic_returns=[float(episode.rewards.sum()) for episode in deterministic],
            deterministic_source=_source(agent),
            explained=agent.explained_at_fit or [np.nan, np.nan],
            termination=_termination(agent),
            rollout_length=getattr(agent, "training_horizon", agent.rollout_length),
            theorem=agent.imagined_rewards_count,
            gamma=agent.gamma,
            shifts=[policy_shift(agent, [shot], diagnosis.steps.starts) for shot in shots],
            video=episode_video(agent, env, max(diagnosis.episodes, key=lambda episode: len(episode.rewards))),
        )
    about = {
        "agent": f"{type(agent).__name__} after {agent.lifetime_timesteps:,} steps",
        "dynamics": f"{type(agent.dynamics).__name__}, fitted after {agent.dynamics_fitted_at:,} steps",
        "env": str(spec.id if spec else env.get_attr("__class__")[0].__name__),
        "data": f"{counted(n_episodes, 'new episode')}, {counted(len(diagnosis.steps.starts), 'step')}, seed {seed}",
        **dict(origin),
        **_about_process(),
    }
    write_page(Path(path), findings, about)
    return Report(Path(path), findings)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "sb3_mbpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report = parser.add_subparsers(dest="command", required=True).add_parser("report", help="write the report")
    report.add_argument("agent", type=Path, help="the saved agent, a zip file")
    report.add_argument("--env", required=True, help="id of the environment")
    report.add_argument("--env-kwargs", nargs="+", default=[], metavar="KEY:VALUE", help="arguments of the env, as in the Zoo")
    report.add_argument("--earlier", type=Path, nargs="+", default=[], help="checkpoints of the same run")
    report.add_argument("--out", type=Path, help="the HTML file (default: next to the agent)")
    report.add_argument("--episodes", type=int, default=5, help="number of new episodes (default: 5)")
    report.add_argument("--horizon", type=int, default=50, help="number of steps of the longer predictions (default: 50)")
    report.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    report.add_argument("--normalize", type=Path, metavar="FILE", help="statistics of VecNormalize, a pickle you trust")
    report.add_argument("--safe", action="store_true", help="load agents without unpickling anything")
    args = parser.parse_args(arguments)
    for name, least in (("episodes", 1), ("horizon", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command.

    :param arguments: ``report`` and its options; ``None``: the command-line arguments of the process
    :raises SystemExit: an argument or a file is invalid; the message is one sentence
    """
    options = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(options)
    out = args.out or args.agent.with_suffix(".html")
    try:
        make = partial(gym.make, args.env, **env_arguments(args.env_kwargs))
        env = make_env(make, args.env, args.normalize)
        agent, *earlier = (load_agent(path, env, args.safe) for path in (args.agent, *args.earlier))
        command = shlex.join(["python", "-m", "sb3_mbpo", *options])
        write_report(
            agent,
            out,
            env=make,
            earlier=earlier,
            n_episodes=args.episodes,
            horizon=args.horizon,
            seed=args.seed,
            origin=[("command", command)],
        )
    except (ValueError, ImportError) as error:
        raise SystemExit(f"sb3_mbpo.diagnostics.report: {error}") from None
    print(out)


if __name__ == "__main__":
    main()
