"""What the learning process does, run in a thread of this one."""

import pickle
import threading
from contextlib import contextmanager
from multiprocessing import Pipe

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.background.learner import Learner
from sb3_mbpo.background.messages import newest_step, pack, packed_agent, put_learning, put_weights, unpack
from sb3_mbpo.buffers.replay_buffer import ROWS


class Talk:
    """An acting process that collects with the model off, and a learner in a thread."""

    def __init__(self, cls=MBPO, env="Pendulum-v1", **kwargs):
        settings = {**FAST, "gradient_steps": -1, "updates_per_transition": 3, "model_train_freq": 25, **kwargs}
        self.agent = cls("MlpPolicy", env, **settings)
        self.agent.learn(0)
        self.ours, theirs = Pipe()
        self.learner = Learner(pickle.loads(packed_agent(self.agent)), theirs)
        self.thread = threading.Thread(target=self.learner.run, daemon=True)
        self.got: dict = {}
        self.logged: dict = {}

    def send(self, kind, content=None):
        self.ours.send_bytes(pack(kind, content))

    def act(self, n):
        collected = SAC("MlpPolicy", self.agent.env, learning_starts=10_000, seed=2)
        start, agent = agent_rows(self.agent), self.agent
        collected.learn(n * agent.n_envs)
        for row in range(n):
            rows = {name: getattr(collected.replay_buffer, name)[row : row + 1] for name in ROWS}
            agent.replay_buffer.insert(rows)
            agent.num_timesteps += agent.n_envs
            self.send("step", newest_step(agent))
        assert agent_rows(agent) == start + n

    def wait(self, kind):
        while True:
            got, content = unpack(self.ours.recv_bytes())
            self.got[got] = content if got in ("state", "final") else pickle.loads(content)
            if got == "news":
                self.logged |= self.got["news"]["log"]
            if got == kind:
                return self.got[kind]


def agent_rows(agent):
    return agent.replay_buffer.size()


@contextmanager
def talk(*args, **kwargs):
    one = Talk(*args, **kwargs)
    one.thread.start()
    one.wait("ready")
    try:
        yield one
    finally:
        one.ours.close()
        one.thread.join(60)
        assert not one.thread.is_alive()


@pytest.mark.parametrize("cls", [MBPO, DHMBPO])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_as_many_updates_as_stated_and_the_results_come_back(cls, n_envs):
    with talk(cls, make_vec_env("Pendulum-v1", n_envs)) as one:
        before = one.agent.predict(np.ones(3, np.float32), deterministic=True)[0]
        one.act(30)
        one.send("finish")
        final = one.wait("final")
    news, learner = one.got["news"], one.learner.agent
    assert learner._n_updates == 3 * (30 * n_envs - 20) == news["n_updates"] == news["settled"]
    assert 25 * n_envs <= learner.dynamics_fitted_at <= 30 * n_envs and learner.replay_buffer.size() == 30
    assert {"train/n_updates", "dynamics/real_share", "dynamics/holdout_error"} <= one.logged.keys()
    put_weights(one.agent.policy, news["weights"])
    new = np.ones(3, np.float32)
    after = one.agent.predict(new, deterministic=True)[0]
    assert after != before and after == learner.predict(new, deterministic=True)[0]
    put_learning(one.agent, final, forgets=0)
    ours, theirs = one.agent.get_parameters(), learner.get_parameters()
    assert all(th.equal(ours["policy"][name], theirs["policy"][name]) for name in theirs["policy"])
    assert one.agent.dynamics_fitted_at == learner.dynamics_fitted_at and one.agent.num_timesteps == 30 * n_envs
    assert len(one.agent.replay_buffer.model_buffer) == len(learner.replay_buffer.model_buffer) > 0


def test_without_new_transitions_it_waits():
    with talk() as one:
        one.act(25)
        while one.wait("news")["settled"] < 3 * 5:
            pass
        assert not one.ours.poll(0.5) or unpack(one.ours.recv_bytes())[0] == "state"
        assert one.learner.agent._n_updates == 15


def test_stopped_at_once():
    """A fit is broken off, and undone; updates that are due are not made."""
    began, never = threading.Event(), threading.Event()
    with talk() as one:
        agent = one.learner.agent
        fit = agent.dynamics.fit

        def long(data, progress=None):
            fit(data)
            began.set()
            while not never.is_set():
                progress("fitting")

        before = {name: value.clone() for name, value in agent.dynamics.state_dict().items()}
        agent.dynamics.fit = long
        one.act(25)
        assert began.wait(60)
        one.send("stop")
        one.wait("final")
        assert agent._n_updates == 0 and agent.dynamics_fitted_at is None
        assert all(th.equal(before[name], value) for name, value in agent.dynamics.state_dict().items())
        assert "error" not in one.got
        never.set()


def test_an_error_comes_with_its_trace_and_all_that_was_learned_before():
    def pays(obs, actions, next_obs):
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("no such sensor")
        return next_obs[:, 0]

    with talk(reward_fn=pays, min_explained_variance=None) as one:
        one.act(25)
        error, trace = one.wait("error")
        assert "no such sensor" in error and "in pays" in trace
        put_learning(one.agent, one.wait("final"), forgets=0)


def test_statistics_of_vec_normalize_and_lost_steps_and_a_changed_world():
    with talk(env=VecNormalize(make_vec_env("Pendulum-v1", 1))) as one:
        one.act(25)
        # A lost step is counted, and updates belong to it.
        one.send("cut", {"num_timesteps": 26, "progress": 0.5})
        one.send("finish")
        one.wait("final")
        assert one.learner.agent.num_timesteps == 26 and one.learner.agent._n_updates == 3 * 6
        theirs, ours = one.learner.agent, one.agent
        assert np.allclose(theirs._vec_normalize_env.obs_rms.mean, ours.env.obs_rms.mean)
        assert theirs.replay_buffer.dones[24] == theirs.replay_buffer.timeouts[24] == 1 and theirs.replay_buffer.size() == 25
    with talk() as one:
        one.act(25)
        one.send("finish")
        final = one.wait("final")
        # What was measured before the call is not put back after it; the networks are.
        one.agent.forget_transitions(5)
        put_learning(one.agent, final, forgets=1)
        assert one.agent.forgot_transitions and one.agent.dynamics_fitted_at is None
        assert not len(one.agent.replay_buffer.model_buffer)
        assert th.equal(one.agent.actor.mu.weight, one.learner.agent.actor.mu.weight)
        put_learning(one.agent, final, forgets=0)
        assert one.agent.dynamics_fitted_at == 25
    with talk() as one:
        one.act(25)
        one.send("forget", 5)
        one.send("finish")
        one.wait("final")
        assert one.learner.agent.replay_buffer.size() == 5 and one.learner.forgets == 1


def test_the_learner_knows_that_last_observations_are_copied():
    """Otherwise it takes episodes that all end where they start for lost ones."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    agent.learn(0)
    assert pickle.loads(packed_agent(agent)).replay_buffer.copies_ends


def test_updates_that_are_owed_wait_for_the_gate():
    with talk() as one:
        one.act(25)
        one.send("finish")
        put_learning(one.agent, one.wait("final"), forgets=0)
    one.agent.updates_owed, one.agent.imagined_fraction = 3, 0.0
    ours, theirs = Pipe()
    learner = Learner(pickle.loads(packed_agent(one.agent)), theirs)
    assert learner.agent.replay_buffer.real_ratio == 1
    ours.close()
