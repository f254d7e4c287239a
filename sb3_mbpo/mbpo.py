"""MBPO: SAC on real and imagined transitions."""

from typing import Any

from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.sac.policies import SACPolicy
from typing_extensions import Unpack

from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer
from sb3_mbpo.fast_sac import cpu, cuda_graph
from sb3_mbpo.fast_sac.eligibility import why_not_fast
from sb3_mbpo.fast_sac.static_memory import why_not_static
from sb3_mbpo.model_based.constructor_arguments import SACArguments
from sb3_mbpo.model_based.model_based import ModelBased


class MBPO(ModelBased, SAC):
    """
    Model-Based Policy Optimization: SAC that trains on 5 % real and 95 % imagined transitions, at 20 updates a step.

    Paper: https://arxiv.org/abs/1906.08253

    The arguments are those of ``stable_baselines3.SAC`` (``gradient_steps`` defaults to 20), those of :class:`ModelBased`, and

    :param fast_update: Which code runs SAC's update. ``False``: SB3's own. ``True``: the faster code of this package, which
        uses the same equations; raises a ``ValueError`` if it does not support the agent. ``None``: the faster code if it
        supports the agent and ``real_ratio`` is below 1. On a GPU, the faster code is captured as a CUDA graph; if the capture
        fails, a warning is issued and SB3's update is used
    """

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str | None,
        *args: Any,
        fast_update: bool | None = None,
        **kwargs: Unpack[SACArguments],
    ) -> None:
        self.fast_update = fast_update
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._said_update = ""
        self._is_fast()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_said_update"]

    def _why_not_fast(self) -> str | None:
        """
        :return: why SB3's own update must run; ``None`` if the fast update can run
        :raises ValueError: ``fast_update=True``, but the fast update does not support the agent
        """
        if self.fast_update is False:
            return "fast_update=False"
        if self.fast_update is None and self.real_ratio == 1:
            return "real_ratio=1"
        # The fast update calls batches(), so it would ignore a sample() of the user's.
        usual = type(self.replay_buffer) is MixedReplayBuffer and "sample" not in vars(self.replay_buffer)
        reason = why_not_fast(self, MBPO, ModelBased) if usual else "a replay buffer with its own sample()"
        if reason is None and self.device.type == "cuda":
            reason = why_not_static(self)
        if self.fast_update and reason is not None:
            raise ValueError(f"fast_update=True does not support this agent: {reason}. Leave it at None, or set it to False")
        return reason

    def _is_fast(self) -> bool:
        """
        Checked before every ``train``, since users may replace networks and optimizers. The choice is printed when it changes.

        :return: whether the fast update runs
        """
        reason = self._why_not_fast()
        line = "SAC update: " + ("fast" if reason is None else f"Stable-Baselines3's own ({reason})")
        if self.verbose >= 1 and line != self._said_update:
            print(line)
        self._said_update = line
        return reason is None

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Do gradient updates, with the fast update if it supports this agent.

        :param gradient_steps: number of updates
        :param batch_size: rows per batch, real and imagined together
        """
        if gradient_steps <= 0 or self.waits_for_transitions or not self._is_fast():
            super().train(gradient_steps, batch_size)
            return
        batches = self.replay_buffer.batches(gradient_steps, batch_size, self._vec_normalize_env)
        if self.device.type != "cuda":
            cpu.train(self, batches)
        elif not cuda_graph.train(self, batches):
            super().train(gradient_steps, batch_size)

    def to_sac(self) -> SAC:
        """:return: a plain SAC agent with the trained networks and the same env; its replay buffer is empty"""
        return self._model_free()
