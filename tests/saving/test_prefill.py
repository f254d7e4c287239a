import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.codec import Codec
from sb3_mbpo.saving.offline_data import read_transitions, rows_of_steps

OBS = spaces.Box(-np.inf, np.inf, (2, 3), np.float64)
ACT = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
CODEC = Codec(OBS, ACT)


def arrays(n=20):
    rng = np.random.default_rng(0)
    ends = rng.random((2, n)) < 0.3
    return {
        "observations": rng.normal(size=(n, 2, 3)),
        "actions": rng.uniform(ACT.low, ACT.high, (n, 2)),
        "rewards": rng.normal(size=n),
        "next_observations": rng.normal(size=(n, 2, 3)),
        "terminations": ends[0],
        "truncations": ends[1],
    }


def same(a, b):
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_arrays_pass_through():
    data = arrays()
    read = read_transitions(data, CODEC)
    assert same(read, data) and read["terminations"].dtype == bool
    del data["truncations"]
    assert not read_transitions(data, CODEC)["truncations"].any()


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [5, 30])
def test_there_and_back_through_a_replay_buffer(n_envs, n_steps):
    """Oldest first, each env's own story in one piece, actions in the env's scale; also when the ring has turned over."""
    data = arrays(n_steps * n_envs)
    rows = rows_of_steps(data, n_envs, CODEC)
    buffer = ReplayBuffer(12 * n_envs, OBS, ACT, device="cpu", n_envs=n_envs)
    for i in range(n_steps):
        values = [rows[name][i] for name in ("observations", "next_observations", "actions", "rewards", "dones")]
        buffer.add(*values, [{"TimeLimit.truncated": bool(late)} for late in rows["timeouts"][i]])
    read = read_transitions(buffer, CODEC)
    expected = {}
    for name, array in data.items():
        stories = array.reshape(n_envs, n_steps, *array.shape[1:])[:, -12:]
        expected[name] = stories.reshape(-1, *array.shape[1:])
    # SB3 keeps one of the two endings.
    expected["truncations"] &= ~expected["terminations"]
    assert same(read, expected)


def test_what_does_not_fill_a_step_of_all_envs_is_left_out():
    rows = rows_of_steps(arrays(20), 3, CODEC)
    assert rows["observations"].shape == (6, 3, 2, 3) and rows["actions"].shape == (6, 3, 2) and rows["dones"].shape == (6, 3)


class Episode:
    def __init__(self, data, first, last):
        self.observations = np.concatenate([data["observations"][first:last], data["next_observations"][last - 1 : last]])
        for name in ("actions", "rewards", "terminations", "truncations"):
            setattr(self, name, data[name][first:last])


class Dataset:
    def __init__(self, *episodes):
        self.episodes = episodes

    def iterate_episodes(self):
        return iter(self.episodes)


def test_episodes():
    data = arrays()
    data["next_observations"][:-1] = data["observations"][1:]
    data["next_observations"][7] = -1.0
    assert same(read_transitions(Dataset(Episode(data, 0, 8), Episode(data, 8, 20)), CODEC), data)


def test_episodes_of_mappings():
    episode = Episode(arrays(), 0, 8)
    episode.observations = {"position": episode.observations}
    with pytest.raises(ValueError, match="observations of this dataset are no arrays"):
        read_transitions(Dataset(episode), CODEC)


