"""The learning process: gets transitions, fits the dynamics, makes updates, and sends the policy back."""

import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from math import ceil
from multiprocessing.connection import Connection
from typing import Any

from stable_baselines3.common.utils import set_random_seed

from sb3_mbpo.background.messages import acting_weights, pack, packed_learning, unpack
from sb3_mbpo.checkpoints.interrupts import Interrupted

# Seconds from one policy to the next, at least; and from one copy of all that was learned to the next.
POLICY_SECONDS = 0.1
STATE_SECONDS = 30.0
# The acting process comes first where both want a core.
NICENESS = 5


class Inbox:
    """
    Reads messages in a thread of its own, so that the acting process never waits for this one.

    :param connection: to the acting process
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        #: The acting process wants the results now, or is gone.
        self.stop = False
        self.is_gone = False
        self._messages: deque[tuple[str, bytes]] = deque()
        self._new = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                kind, content = unpack(self.connection.recv_bytes())
                self.stop |= kind == "stop"
                self._messages.append((kind, content))
                self._new.set()
        except (EOFError, OSError):
            self.stop = self.is_gone = True
            self._new.set()

    def take(self, wait: bool) -> list[tuple[str, Any]]:
        """
        :param wait: whether to wait for a message, if there is none
        :return: all new messages, oldest first
        """
        if wait:
            self._new.wait()
        self._new.clear()
        return [(kind, pickle.loads(content)) for kind, content in iter(self._pop, None)]

    def _pop(self) -> tuple[str, bytes] | None:
        return self._messages.popleft() if self._messages else None

    # Called by fits and model rollouts as those of a ``ResumeCallback``.
    can_undo_train = False

    def check(self) -> None:
        """
        :raises Interrupted: the acting process wants the results now, or is gone
        """
        if self.stop:
            raise Interrupted


class Learner:
    """
    Learns from the transitions that arrive, at the agent's number of updates per transition.

    :param agent: from ``packed_agent``
    :param connection: to the acting process
    """

    def __init__(self, agent: Any, connection: Connection) -> None:
        self.agent, self.connection = agent, connection
        self.inbox = Inbox(connection)
        agent.resume_callback = self.inbox
        self.decide = agent.rollout_callback_class()
        self.decide.init_callback(agent)
        # Updates that are owed from before come before the first step.
        self.decide.on_resume()
        #: Updates that are due; and those that were due and are made, or were left out.
        self.owed, self.settled, self.forgets = agent.updates_owed, 0, 0
        self.finishes = False
        self.warnings: list[tuple[str, type[Warning]]] = []
        self._policy_at = self._state_at = 0.0

    def run(self) -> None:
        """Learn until the acting process ends it."""
        self.connection.send_bytes(pack("ready"))
        try:
            with self.agent.computing():
                while not self.inbox.stop and not (self.finishes and self.owed == 0):
                    self.work()
        except Interrupted:
            pass
        except Exception as error:
            self._send(pack("error", (repr(error), traceback.format_exc())))
        self._send_news()
        self._send(pack("final", packed_learning(self.agent, self.settled, self.forgets, imagined=True)))

    def work(self) -> None:
        """One turn: new transitions, a fit and a model rollout if they are due, a few updates, the policy."""
        before = self.agent.dynamics_fitted_at
        new = self.inbox.take(wait=self.owed == 0 and not self.finishes)
        steps = sum(self._receive(kind, content) for kind, content in new)
        if steps:
            self.decide.locals = {"num_collected_steps": steps}
            self.decide.on_rollout_end()
        # As many as for one step of the env.
        n = min(self.owed, ceil(self.agent.updates_ratio * self.agent.n_envs))
        if n:
            self.agent.train(gradient_steps=n, batch_size=self.agent.batch_size)
            self.owed, self.settled = self.owed - n, self.settled + n
        now, is_fitted = time.monotonic(), self.agent.dynamics_fitted_at != before
        if is_fitted or (n and (self.owed == 0 or now - self._policy_at > POLICY_SECONDS)):
            self.agent.check_parameters()
            if is_fitted or now - self._state_at > STATE_SECONDS:
                self._send(pack("state", packed_learning(self.agent, self.settled, self.forgets, imagined=False)))
                self._state_at = now
            self._send_news()
            self._policy_at = now

    def _receive(self, kind: str, content: Any) -> int:
        """:return: number of steps of the env"""
        agent = self.agent
        if kind == "step":
            agent.replay_buffer.insert(content["rows"])
            for name, statistics in content["statistics"].items():
                setattr(agent._vec_normalize_env, name, statistics)
            self._count(content)
            return 1
        if kind == "cut":
            agent.replay_buffer.cut()
            self._count(content)
        elif kind == "forget":
            agent.forget_transitions(content)
            self.forgets += 1
        elif kind == "finish":
            self.finishes = True
        return 0

    def _count(self, content: Any) -> None:
        agent = self.agent
        agent.num_timesteps, agent._current_progress_remaining = content["num_timesteps"], content["progress"]
        if agent.num_timesteps > agent.learning_starts:
            self.owed += agent.updates_of(agent.n_envs)

    def _send_news(self) -> None:
        agent = self.agent
        values, excluded = dict(agent.logger.name_to_value), dict(agent.logger.name_to_excluded)
        agent.logger.name_to_value.clear(), agent.logger.name_to_excluded.clear()
        news = {
            "weights": acting_weights(agent.policy),
            "log": {name: (value, excluded.get(name)) for name, value in values.items()},
            "warnings": self.warnings[:],
            "n_updates": agent._n_updates,
            "settled": self.settled,
        }
        self.warnings.clear()
        self._send(pack("news", news))

    def _send(self, message: bytes) -> None:
        if not self.inbox.is_gone:
            try:
                self.connection.send_bytes(message)
            except OSError:
                self.inbox.stop = self.inbox.is_gone = True


def run(connection: Connection) -> None:
    """
    Main function of the learning process.

    :param connection: to the acting process, which sends ``packed_agent`` first
    """
    # Ctrl-C and the signals of a cluster reach the whole group. The acting process decides what they mean.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    agent = pickle.loads(connection.recv_bytes())
    if agent.seed is not None:
        # Not the numbers that the acting process draws.
        set_random_seed((agent.seed + 1 + agent._n_updates) % 2**32)
    learner = Learner(agent, connection)
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = lambda message, category, *place: learner.warnings.append((str(message), category))
    learner.run()
