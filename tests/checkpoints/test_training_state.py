import json
import random
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EventCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from tiny import FAST, equal_agents

from sb3_mbpo import MBPO
from sb3_mbpo.checkpoints.callback_state import all_callbacks
from sb3_mbpo.checkpoints.training_state import _put_noise, put_agent, put_training, take_agent, take_training


def learned(n_steps=40, n_envs=1, **settings):
    env = make_vec_env("Pendulum-v1", n_envs, seed=0)
    return MBPO("MlpPolicy", env, **{**FAST, "gradient_steps": 3, **settings}).learn(n_steps)


def taken(take, *arguments):
    """A state that has been through JSON, with tensors that share nothing."""
    tensors: dict = {}
    state = json.loads(json.dumps(take(*arguments, tensors), allow_nan=False))
    return state, {name: tensor.clone() for name, tensor in tensors.items()}


def test_train_undone_and_repeated():
    """What train() has changed is set back: repeated, it ends where it ended."""
    agent = learned()
    before = taken(take_agent, agent)
    agent.train(gradient_steps=5, batch_size=16)
    after, updates = taken(take_agent, agent), agent._n_updates
    put_agent(agent, *before)
    assert agent._n_updates == updates - 5
    agent.train(gradient_steps=5, batch_size=16)
    (state, tensors), (again, tensors_again) = after, taken(take_agent, agent)
    del state["elapsed"], again["elapsed"]
    assert state == again and all(th.equal(tensors[name], tensors_again[name]) for name in tensors)


def test_into_another_agent():
    first, second = learned(40, seed=0), learned(25, seed=1)
    put_training(second, [], *taken(take_training, first, []))
    assert equal_agents(first, second) and second.num_timesteps == 40
    assert second.replay_buffer.size() == 40 and second.replay_buffer.pos == 40
    assert [space.sample() for space in (first.action_space,)] == [space.sample() for space in (second.action_space,)]
    # One after the other: they share the global generators.
    state = taken(take_training, first, [])
    first.learn(20, reset_num_timesteps=False)
    put_training(second, [], *state)
    second.learn(20, reset_num_timesteps=False)
    assert equal_agents(first, second) and second.num_timesteps == 60


@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise_remembers(n_envs):
    def noise():
        one = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
        return one if n_envs == 1 else VectorizedActionNoise(one, n_envs)

    first, second = learned(40, n_envs, action_noise=noise()), learned(20, n_envs, action_noise=noise())
    put_training(second, [], *taken(take_training, first, []))
    np.random.seed(0)
    a = first.action_noise()
    np.random.seed(0)
    assert np.array_equal(a, second.action_noise()) and np.abs(a).max() > 0


def test_arguments_of_an_agent_are_those_of_now():
    """Of its action noise and of its statistics, too; and what a file says beside is left alone."""
    first = learned(40, action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)), stats_window_size=3)
    second = learned(
        20, action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), 9 * np.ones(1)), stats_window_size=5, gamma=0.5
    )
    state, tensors = taken(take_training, first, [])
    state["attributes"] |= {"gamma": 0.1, "train": "x"}
    put_training(second, [], state, tensors)
    assert second.action_noise._sigma == 9 and second.ep_info_buffer.maxlen == second._stats_window_size == 5
    assert second.gamma == 0.5 and callable(second.train)


@pytest.mark.parametrize("warm_up", [True, False])
def test_a_space_without_a_seed(warm_up):
    """Once something was drawn from it, it goes on from there; before that, there is nothing to keep."""
    settings = {"seed": None, "learning_starts": 100 if warm_up else 0}
    first, second = (MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, **settings}) for _ in range(2))
    state, tensors = taken(take_training, first.learn(5), [])
    put_training(second.learn(7), [], state, tensors)
    assert ("agent.action_space" in json.dumps(state["random"])) == warm_up
    draws = [agent.action_space.sample() for agent in (first, second)]
    assert np.array_equal(*draws) == warm_up


class Counts(BaseCallback):
    def __init__(self, first=None):
        super().__init__()
        self.first, self.seen, self.stream = first, [first], iter(())

    def _on_step(self):
        self.seen.append(self.num_timesteps)
        return True


def test_callbacks_by_class_and_order():
    """Each gets what its like had; one that was not there starts anew; what is not plain is left alone, and named."""
    agent = learned()
    ours = all_callbacks(CallbackList([Counts(1), EventCallback(Counts(2))]))
    theirs = all_callbacks(CallbackList([EventCallback(Counts(7)), Counts(8), Counts(9)]))
    assert [type(one).__name__ for one in ours] == ["CallbackList", "Counts", "EventCallback", "Counts"]
    state, tensors = taken(take_training, agent, ours)
    streams = [one.stream for one in theirs if isinstance(one, Counts)]
    lost = put_training(agent, theirs, state, tensors)
    assert lost == "Of the run's callbacks, this could not be restored and begins anew: Counts.stream (tuple_iterator)"
    counts = [one for one in theirs if isinstance(one, Counts)]
    assert [one.seen for one in counts] == [[1], [2], [7]]
    # Arguments are those of now.
    assert sorted(one.first for one in counts) == [7, 8, 9]
    assert streams == [one.stream for one in theirs if isinstance(one, Counts)]


