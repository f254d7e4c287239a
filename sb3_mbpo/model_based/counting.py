"""How an agent counts transitions, and the updates that belong to them."""

from math import floor
from typing import Any

from stable_baselines3.common.type_aliases import TrainFrequencyUnit

from sb3_mbpo.saving.save_load import Saving


class Counting(Saving):
    """The part of :class:`ModelBased` that counts. All else is scheduled on these counts."""

    _earlier_timesteps: int

    @property
    def lifetime_timesteps(self) -> int:
        """Total env transitions over all ``learn`` calls, never reset. Fits and k are scheduled on it."""
        return self._earlier_timesteps + self.num_timesteps

    @property
    def updates_ratio(self) -> float | None:
        """Number of updates per env transition; ``None``: they are counted per episode, whose length is unknown."""
        if self.updates_per_transition is not None:
            return self.updates_per_transition
        if self.gradient_steps < 0:
            return 1.0
        self._convert_train_freq()
        frequency: Any = self.train_freq
        if frequency.unit is TrainFrequencyUnit.EPISODE:
            return None
        return self.gradient_steps / (frequency.frequency * self.n_envs)

    def updates_of(self, transitions: int) -> int:
        """
        Number of updates of the newest transitions, by :attr:`updates_ratio`.

        It depends only on counts of transitions, so a resumed run makes the same updates, fractions included.

        :param transitions: number of newest env transitions, already counted
        :return: number of updates
        """
        now, ratio = self.lifetime_timesteps, self.updates_ratio
        assert ratio is not None
        return floor(ratio * now) - floor(ratio * (now - transitions))
