"""How long a fit of the ensemble goes on, and at which learning rate."""

import math

# Gradient steps over which the learning rate rises at the start: a new optimizer does not know the scale of gradients yet.
WARM_UP = 20
# The learning rate falls to zero over this share of the gradient steps before it, and over so many at least.
DECAY_SHARE, LEAST_DECAY = 0.5, 100


class FitSchedule:
    """
    A constant learning rate until nothing has improved for ``patience`` gradient steps, then a linear decay to zero.

    The decay takes the noise out of the weights that a constant rate leaves in them. All numbers count gradient steps: an
    epoch has two of them on little data and hundreds on much.

    :param rate: the learning rate
    :param patience: steps without an improvement after which the decay begins
    :param most: steps at most, the decay included; ``math.inf``: no bound
    """

    def __init__(self, rate: float, patience: int, most: float) -> None:
        self.rate, self.patience, self.most = rate, patience, most
        #: Steps so far.
        self.updates = 0
        self._idle = 0
        self._decays_from, self._ends_at = math.inf, most

    def next_rates(self, n: int) -> list[float]:
        """:return: learning rates of the next ``n`` steps, or of those that are left; empty at the end"""
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
        """:param improved: whether anything has improved by enough since the last look"""
        if improved:
            self._idle = 0
