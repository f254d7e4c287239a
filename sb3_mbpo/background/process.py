"""The acting process's side: starts the learning process, exchanges transitions and policies with it, and ends it."""

import multiprocessing
import pickle
import queue
import threading
import time
import warnings
from typing import Any

from sb3_mbpo.background.learner import run
from sb3_mbpo.background.messages import newest_step, pack, packed_agent, put_learning, put_weights, unpack

# Seconds that a stopped learner has to send its results. A fit can be broken off, a long update of the user's cannot.
STOP_SECONDS = 60.0
# The learner is behind if the updates of this many transitions are missing, or of so many fits' intervals.
BEHIND_TRANSITIONS, BEHIND_FITS = 1_000, 4


class LearnerProcess:
    """
    A process that learns while this one acts. Nothing here waits for it but ``__init__``, ``finish`` and ``stop``.

    :param agent: in ``learn``; the learner gets a copy
    :raises RuntimeError: the process could not be started
    """

    def __init__(self, agent: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(theirs,), name="sb3_mbpo learner", daemon=True)
        self._changed = threading.Condition()
        self._received: dict[str, Any] = {}
        self._is_over = False
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._weights: dict[str, Any] | None = None
        # Updates that were due since it was started, and those that are settled, see ``Learner``.
        self._due, self._settled = agent.updates_owed, 0
        # Updates that the agent's copy of what was learned contains, and calls of forget_transitions.
        self._copied, self._forgets = 0, 0
        self._warned_of_pace = False
        try:
            self._process.start()
            theirs.close()
            for work in (self._read, self._write):
                threading.Thread(target=work, daemon=True).start()
            self._outbox.put(packed_agent(agent))
            # It has a copy, and its own is the one that changes.
            agent.replay_buffer.model_buffer.refills.clear()
            while not self._wait_for("ready"):
                pass
            self._take("ready")
            self._check()
        except BaseException:
            self._end()
            raise

    def _read(self) -> None:
        try:
            while True:
                kind, content = unpack(self._pipe.recv_bytes())
                # Copies of all that was learned are only unpacked when they are needed.
                news: Any = content if kind in ("state", "final") else pickle.loads(content)
                with self._changed:
                    if kind == "news" and "news" in self._received:
                        before = self._received["news"]
                        news["log"] = before["log"] | news["log"]
                        news["warnings"] = before["warnings"] + news["warnings"]
                    self._received[kind] = news
                    self._changed.notify_all()
        except (EOFError, OSError):
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._pipe.send_bytes(message)
        except OSError:
            # The reader notices it, too.
            pass

    def _take(self, kind: str) -> Any:
        with self._changed:
            return self._received.pop(kind, None)

    def _wait_for(self, kind: str, seconds: float = 0.2) -> bool:
        """:return: whether there is such a message, or will never be one"""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over or kind in self._received, seconds)

    def send(self, kind: str, content: Any = None) -> None:
        """
        :param kind: ``"forget"`` or ``"finish"``, see ``Learner``
        :param content: what belongs to it
        """
        self._forgets += kind == "forget"
        self._outbox.put(pack(kind, content))

    def send_cut(self, agent: Any) -> None:
        """
        Tell the learner that a step was lost. It is counted, so updates belong to it.

        :param agent: right after its replay buffer was cut
        """
        self.send("cut", {"num_timesteps": agent.num_timesteps, "progress": agent._current_progress_remaining})
        self._count_updates(agent)

    def _count_updates(self, agent: Any) -> None:
        if agent.num_timesteps > agent.learning_starts:
            self._due += agent.updates_of(agent.n_envs)
        self._receive(agent)
        self._check()
        self._check_pace(agent)

    def send_step(self, agent: Any) -> None:
        """
        Send the newest transitions, and continue with the newest policy.

        :param agent: right after it stored them
        :raises RuntimeError: the learner has failed
        """
        self.send("step", newest_step(agent))
        self._count_updates(agent)

    def _receive(self, agent: Any) -> None:
        news = self._take("news")
        if news is None:
            return
        self._weights, self._settled = news["weights"], news["settled"]
        put_weights(agent.policy, self._weights)
        agent._n_updates = news["n_updates"]
        for name, (value, exclude) in news["log"].items():
            agent.logger.record(name, value, exclude)
        agent.logger.record("dynamics/updates_owed", self.owed)
        for text, category in news["warnings"]:
            warnings.warn(text, category, stacklevel=2)

    @property
    def owed(self) -> int:
        """Number of updates that are due and not made yet, as far as is known here."""
        return self._due - self._settled

    def _check(self) -> None:
        if "error" in self._received:
            error, trace = self._received["error"]
            raise RuntimeError(
                f"The learner failed with {error}. The agent keeps its transitions.\n\nIn the learner:\n{trace}"
            )
        if self._is_over and "final" not in self._received:
            self._process.join(1)
            raise RuntimeError(
                f"The learner's process has ended (exit code {self._process.exitcode}). The agent keeps its transitions, and "
                "what the learner sent last. If it never started, see its own error message above: a script needs "
                'if __name__ == "__main__": around its main part'
            )

    def _check_pace(self, agent: Any) -> None:
        ratio = agent.updates_ratio
        if self._warned_of_pace or self.owed <= ratio * max(BEHIND_TRANSITIONS, BEHIND_FITS * agent.model_train_freq):
            return
        self._warned_of_pace = True
        warnings.warn(
            f"The learner is behind: {self.owed:,} updates, those of {self.owed / ratio:,.0f} transitions, are not made yet "
            f"({self._settled:,} are). Lower the number of updates per transition (now {ratio:g}), or raise model_train_freq. "
            "Missing updates are made when learn ends",
            stacklevel=2,
        )

    def catch_up(self, agent: Any) -> None:
        """Give the agent the newest copy of all that was learned, and the newest policy."""
        state = self._take("state")
        if state is not None:
            self._copied = put_learning(agent, state, self._forgets)
            if self._weights is not None:
                put_weights(agent.policy, self._weights)
        agent.updates_owed = self._due - self._copied

    def finish(self, agent: Any, is_interrupted: Any) -> None:
        """
        Wait until all updates that are due are made, then :meth:`stop`.

        :param agent: gets the results
        :param is_interrupted: called now and then; true: do not wait any longer
        :raises RuntimeError: the learner has failed
        """
        try:
            self.send("finish")
            while not self._wait_for("final") and not is_interrupted():
                pass
            self._check()
        finally:
            self.stop(agent)

    def stop(self, agent: Any) -> None:
        """
        End the process. Updates that are not made stay in ``agent.updates_owed``.

        :param agent: gets the results
        """
        try:
            self.send("stop")
            until = time.monotonic() + STOP_SECONDS
            while not self._wait_for("final") and time.monotonic() < until:
                pass
            self._receive(agent)
            final = self._take("final")
            if final is None:
                self.catch_up(agent)
            else:
                agent.updates_owed = self._due - put_learning(agent, final, self._forgets)
        finally:
            self._end()

    def _end(self) -> None:
        self._outbox.put(None)
        if self._process.pid is not None:
            self._process.join(1)
            self._process.kill()
            self._process.join()
        self._pipe.close()
