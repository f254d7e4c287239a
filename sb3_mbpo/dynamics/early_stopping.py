"""Length and learning rates of a fit of the ensemble."""

import math

# Number of gradient steps over which the learning rate rises, because a new optimizer does not know the gradients' scale yet.
WARM_UP = 20
# The decay takes this fraction of the gradient steps before it, and at least LEAST_DECAY steps.
DECAY_SHARE, LEAST_DECAY = 0.5, 100


class FitSchedule:
    """
    A constant learning rate until nothing has improved for ``patience`` gradient steps, then a linear decay to zero.

    The decay removes the noise that a constant learning rate leaves in the weights. Everything is counted in gradient steps:
    an epoch has two of them with little data and hundreds with much.

    :param rate: the learning rate
    :param patience: number of steps without an improvement after which the decay starts
    :param most: maximum number of steps, including the decay; ``math.inf``: no limit
    """

    def __init__(self, rate: float, patience: int, most: float) -> None:
        self.rate, self.patience, self.most = rate, patience, most
        #: Steps so far.
        self.updates = 0
        self._idle = 0
        self._decays_from, self._ends_at = math.inf, most

    def next_rates(self, n: int) -> list[float]:
        """
        :param n: number of steps
        :return: learning rates of the next ``n`` steps, fewer at the end; empty if the fit has ended
        """
        if self._decays_from == math.inf and self._idle >= self.patience:
            self._decays_from = self.updates
            self._ends_at = min(self.updates + max(LEAST_DECAY, int(DECAY_SHARE * self.updates)), self.most)
        elif self._decays_from == math.inf and self.updates + n > self.most / (1 + DECAY_SHARE):
            self._decays_from = self.updates
        steps = range(self.updates, int(min(self.updates + n, self._ends_at)))
        rates = [self._rate(step) for step in steps]
        self.updates += len(rates)
        self._idle += len(rates)
        return rates

    def _rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / WARM_UP)
        left = 1.0 if step < self._decays_from else (self._ends_at - step) / (self._ends_at - self._decays_from)
        return self.rate * rising * left

    def look(self, improved: bool) -> None:
        """:param improved: whether the hold-out error has improved enough since the last call"""
        if improved:
            self._idle = 0
