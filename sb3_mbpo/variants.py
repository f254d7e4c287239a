"""Model-based variants of other off-policy algorithms: TD3, TQC and CrossQ."""

from typing import Any

import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from typing_extensions import Unpack

from sb3_mbpo.model_based.constructor_arguments import CrossQArguments, TD3Arguments, TQCArguments
from sb3_mbpo.model_based.model_based import ModelBased
from sb3_mbpo.validation.rules import whole


class MBTD3(ModelBased, TD3):
    """
    TD3 that also learns from imagined transitions.

    TD3's policy is deterministic. Imagined actions get the noise of TD3's target policy smoothing; without it, the critic
    would see only one action per state and could not learn a gradient in the action.
    """

    def __init__(
        self, policy: str | type[BasePolicy], env: GymEnv | str | None, *args: Any, **kwargs: Unpack[TD3Arguments]
    ) -> None:
        super().__init__(policy, env, *args, **kwargs)

    def _imagined_actions(self, obs: th.Tensor) -> th.Tensor:
        actions = super()._imagined_actions(obs)
        noise = (th.randn_like(actions) * self.target_policy_noise).clamp(-self.target_noise_clip, self.target_noise_clip)
        return (actions + noise).clamp(-1, 1)

    def to_td3(self) -> TD3:
        """:return: a plain TD3 agent with the trained networks and the same env; its replay buffer is empty"""
        return self._model_free()


try:
    from sb3_contrib import TQC, CrossQ
except ModuleNotFoundError as error:
    if error.name != "sb3_contrib":
        raise

    def __getattr__(name: str) -> Any:
        if name in ("MBTQC", "MBCrossQ"):
            raise ImportError(f'{name} needs sb3_contrib: in the checkout of sb3_mbpo, pip install ".[contrib]"')
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:

    class MBTQC(ModelBased, TQC):
        """TQC that also learns from imagined transitions."""

        def __init__(
            self, policy: str | type[BasePolicy], env: GymEnv | str | None, *args: Any, **kwargs: Unpack[TQCArguments]
        ) -> None:
            super().__init__(policy, env, *args, **kwargs)

        def _setup_model(self) -> None:
            super()._setup_model()
            # A negative number would make TQC slice from the wrong end.
            rule = whole(0, self.critic.n_quantiles - 1)
            rule.check(
                "top_quantiles_to_drop_per_net", self.top_quantiles_to_drop_per_net, ", below n_quantiles of policy_kwargs"
            )

        def to_tqc(self) -> TQC:
            """:return: a plain TQC agent with the trained networks and the same env; its replay buffer is empty"""
            return self._model_free()

    class MBCrossQ(ModelBased, CrossQ):
        """CrossQ that also learns from imagined transitions."""

        def __init__(
            self, policy: str | type[BasePolicy], env: GymEnv | str | None, *args: Any, **kwargs: Unpack[CrossQArguments]
        ) -> None:
            super().__init__(policy, env, *args, **kwargs)

        def _setup_model(self) -> None:
            super()._setup_model()
            if self.policy_kwargs.get("batch_norm", True):
                # The variance of a single row is undefined: every parameter would be NaN after the first update.
                whole(2).check("batch_size", self.batch_size, ", where batch_norm of policy_kwargs is true")

        def to_crossq(self) -> CrossQ:
            """:return: a plain CrossQ agent with the trained networks and the same env; its replay buffer is empty"""
            return self._model_free()
