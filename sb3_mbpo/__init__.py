"""Model-Based Policy Optimization (Janner et al., 2019) as a Stable-Baselines3 algorithm."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mbpo.buffers.model_buffer import ModelBuffer
from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer
from sb3_mbpo.checkpoints.env_state import RestorableEnv
from sb3_mbpo.checkpoints.resume_callback import ResumeCallback, resume
from sb3_mbpo.dhmbpo import DHMBPO
from sb3_mbpo.diagnostics.callback import ModelErrorCallback
from sb3_mbpo.dynamics.base import DynamicsModel, DynamicsWrapper
from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.model_based.model_based import ModelBased
from sb3_mbpo.model_based.rollout_callback import RolloutCallback
from sb3_mbpo.restarting_env import RestartingEnv
from sb3_mbpo.rollout_schedule import LinearRolloutSchedule
from sb3_mbpo.rollouts import branched_rollout
from sb3_mbpo.terminations.learned import LearnedTermination
from sb3_mbpo.validation.faults import InvalidTransition

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = [
    "DHMBPO",
    "MBPO",
    "MBTD3",
    "DynamicsModel",
    "DynamicsWrapper",
    "InvalidTransition",
    "LearnedTermination",
    "LinearRolloutSchedule",
    "MixedReplayBuffer",
    "ModelBased",
    "ModelBuffer",
    "ModelErrorCallback",
    "ProbabilisticEnsemble",
    "RestartingEnv",
    "RestorableEnv",
    "ResumeCallback",
    "RolloutCallback",
    "branched_rollout",
    "resume",
]


if TYPE_CHECKING:
    from sb3_mbpo.diagnostics.report import write_report as write_report
    from sb3_mbpo.variants import MBTD3
    from sb3_mbpo.variants import MBTQC as MBTQC
    from sb3_mbpo.variants import MBCrossQ as MBCrossQ
else:

    def __getattr__(name: str) -> Any:
        # MBTQC and MBCrossQ need sb3_contrib, and write_report needs matplotlib. These are optional (so the names are not in
        # __all__) and slow to import.
        if name in ("MBTD3", "MBTQC", "MBCrossQ"):
            from sb3_mbpo import variants

            return getattr(variants, name)
        if name == "write_report":
            from sb3_mbpo.diagnostics.report import write_report

            return write_report
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