def test_networks_stay_where_they_are():
    """Lists of tensors that belong to networks (SB3 keeps some for batch norm) are no attributes to be replaced."""
    agent = learned()
    parameters = [id(parameter) for parameter in agent.policy.parameters()]
    agent.tensors_of_networks = [next(agent.policy.parameters())]
    state, tensors = taken(take_training, agent, [])
    assert "tensors_of_networks" not in state["attributes"]
    put_training(agent, [], state, tensors)
    assert [id(parameter) for parameter in agent.policy.parameters()] == parameters


class Named(NamedTuple):
    x: int


class Keeps(BaseCallback):
    """Counts in containers of many kinds, and has other callbacks in a tuple and in a dictionary."""

    def __init__(self, *inside):
        super().__init__()
        self.tuple, self.dict = inside[:1], {"a": inside[1:]}
        self.seen, self.by_kind, self.named, self.log = set(), defaultdict(list), Named(0), print

    def _on_step(self):
        return True


def test_containers_and_nested_callbacks():
    """They come back as what they were; what could only come back as something else is named."""
    agent = learned()
    first, second = (Keeps(CheckpointCallback(10, "."), Counts(1), Counts(2)) for _ in range(2))
    ours, theirs = all_callbacks(first), all_callbacks(second)
    assert [type(one).__name__ for one in ours] == ["Keeps", "CheckpointCallback", "Counts", "Counts"]
    first.seen.add(3), first.by_kind["a"].append(1)
    first.named, ours[3].seen, ours[3].stream = Named(5), [7], None
    ours[2].stream = theirs[2].stream = theirs[3].stream = None
    lost = put_training(agent, theirs, *taken(take_training, agent, ours))
    assert lost.endswith("begins anew: Keeps.named (Named)")
    second.by_kind["b"].append(2)
    assert second.seen == {3} and second.by_kind == {"a": [1], "b": [2]} and second.named == Named(0)
    assert theirs[3].seen == [7] and theirs[2].seen == [1]


