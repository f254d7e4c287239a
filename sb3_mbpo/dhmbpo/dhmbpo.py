"""DHMBPO: SAC that looks some steps ahead through the differentiable dynamics."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import GymEnv, ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from torch import nn
from typing_extensions import Unpack

from sb3_mbpo.buffers.normalization import normalize_rewards
from sb3_mbpo.checkpoints.interrupts import Interrupted
from sb3_mbpo.dhmbpo.policies import BoundedCritic, DHMBPOPolicy
from sb3_mbpo.dhmbpo.training_rollout import TrainingRollout, training_rollout
from sb3_mbpo.dhmbpo.value_expansion import expanded_values, value_bounds, with_values_of_ends
from sb3_mbpo.dynamics.base import Progress
from sb3_mbpo.model_based.constructor_arguments import SACArguments
from sb3_mbpo.model_based.model_based import ModelBased
from sb3_mbpo.rollouts import branched_rollout
from sb3_mbpo.trust.prediction_bounds import PredictionBounds
from sb3_mbpo.validation.rules import shown

# Number of target critics whose minimum is the target value.
TARGET_CRITICS = 2
# Interpolation factor of the bounds of the values in each update.
BOUNDS_RATE = 3e-4
# The average of the actor's weights spans this fraction of the updates so far, until actor_tau is the larger rate.
AVERAGED_PART = 0.1


class DHMBPO(ModelBased, SAC):
    """
    Double-horizon model-based policy optimization.

    Paper: https://arxiv.org/abs/2512.15439

    It uses two imagined horizons. *Distribution rollouts* have ``rollout_schedule`` steps. They start at real states,
    follow the current policy, and store their states in the model buffer. *Training rollouts* have ``training_horizon``
    steps and start at these states. Their discounted sum of rewards, plus the value of the last state, is the target of
    the critics. The actor maximizes the same sum, with gradients through dynamics, actions and states. A value therefore
    travels several steps in one update, and one update per env step is enough.

    As long as the dynamics explains too little (``min_explained_variance``), updates are SAC's own on real transitions.

    Arguments: those of ``stable_baselines3.SAC`` (other defaults: ``gamma`` .995, ``ent_coef`` "auto_0.1", ``gradient_steps``
    1, ``batch_size`` 128), then those of :class:`.ModelBased` (other defaults: ``rollout_schedule`` 20, ``rollout_batch_size``
    256, ``retained_rollouts`` 10; ``real_ratio`` is 0, or 1 for SAC without a model), then

    :param training_horizon: Number of steps of the training rollouts (H in the paper)
    :param distribution_freq: Number of updates between two distribution rollouts
    :param real_roots: Fraction of the training rollouts that start at real states instead of imagined ones
    :param value_quantiles: Quantiles of the soft rewards that bound the values, see :func:`.value_expansion.value_bounds`
    :param actor_tau: Deterministic actions come from an average of the actor's weights. In each update, the average moves
        towards the weights by this factor, or by 10 / updates if that is larger. 1: use the actor itself. If you set the
        actor's weights yourself, call ``policy.average(1.0)`` afterwards
    """

    policy_aliases: ClassVar[dict[str, Any]] = {"MlpPolicy": DHMBPOPolicy}
    DEFAULTS: ClassVar[dict[str, Any]] = {
        **{"gamma": 0.995, "ent_coef": "auto_0.1", "gradient_steps": 1, "batch_size": 128},
        **{"rollout_schedule": 20, "rollout_batch_size": 256, "retained_rollouts": 10, "real_ratio": 0.0},
    }

    # Only the states of imagined rows are used, and an update uses the dynamics fully or not at all.
    imagined_rewards_count = False
    uses_partial_trust = False

    # Bounds made from prediction_bounds, and the list that they were made from.
    _bounds: tuple[list[float], PredictionBounds] | None = None
    actor: Any
    policy: DHMBPOPolicy
    log_ent_coef: Any
    target_entropy: Any
    critic: BoundedCritic
    critic_target: BoundedCritic

    def __init__(
        self,
        policy: str | type[DHMBPOPolicy],
        env: GymEnv | str | None,
        *args: Any,
        training_horizon: int = 5,
        distribution_freq: int = 20,
        real_roots: float = 0.0,
        value_quantiles: tuple[float, float] = (0.01, 0.99),
        actor_tau: float = 0.0005,
        **kwargs: Unpack[SACArguments],
    ) -> None:
        if isinstance(policy, str) and policy not in self.policy_aliases:
            raise ValueError(
                f"policy={shown(policy)} must be 'MlpPolicy' or a subclass of DHMBPOPolicy. Flatten Dict observations with "
                "gymnasium.wrappers.FlattenObservation(env)"
            )
        self.training_horizon = training_horizon
        self.distribution_freq = distribution_freq
        self.real_roots = real_roots
        self.value_quantiles = value_quantiles
        self.actor_tau = actor_tau
        mixed = inspect.signature(ModelBased.__init__).parameters
        defaults = {name: value for name, value in self.DEFAULTS.items() if name in mixed}
        super().__init__(policy, env, *args, **{**defaults, **kwargs})

    def _setup_model(self) -> None:
        super()._setup_model()
        self._check_arguments()
        if not isinstance(self.policy, DHMBPOPolicy):
            raise ValueError(f"policy={shown(self.policy_class)} must be 'MlpPolicy' or a subclass of DHMBPOPolicy")
        if self.actor_tau < 1 and self.real_ratio < 1:
            self.policy.begin_average()

    def _balanced_ratio(self) -> float:
        return 0.0

    def _check_arguments(self) -> None:
        if self.real_ratio not in (0, 1):
            raise ValueError(
                f"real_ratio={shown(self.real_ratio)} must be 0, or 1 for SAC without a model. For training rollouts that "
                "start at real states, pass real_roots"
            )
        if self.gamma == 1:
            raise ValueError("gamma=1 must be below 1: without a discount, values have no bounds")
        if self.use_sde:
            raise ValueError("use_sde=True must be False: training rollouts need an independent action in each state")

    def fit_dynamics(self, progress: Progress | None = None) -> dict[str, Any]:
        """See ``ModelLearning.fit_dynamics``. Also sets ``prediction_bounds``, see ``prediction_clip_margin``."""
        metrics = super().fit_dynamics(progress)
        transitions = self.replay_buffer.real_transitions(self.dynamics_window)
        self.prediction_bounds = PredictionBounds(transitions, self.prediction_clip_margin).numbers()
        return metrics

    def forget_transitions(self, keep: int = 0) -> None:
        """See ``ModelBased.forget_transitions``. The bounds of the values are also set anew."""
        super().forget_transitions(keep)
        for critic in (self.critic, self.critic_target):
            critic.bounds_known.zero_()

    def adapt_networks(self, transitions: ReplayBufferSamples) -> None:
        """Set the statistics of the policy from all real transitions, see ``DHMBPOPolicy.adapt``."""
        rewards = normalize_rewards(transitions.rewards, self._vec_normalize_env)
        obs = self.codec.flatten(self._as_policy_sees(transitions.observations))
        self.policy.adapt(obs, rewards, trained=self._n_updates > 0)

    @property
    def expands_values(self) -> bool:
        """Whether updates use the dynamics. Otherwise they are SAC's own on real transitions."""
        trusted = self.real_ratio < 1 and self.imagined_fraction == 1 and self.dynamics_fitted_at is not None
        if not (trusted and self.dynamics.usable and self.prediction_bounds):
            return False
        # An agent loaded without its replay buffer has to collect transitions first.
        return self.replay_buffer.size() * self.n_envs >= self.rows_before_fit

    @property
    def real_share_of_batches(self) -> float:
        """See ``ModelLearning.real_share_of_batches``. SAC's own updates use real rows only."""
        return self.real_ratio if self.expands_values else 1.0

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """See SB3."""
        if gradient_steps <= 0 or self.waits_for_transitions or not self.expands_values:
            self.replay_buffer.real_ratio = 1.0
            before = self._n_updates
            super().train(gradient_steps, batch_size)
            self._average_actor(before, self._n_updates - before)
            return
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        self._update_learning_rate(optimizers + ([] if self.ent_coef_optimizer is None else [self.ent_coef_optimizer]))
        logged = []
        with self._undone_if_interrupted(gradient_steps):
            for update in range(self._n_updates, self._n_updates + gradient_steps):
                if self.replay_buffer.check is not None:
                    self.replay_buffer.check()
                imagined = len(self.replay_buffer.model_buffer)
                if self.real_roots < 1 and (update % self.distribution_freq == 0 or not imagined):
                    self.roll_distribution()
                logged.append(self._update(self._roots(batch_size)))
                self._average_actor(update, 1)
                # Counted from the start of each call, as in SB3.
                if (update - self._n_updates) % self.target_update_interval == 0:
                    self._move_targets()
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name in logged[0]:
            self.logger.record(f"train/{name}", float(np.mean([values[name] for values in logged])))

    def _average_actor(self, before: int, updates: int) -> None:
        """
        Move the average of the actor's weights, see ``actor_tau``.

        :param before: number of updates before these
        :param updates: number of updates since the last call
        """
        rate = max(self.actor_tau, min(1.0, 1 / (AVERAGED_PART * (before + 1))))
        self.policy.average(1 - (1 - rate) ** updates)

    @contextmanager
    def _undone_if_interrupted(self, gradient_steps: int) -> Iterator[None]:
        """Restore the model buffer if ``train`` is interrupted. ``ResumeCallback`` restores everything else."""
        buffer = self.replay_buffer.model_buffer
        # A single update is never interrupted.
        long = gradient_steps > 1 and self.resume_callback is not None and self.resume_callback.can_undo_train
        before = buffer.contents() if long else None
        try:
            yield
        except Interrupted:
            if before is not None:
                buffer.restore(*before)
            raise

    def roll_distribution(self) -> None:
        """Roll out the current policy in the dynamics from real states, and store the imagined states in the model buffer."""
        buffer = self.replay_buffer
        length, rollout_filter = self.rollout_length, None
        if self.rollout_filter is not None:
            rollout_filter = self.make_rollout_filter(buffer.real_transitions(self.dynamics_window))
            assert rollout_filter is not None
            self.filter_state = rollout_filter.memory
        dynamics = self.bounds_of_fit.wrap_obs(self.dynamics)
        buffer.model_buffer.begin_refill(self.rollout_batch_size * length)
        missing = self.rollout_batch_size * length
        with self.imagining() as policy:
            # Branches that ended early are replaced. The number of attempts is limited: all branches may end early.
            for _ in range(length):
                starts = buffer.start_states(min(self.rollout_batch_size, missing), self.dynamics_window)
                rows = branched_rollout(dynamics, policy, self.terminates, starts, length, rollout_filter)
                kept = ReplayBufferSamples(*(part[:missing] for part in rows[:5]))
                buffer.model_buffer.add(kept)
                missing -= len(kept.rewards)
                if missing <= 0:
                    break

    @property
    def bounds_of_fit(self) -> PredictionBounds:
        """Bounds of the real transitions at the last fit, see ``prediction_clip_margin``."""
        if self._bounds is None or self._bounds[0] is not self.prediction_bounds:
            self._bounds = self.prediction_bounds, PredictionBounds.of_numbers(self.prediction_bounds, self.device)
        return self._bounds[1]

    def _imagine(self, roots: th.Tensor) -> TrainingRollout:
        """:return: training rollouts that start at ``roots (B, obs_dim)``"""
        bounds, policy, horizon = self.bounds_of_fit, self._action_and_log_prob, self.training_horizon
        if self.learns_reward:

            def reward(*transition: th.Tensor) -> th.Tensor:
                return bounds.clamp_rewards(self.learned_reward(*transition), transition[3])

            return training_rollout(bounds.wrap_obs(self.dynamics), policy, self.terminates, roots, horizon, reward)
        known = self.known_reward
        if known is not None:
            dynamics = bounds.wrap_obs(self.dynamics)
            return training_rollout(dynamics, policy, self.terminates, roots, horizon, lambda *t: known(*t[:3]))
        return training_rollout(bounds.wrap(self.dynamics), policy, self.terminates, roots, horizon)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_bounds"]

    def _kept_refills(self) -> int:
        # Between two fits, there are several distribution rollouts.
        return self.retained_rollouts

    def _roots(self, n: int) -> th.Tensor:
        """:return: raw start observations of training rollouts, ``(n, obs_dim)``"""
        buffer = self.replay_buffer
        n_real = n if not len(buffer.model_buffer) else round(n * self.real_roots)
        parts = [buffer.start_states(n_real, self.dynamics_window)] if n_real else []
        if n_real < n:
            parts.append(buffer.model_buffer.sample(n - n_real, buffer.generator)[:, : buffer.model_buffer.widths[0]])
        return th.cat(parts)

    def _update(self, roots: th.Tensor) -> dict[str, float]:
        """
        Update critics, actor and entropy coefficient once, in this order.

        :param roots: start observations ``(B, obs_dim)``
        :return: values to log
        """
        rollout = self._imagine(roots)
        if not rollout.valid.all():
            rollout = rollout.of(rollout.valid)
        if not len(rollout.obs[0]):
            raise ValueError(
                "No prediction of the dynamics is finite in training rollouts. Look at dynamics_class, and at reward_fn if "
                "there is one; min_explained_variance keeps a dynamics out that explains nothing"
            )
        self._check_gradients(rollout)
        rewards = normalize_rewards(rollout.rewards, self._vec_normalize_env)
        ent_coef = self._ent_coef()
        rollout = rollout._replace(rewards=rewards)
        critic_loss, values = self._update_critics(rollout, ent_coef)
        actor_loss = self._update_actor(rollout, ent_coef)
        logged = {"critic_loss": critic_loss, "actor_loss": actor_loss, "ent_coef": float(ent_coef), "value": values}
        if self.ent_coef_optimizer is not None:
            logged["ent_coef_loss"] = self._update_ent_coef(rollout.log_probs[0].detach())
        return logged

    def _check_gradients(self, rollout: TrainingRollout) -> None:
        """
        Warn once if the rewards vary but have no gradient.

        :raises ValueError: if imagined observations have no gradient
        """
        if not rollout.obs.requires_grad:
            raise ValueError(
                "DHMBPO learns along gradients of imagined observations, and these have none: dynamics_class must be made of "
                "differentiable torch operations. MBPO does without"
            )
        if rollout.rewards.requires_grad or "gradient" in self._warned_of:
            return
        if bool(rollout.rewards[rollout.alive[:-1] > 0.5].std(correction=0) == 0):
            return
        self._warned_of.append("gradient")
        warnings.warn(
            "Imagined rewards have no gradient: the actor does not see how its actions change the rewards of the next "
            f"{self.training_horizon} steps, only the values after them. Make reward_fn of differentiable torch operations",
            stacklevel=2,
        )

    def _ent_coef(self) -> th.Tensor:
        return self.ent_coef_tensor if self.ent_coef_optimizer is None else self.log_ent_coef.detach().exp()

    def _update_critics(self, rollout: TrainingRollout, ent_coef: th.Tensor) -> tuple[float, float]:
        """:return: the loss, and the mean target"""
        with th.no_grad():
            low, high = value_bounds(
                rollout.rewards - ent_coef * rollout.log_probs[:-1], rollout.alive[:-1], self.value_quantiles, self.gamma
            )
            for critic in (self.critic, self.critic_target):
                critic.move_bounds(low, high, BOUNDS_RATE)
            last = rollout.obs[-1].detach(), rollout.actions[-1].detach()
            asked = np.random.permutation(self.critic.n_critics)[:TARGET_CRITICS]
            values = self.critic_target.values_of(asked, self._as_policy_sees(last[0]), last[1])
            least = th.cat(values, dim=1).amin(dim=1).clamp(self.critic_target.value_low, self.critic_target.value_high)
            target = expanded_values(
                rollout.rewards, rollout.log_probs, rollout.alive, least, self.gamma, ent_coef, root_entropy=False
            ).unsqueeze(1)
        predicted = self.critic(self._as_policy_sees(rollout.obs[0].detach()), rollout.actions[0].detach())
        # In units of the bounds, so that the scale of the rewards does not change the size of a gradient step.
        width = (self.critic.value_high - self.critic.value_low) / 2
        loss = sum((0.5 * nn.functional.mse_loss(values / width, target / width) for values in predicted), th.zeros(()))
        self.critic.optimizer.zero_grad()
        loss.backward()
        self.critic.optimizer.step()
        return loss.item(), target.mean().item()

    def actor_objective(self, rollout: TrainingRollout, ent_coef: th.Tensor | float) -> th.Tensor:
        """
        The objective of the actor: the mean soft value of the start states.

        :param rollout: training rollouts with their graph
        :param ent_coef: entropy coefficient alpha
        :return: a scalar tensor
        """
        obs, actions = rollout.last()
        values = th.cat(self.critic(self._as_policy_sees(obs), actions), dim=1).mean(dim=1)
        rewards = with_values_of_ends(rollout.rewards, rollout.alive, values)
        return expanded_values(
            rewards, rollout.log_probs, rollout.alive, values, self.gamma, ent_coef, root_entropy=True
        ).mean()

    def _update_actor(self, rollout: TrainingRollout, ent_coef: th.Tensor) -> float:
        """:return: the loss"""
        loss = -self.actor_objective(rollout, ent_coef)
        parameters = [parameter for parameter in self.actor.parameters() if parameter.requires_grad]
        # Gradients of the actor only. Those of dynamics and critics would double the cost.
        gradients = th.autograd.grad(loss, parameters, allow_unused=True)
        # If a row is not finite, all gradients are not. Checking the biases is cheap.
        biases = [gradient for gradient in gradients if gradient is not None and gradient.dim() == 1]
        if not all(bool(bias.isfinite().all()) for bias in biases):
            raise ValueError(
                "The gradient of the policy is not finite. Look at the derivatives of reward_fn, if there is one (a square "
                "root has none at 0), and of dynamics_class. The policy is as it was before this update"
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.actor.optimizer.step()
        self.actor.optimizer.zero_grad()
        return loss.item()

    def _update_ent_coef(self, log_probs: th.Tensor) -> float:
        """:return: the loss, which is SAC's, on the first actions"""
        assert self.ent_coef_optimizer is not None and self.log_ent_coef is not None
        loss = -(self.log_ent_coef * (log_probs + self.target_entropy)).mean()
        self.ent_coef_optimizer.zero_grad()
        loss.backward()
        self.ent_coef_optimizer.step()
        return loss.item()

    def to_sac(self) -> SAC:
        """
        :return: a plain SAC with the trained policy, on the same env, with an empty replay buffer. Its actor is the average of
            this one, see ``actor_tau``
        """
        state = {name: value for name, value in self.policy.state_dict().items() if not name.startswith("average_actor.")}
        actor = self.policy.deterministic_actor.state_dict()
        sac = self._model_free(state | {f"actor.{name}": value for name, value in actor.items()})
        # SAC would not update it.
        sac.policy.average_actor = None
        return sac

    @th.no_grad()
    def _move_targets(self) -> None:
        targets, sources = ([p.data for p in critic.parameters()] for critic in (self.critic_target, self.critic))
        th._foreach_lerp_(targets, sources, self.tau)
        # Running statistics of batch normalization, as in SAC.
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _action_and_log_prob(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: reparameterized actions in [-1, 1] at raw ``obs (B, obs_dim)``, and their log-probabilities ``(B,)``"""
        return self.actor.action_log_prob(self._as_policy_sees(obs))
