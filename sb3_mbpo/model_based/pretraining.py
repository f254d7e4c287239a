"""Learning from transitions that exist already, before the first step of the env."""

import warnings
from typing import Any, ClassVar, TypeVar

from stable_baselines3.common.utils import configure_logger

from sb3_mbpo.model_based.model_learning import ModelLearning
from sb3_mbpo.validation.rules import MOST, whole

SelfPretraining = TypeVar("SelfPretraining", bound="Pretraining")


class Pretraining(ModelLearning):
    """The part of :class:`ModelBased` that learns without an env."""

    rollout_callback_class: ClassVar[Any]
    computing: Any

    def pretrain(self: SelfPretraining, gradient_steps: int) -> SelfPretraining:
        """
        Learn from the real transitions that are there. Call it after :meth:`prefill` or ``load_replay_buffer``.

        Fits the dynamics, and makes model rollouts and updates, as ``learn`` does. The env is not stepped, and no transitions
        are counted. The model rollouts are made anew after as many updates as ``learn`` makes from one fit to the next. The
        policy was never tried, so keep ``gradient_steps`` small where it can do damage. To act with it from the first step of
        ``learn`` on, construct the agent with ``learning_starts=0``.

        :param gradient_steps: number of updates; 0: fit and model rollout only
        :return: the agent
        :raises ValueError: there are fewer transitions than the dynamics needs
        """
        whole(0, MOST).check("pretrain: gradient_steps", gradient_steps)
        self._warn_of_new_statistics()
        if not hasattr(self, "_logger"):
            # `learn` replaces it.
            self._logger = configure_logger(self.verbose)
        decide = self.rollout_callback_class()
        decide.init_callback(self)
        with self.computing():
            if self.real_ratio < 1:
                decide.update_model()
            every = max(1, round((self.updates_ratio or 1.0) * self.model_train_freq))
            for done in range(0, gradient_steps, every):
                if done and self.imagined_fraction > 0 and self.dynamics.usable and self.real_ratio < 1:
                    self.generate_rollouts()
                self.replay_buffer.real_ratio = self.real_share_of_batches
                self.train(gradient_steps=min(every, gradient_steps - done), batch_size=self.batch_size)
        self.pretraining_updates += gradient_steps
        self.check_parameters()
        self.logger.dump(self.num_timesteps)
        return self

    def _warn_of_new_statistics(self) -> None:
        statistics = self._vec_normalize_env
        if statistics is not None and statistics.training and statistics.ret_rms.count < 1:
            warnings.warn(
                "pretrain: the VecNormalize has no statistics yet, so the policy would learn from other observations than it "
                "will see. Load them with VecNormalize.load(path, env), or leave VecNormalize out",
                stacklevel=3,
            )
