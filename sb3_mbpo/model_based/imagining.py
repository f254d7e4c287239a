"""The agent's policy, dynamics, reward and termination, as branched rollouts call them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.normalization import normalize_obs
from sb3_mbpo.codec import Observation
from sb3_mbpo.dynamics.base import DynamicsModel, KnownReward
from sb3_mbpo.model_based.collecting import Collecting
from sb3_mbpo.rewards.learned import LearnedReward, TransitionReward
from sb3_mbpo.trust.filters import FILTERS, RolloutFilter, Rule


class Imagining(Collecting):
    """The part of :class:`ModelBased` that provides what branched rollouts call."""

    dynamics: DynamicsModel
    policy: Any
    actor: Any
    reward_fn: str | Callable[..., th.Tensor] | None
    rollout_filter: str | Rule | None
    termination: Any
    learned_termination: Any
    learned_reward: LearnedReward

    @property
    def learns_reward(self) -> bool:
        """Whether the reward is learned as a function of the transition, not known or predicted by the dynamics."""
        return self.reward_fn is None and not self.dynamics.own_reward

    @property
    def known_reward(self) -> Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor] | None:
        """``reward_fn`` for flat observations and actions in [-1, 1]; ``None`` if it is not a function."""
        if not callable(reward_fn := self.reward_fn):
            return None
        return lambda *transition: reward_fn(*self.codec.decode(*transition))

    @property
    def imagined_dynamics(self) -> DynamicsModel:
        """The dynamics that model rollouts sample from, with the learned or the known reward if there is one."""
        if self.learns_reward:
            return TransitionReward(self.dynamics, self.learned_reward, self.terminates)
        known = self.known_reward
        return self.dynamics if known is None else KnownReward(self.dynamics, known)

    def without_unused_rewards(self, transitions: ReplayBufferSamples) -> ReplayBufferSamples:
        """
        Set rewards to 0 if they do not come from the dynamics, so that they do not affect its loss, hold-out error and
        disagreement.

        :param transitions: real transitions
        :return: the transitions that the dynamics is fitted to
        """
        unused = not self.dynamics.own_reward and (self.learns_reward or self.known_reward is not None)
        return transitions._replace(rewards=th.zeros_like(transitions.rewards)) if unused else transitions

    def predict_reward(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, terminated: th.Tensor
    ) -> th.Tensor | None:
        """
        Reward of imagined transitions, if it does not come from the dynamics.

        :param obs: raw observations ``(B, obs_dim)``
        :param actions: in [-1, 1], ``(B, action_dim)``
        :param next_obs: raw observations ``(B, obs_dim)``
        :param terminated: whether the episode ends, bool ``(B,)``
        :return: rewards ``(B,)``; ``None`` if the dynamics predicts them together with the next observation
        """
        if self.learns_reward:
            return self.learned_reward(obs, actions, next_obs, terminated)
        known = self.known_reward
        return None if known is None else known(obs, actions, next_obs)

    @th.no_grad()
    def predict_mean(self, steps: ReplayBufferSamples) -> th.Tensor:
        """
        Expected outcome of real steps: the mean of the dynamics, with the reward that imagined transitions would get.

        :param steps: real steps, raw and flat
        :return: reward and next observation ``(B, 1 + obs_dim)``
        """
        prediction = self.dynamics.predict_mean(steps.observations, steps.actions)
        ended = steps.dones.flatten() > 0.5
        rewards = self.predict_reward(steps.observations, steps.actions, prediction[:, 1:], ended)
        return prediction if rewards is None else th.cat([rewards.unsqueeze(1), prediction[:, 1:]], dim=1)

    def make_rollout_filter(self, transitions: ReplayBufferSamples) -> RolloutFilter | None:
        """
        Make the filter of the next model rollout from the argument ``rollout_filter``.

        :param transitions: all real transitions
        :return: the filter; ``None`` if ``rollout_filter`` is ``None``
        """
        if self.rollout_filter is None:
            return None
        rule: Any = FILTERS[self.rollout_filter] if isinstance(self.rollout_filter, str) else self.rollout_filter
        return RolloutFilter(rule() if isinstance(rule, type) else rule, self.dynamics, transitions, self.filter_state)

    @contextmanager
    def imagining(self) -> Iterator[Callable[[th.Tensor], th.Tensor]]:
        """Yields the policy as ``branched_rollout`` calls it, in evaluation mode; restores the mode afterwards."""
        training = self.policy.training
        self.policy.set_training_mode(False)
        try:
            yield self._imagined_actions
        finally:
            self.policy.set_training_mode(training)
            if self.use_sde:
                self.actor.reset_noise(self.n_envs)  # type: ignore[operator]

    def _imagined_actions(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: raw observations ``(B, obs_dim)``
        :return: actions of the stochastic policy in [-1, 1], ``(B, action_dim)``
        """
        if self.use_sde:
            self.actor.reset_noise(len(obs))  # type: ignore[operator]
        return self.policy._predict(self._as_policy_sees(obs), deterministic=False).reshape(len(obs), -1)  # type: ignore

    def _as_policy_sees(self, obs: th.Tensor) -> Observation:
        """:return: flat, raw observations ``(B, obs_dim)`` in the env's form, normalized if there is a VecNormalize"""
        return normalize_obs(self.codec.unflatten(obs), self._vec_normalize_env)

    def terminates(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """
        Which transitions end an imagined episode.

        :param obs: raw observations ``(B, obs_dim)``
        :param actions: in [-1, 1], ``(B, action_dim)``
        :param next_obs: raw observations ``(B, obs_dim)``
        :return: bool ``(B,)``
        """
        if isinstance(self.termination, str):
            return self.learned_termination(obs, self.codec.decode_actions(actions), next_obs)
        return self.termination(*self.codec.decode(obs, actions, next_obs))