def test_a_dataset_of_minari(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gym.make("Pendulum-v1", max_episode_steps=30)
    env.action_space.seed(0)
    episodes = []
    for seed in range(3):
        episode = minari.data_collector.EpisodeBuffer(id=seed, observations=[env.reset(seed=seed)[0]], actions=[])
        for _ in range(30):
            action = env.action_space.sample()
            step = (action, *env.step(action)[:4])
            names = ("actions", "observations", "rewards", "terminations", "truncations")
            for name, value in zip(names, step, strict=True):
                getattr(episode, name).append(value)
        episodes.append(episode)
    about = {"algorithm_name": "a", "author": "b", "author_email": "c@d.e", "code_permalink": "f", "description": "g"}
    dataset = minari.create_dataset_from_buffers("pendulum/random-v0", episodes, env=env, eval_env=env, **about)
    agent = MBPO("MlpPolicy", "Pendulum-v1", seed=0)
    agent.prefill(dataset)
    data = agent.replay_buffer.real_transitions()
    assert len(data.rewards) == 90 and data.dones.sum() == 0 and agent.replay_buffer.timeouts.sum() == 3
    first = next(iter(dataset.iterate_episodes()))
    np.testing.assert_allclose(data.next_observations[:30], first.observations[1:], rtol=1e-6)
    np.testing.assert_allclose(2 * data.actions[:30], first.actions, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": np.zeros((20, 6))}, r"observations has shape \(20, 6\), but must have \(20, 2, 3\)"),
        ({"rewards": np.zeros((20, 1))}, r"rewards has shape \(20, 1\), but must have \(20,\)"),
        ({"terminations": np.zeros(19)}, r"terminations has shape \(19,\)"),
        (
            {"rewards": np.where(np.arange(20) == 4, np.nan, 0)},
            "rewards is not finite in 1 of 20 .*first in number 4",
        ),
        ({"actions": np.full((20, 2), 2.5)}, "actions are outside the action space.* in 20 of 20"),
        ({"terminals": np.zeros(20)}, r"unknown: \['terminals'\]"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=f"prefill: .*{message}"):
        read_transitions({**arrays(), **change}, CODEC)


def test_refused_altogether():
    with pytest.raises(ValueError, match="not int"):
        read_transitions(3, CODEC)
    with pytest.raises(ValueError, match=r"missing: \['rewards'"):
        read_transitions({name: array for name, array in arrays().items() if name != "rewards"}, CODEC)
    compact = ReplayBuffer(10, OBS, ACT, optimize_memory_usage=True, handle_timeout_termination=False)
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        read_transitions(compact, CODEC)
    empty = {name: array[:0] for name, array in arrays().items()}
    for nothing in (empty, ReplayBuffer(10, OBS, ACT), Dataset()):
        with pytest.raises(ValueError, match="prefill: there are no transitions"):
            read_transitions(nothing, CODEC)


TINY = FAST | {
    "learning_starts": 10,
    "gradient_steps": 1,
    "rollout_schedule": {"min_length": 1, "max_length": 5, "start": 0, "end": 50},
}


@pytest.mark.parametrize("n_envs", [1, 2])
def test_an_agent_goes_on_from_another_ones_transitions(n_envs, monkeypatch):
    """They reach the dynamics at the first fit, and k does not move."""
    other = SAC("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), learning_starts=1000, seed=1).learn(240)
    agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), **TINY)
    agent.prefill(other.replay_buffer)
    assert agent.replay_buffer.size() * n_envs == 240 and agent.num_timesteps == agent.lifetime_timesteps == 0
    seen = []
    fit = agent.dynamics.fit
    monkeypatch.setattr(agent.dynamics, "fit", lambda data, progress=None: seen.append(len(data.rewards)) or fit(data))
    agent.learn(12)
    assert seen == [240 + 12 - (n_envs == 1)]
    assert agent.logger.name_to_value["dynamics/rollout_length"] == 1


@pytest.mark.parametrize("verbose", [0, 1])
def test_a_second_one_says_what_it_adds_to(verbose, capsys):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "buffer_size": 50}, verbose=verbose)
    other = SAC("MlpPolicy", "Pendulum-v1", learning_starts=100).learn(30)
    capsys.readouterr()
    agent.prefill(other.replay_buffer)
    agent.prefill(other.replay_buffer)
    first = "prefill: added 30 transitions; the replay buffer holds 30"
    second = "prefill: added 30 transitions to the 30 that were there; the replay buffer holds 50"
    assert capsys.readouterr().out.splitlines() == [first, second] * verbose


def test_more_than_there_is_room_for():
    agent = MBPO("MlpPolicy", "Pendulum-v1", buffer_size=50, **TINY)
    n = 80
    data = {"observations": np.arange(3.0 * n).reshape(n, 3), "actions": np.zeros((n, 1)), "rewards": np.arange(float(n))}
    data |= {"next_observations": data["observations"], "terminations": np.zeros(n)}
    with pytest.warns(UserWarning, match="of 80 transitions the last 50 are kept"):
        agent.prefill(data)
    assert sorted(agent.replay_buffer.real_transitions().rewards.flatten().tolist()) == list(range(30, 80))