class Passes(StopTrainingOnMaxEpisodes):
    """Takes its parent's arguments without naming them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_arguments_of_callbacks_are_those_of_now():
    """Also those that a subclass passes on, what SB3 makes of them, and methods, whatever the file says."""
    agent = learned()
    first, second = Passes(3), Passes(9)
    for one in (first, second):
        one.init_callback(agent)
    first.n_episodes = 2
    state, tensors = taken(take_training, agent, [first])
    state["callbacks"][0]["state"] |= {"max_episodes": 1, "_on_step": "x", "model": None}
    put_training(agent, [second], state, tensors)
    assert (second.max_episodes, second._total_max_episodes, second.n_episodes) == (9, 9, 2)
    assert callable(second._on_step) and second.model is agent


class Outer(th.nn.Module):
    """Draws from a generator that its parts share, two modules down."""

    def __init__(self, kind):
        super().__init__()
        self.inner = th.nn.Sequential(th.nn.Identity())
        self.generator = self.inner[0].stream = kind


GENERATORS = {
    "torch": (lambda: th.Generator().manual_seed(3), lambda one: float(th.rand(1, generator=one))),
    "numpy": (lambda: np.random.default_rng(3), lambda one: one.normal()),
    "old numpy": (lambda: np.random.RandomState(3), lambda one: one.normal()),
    "python": (lambda: random.Random(3), lambda one: one.random()),
}


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=GENERATORS)
def test_generators_of_nested_modules(make, draw):
    """They go on from where they were, and stay shared."""
    first, second = learned(), learned()
    for agent in (first, second):
        agent.extra = Outer(make())
        agent.own = agent.extra.generator
    draw(first.own)
    put_training(second, [], *taken(take_training, first, []))
    assert second.own is second.extra.inner[0].stream is second.extra.generator
    assert draw(first.own) == draw(second.own)


# ---------------------------------------------------------------------- foreign checkpoints


class Writes(BaseCallback):
    """Has what a file could misuse, and counters of many kinds."""

    def __init__(self, folder, **kwargs):
        super().__init__(**kwargs)
        self.csv, self.archive = f"{folder}/log.csv", "x"
        self.report_file, self.options = "report", {"out_dir": "here", "seen": 0}
        self.tell, self.phase, self.n_files, self.history = print, "first", 0, {"rollout/reward": []}
        self.weights = th.zeros(2)

    @property
    def where(self):
        return self.csv

    def _on_step(self):
        return True


class WritesMore(Writes):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def test_a_foreign_checkpoint_says_no_place_and_replaces_nothing(tmp_path):
    """What is not taken is not put back: no path, no argument, no method, no function, no property, no class."""
    agent, callback = learned(), WritesMore(folder=str(tmp_path))
    # As every honest run.
    callback.phase, callback.n_files, callback.history, callback.late = "second", 3, {"rollout/reward": [1.5]}, 7
    callback.weights = th.ones(2)
    evaluation = EvalCallback(make_vec_env("Pendulum-v1"), best_model_save_path=str(tmp_path))
    state, tensors = taken(take_training, agent, [callback, evaluation])
    honest = state["callbacks"][0]["state"]
    assert {"phase", "n_files", "history", "late", "weights"} <= set(honest)
    assert not {"csv", "folder", "verbose", "report_file", "options", "tell"} & set(honest)
    evil = {
        "csv": "/evil",
        "archive": "/evil",
        "report_file": "evil",
        "options": {"out_dir": "evil", "seen": 1},
        "folder": "evil",
    }
    evil |= {"tell": "evil", "where": "evil", "on_step": "evil", "_on_step": None, "__class__": "evil", "__dict__": {}}
    evil |= {"model": None, "num_envs": 3, "verbose": 2}
    honest.update(evil)
    state["callbacks"][1]["state"].update({"best_model_save_path": "/evil", "log_path": "/evil", "callback": {}, "n_calls": 5})
    state["callbacks"][1]["envs"].update({"n_calls": [], "nothing": []})
    fresh = [WritesMore(folder=str(tmp_path)), EvalCallback(evaluation.eval_env, best_model_save_path=str(tmp_path))]
    before = dict(vars(fresh[0]))
    put_training(agent, fresh, state, tensors)
    put = {name: value for name, value in vars(fresh[0]).items() if name not in before or value is not before[name]}
    assert th.equal(put.pop("weights"), th.ones(2))
    expected = {"phase": "second", "n_files": 3, "history": {"rollout/reward": [1.5]}, "late": 7, "num_envs": 3}
    assert {name: put[name] for name in expected} == expected
    assert not set(put) & (set(evil) - {"num_envs"})
    assert fresh[0].where == f"{tmp_path}/log.csv" and fresh[0]._on_step() is True
    assert fresh[1].best_model_save_path == str(tmp_path) and fresh[1].log_path is None and fresh[1].n_calls == 5


def test_a_foreign_checkpoint_replaces_nothing_of_the_agent():
    agent = learned()
    state, tensors = taken(take_training, agent, [])
    noise, names = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)), set(vars(agent))
    evil = {"learn": "evil", "predict": None, "tensorboard_log": "evil", "gradient_steps": 10**6, "actor": "evil"}
    evil |= {"lifetime_timesteps": 3, "__class__": "evil", "_episode_num": "x", "log_ent_coef": 1.0}
    state["attributes"].update(evil)
    state["log"]["dir"], state["log"]["name_to_value"]["mine"] = {"a": 1}, 2.0
    state["variables"]["policy"] = None
    state["state"]["_n_updates"] = 12345
    before = {name: vars(agent).get(name) for name in evil}
    put_training(agent, [], state, tensors)
    assert agent._n_updates == 12345 and agent.logger.name_to_value["mine"] == 2.0
    assert all(vars(agent).get(name) is before[name] for name in evil)
    assert set(vars(agent)) == names and agent.learn(5).num_timesteps == 5
    _put_noise(noise, {"own": {"reset": "evil", "noise_prev": np.ones(1)}, "several": []})
    assert callable(noise.reset) and noise.noise_prev == 1


@pytest.mark.parametrize("part", ["policy", "rewards"])
def test_a_foreign_checkpoint_with_numbers_that_are_not_finite(part):
    agent, other = learned(), learned(25, seed=1)
    (agent.actor.mu.weight.data if part == "policy" else agent.replay_buffer.rewards)[0] = float("nan")
    state, tensors = taken(take_training, agent, [])
    with pytest.raises(ValueError, match=f"{part}(.* is not finite|=nan)"):
        put_training(other, [], state, tensors)


def test_a_callback_names_what_is_not_saved():
    class Shows(BaseCallback):
        not_saved = ("shown",)

        def __init__(self):
            super().__init__()
            self.shown, self.seen = Named(1), 0

        def _on_step(self):
            return True

    agent, ours = learned(), Shows()
    ours.seen = 3
    theirs = Shows()
    state, tensors = taken(take_training, agent, [ours])
    # A foreign checkpoint may hold it all the same.
    state["callbacks"][0]["state"]["shown"] = 5
    theirs.shown = None
    assert put_training(agent, [theirs], state, tensors) == "" and theirs.seen == 3 and theirs.shown is None
