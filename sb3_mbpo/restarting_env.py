"""An env that is made anew when it dies: a lost connection, a simulator that crashed."""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym

# In the info of a step that raised. Agents of this package do not store that transition.
LOST_STEP = "sb3_mbpo.lost_step"


class RestartingEnv(gym.Wrapper):
    """
    Makes its env anew when ``step`` or ``reset`` raises, and warns each time. The step that raised ends its episode::

        env = RestartingEnv(lambda: RobotEnv("192.168.0.7"), max_restarts=5)
        agent = MBPO("MlpPolicy", env)

    The result of that step is not known, so agents of this package do not store it as a transition. They count it. Other
    algorithms store it: nothing has moved, the reward is 0, and the episode is truncated.

    If an env of a ``VecEnv`` restarts, the transitions of the other envs in that step are left out as well.

    :param make: creates the env; it is called once at construction, and once for each restart
    :param max_restarts: total number of restarts; after these, the error is raised. A restart that fails counts, too
    :param wait: seconds between closing the old env and creating the new one
    """

    def __init__(self, make: Callable[[], gym.Env], max_restarts: int = 3, wait: float = 0.0) -> None:
        if not callable(make):
            raise ValueError(f"RestartingEnv: make={make!r} must be a function that creates the env")
        if isinstance(max_restarts, bool) or not isinstance(max_restarts, int) or max_restarts < 0:
            raise ValueError(f"RestartingEnv: max_restarts={max_restarts!r} must be a whole number of at least 0")
        super().__init__(make())
        self.make, self.max_restarts, self.wait = make, max_restarts, wait
        #: Number of restarts so far.
        self.restarts = 0
        self._last_obs: Any = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """See Gymnasium. If the env raises, it is made anew, and the new one is reset."""
        while True:
            try:
                obs, info = self.env.reset(**kwargs)
            except Exception as error:
                self._restart(error, "reset")
            else:
                self._last_obs = copy.deepcopy(obs)
                return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See Gymnasium. If the env raises, it is made anew, and the episode is truncated at the last observation."""
        try:
            answer = self.env.step(action)
        except Exception as error:
            if self._last_obs is None:
                # Not after a crash: step() was called before reset().
                raise
            self._restart(error, "step")
            return self._last_obs, 0.0, False, True, {LOST_STEP: True}
        self._last_obs = copy.deepcopy(answer[0])
        return answer

    def _restart(self, error: Exception, call: str) -> None:
        """:raises Exception: ``error``, if there were ``max_restarts`` already"""
        while True:
            if self.restarts >= self.max_restarts:
                raise error
            self.restarts += 1
            of_step = "; this step is not stored" if call == "step" else ""
            warnings.warn(
                f"The env raised in {call}(): {type(error).__name__}: {error}. It is made anew, restart {self.restarts} of "
                f"{self.max_restarts}{of_step}",
                stacklevel=3,
            )
            try:
                self.env.close()
            except Exception as problem:
                warnings.warn(f"The env that died could not be closed: {type(problem).__name__}: {problem}", stacklevel=3)
            time.sleep(self.wait)
            try:
                self.env = self.make()
                return
            except Exception as again:
                error, call = again, "its constructor"

    def get_state(self) -> dict[str, Any]:
        """See :func:`.env_state.take_envs`."""
        return {"restarts": self.restarts, "last_obs": self._last_obs}

    def set_state(self, state: dict[str, Any]) -> None:
        """See :func:`.env_state.put_envs`."""
        self.restarts, self._last_obs = state["restarts"], state["last_obs"]
