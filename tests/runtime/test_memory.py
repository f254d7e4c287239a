import re
import subprocess
import sys

import gymnasium as gym
import pytest
import torch as th

from sb3_mbpo import MBPO
from sb3_mbpo.buffers.model_buffer import ModelBuffer
from sb3_mbpo.buffers.rollout_blocks import ROLLOUT_BLOCK
from sb3_mbpo.rollout_schedule import rollout_length
from sb3_mbpo.runtime import memory
from sb3_mbpo.runtime.memory import MemoryEstimate, estimate, in_words

GROWING = {"min_length": 1, "max_length": 5, "start": 100, "end": 500}


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1_234_000, "1.23 MB"), (648e6, "648 MB"), (1.5e12, "1.5e+03 GB")],
)
def test_in_words(n_bytes, words):
    assert in_words(n_bytes) == words


def test_line():
    grows = MemoryEstimate(10, 20, 40, 70, 5, 15, (1, 8))
    assert grows.peak == 100
    assert str(grows) == (
        "memory: at most 100 B: real buffer 10 B; model buffer 20 B (k = 1) to 40 B (k = 8), 70 B while it grows; "
        "model rollouts 5 B; networks and optimizers 15 B"
    )
    stays = MemoryEstimate(10, 40, 40, 30, 5, 15, (2, 2))
    assert stays.peak == 70 and "; model buffer 40 B; model rollouts" in str(stays)


@pytest.mark.parametrize("schedule", [1, 3, GROWING, {**GROWING, "min_length": 4}])
@pytest.mark.parametrize("retained", [1, 2, 4])
@pytest.mark.parametrize("most", [None, 700, 2500])
def test_model_buffer_against_a_real_one(schedule, retained, most):
    """Filled as in a run, with nothing; `written` are the rows of the old and the new place that hold something."""
    kwargs = {"rollout_schedule": schedule, "retained_rollouts": retained, "model_buffer_size": most}
    model = MBPO("MlpPolicy", "Pendulum-v1", buffer_size=1000, rollout_batch_size=300, **kwargs)
    buffer, written = ModelBuffer(3, 1, retained, most, device="meta"), 0
    for step in range(100, 700, 20):
        k = rollout_length(schedule, step)
        buffer.begin_refill(300 * k)
        for _ in range(10):
            capacity, before = len(buffer.rows), len(buffer)
            buffer._append(th.empty((30 * k, 9), device="meta"))
            if len(buffer.rows) > capacity:
                written = max(written, capacity + min(before, len(buffer) - 30 * k))
    told = estimate(model)
    assert told.model_buffer == len(buffer.rows) * 9 * 4
    assert max(told.growing, told.model_buffer) == pytest.approx(max(written, len(buffer.rows)) * 9 * 4, rel=0.2)


def test_estimate_of_an_agent(capsys):
    kwargs = {"buffer_size": 1000, "learning_starts": 20, "rollout_batch_size": 100, "model_train_freq": 10}
    model = MBPO("MlpPolicy", "Pendulum-v1", verbose=1, rollout_schedule=GROWING, **kwargs)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert said == [str(estimate(model))]
    told = estimate(model)
    # float32: 3 + 1 + 3 + 1 + 1 numbers, and SB3's sixth array.
    assert told.real_buffer == 1000 * 10 * 4 and told.model_buffer == 4 * 100 * 5 * 9 * 4
    assert told.first_model_buffer == 4 * 100 * 9 * 4 and told.lengths == (1, 5)
    assert told.model_buffer < told.growing <= 2 * told.model_buffer
    weights = [
        p
        for part in (model.policy, model.dynamics, model.learned_reward, model.learned_termination)
        for p in part.parameters()
    ]
    assert told.networks == 4 * 4 * sum(p.numel() for p in weights)
    assert told.rollouts == 100 * 5 * (2 * 9 * 4 + 16) + 100 * 3 * 4
    MBPO("MlpPolicy", "Pendulum-v1", **kwargs)
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "there", "message"),
    [
        (
            {"buffer_size": 10_000},
            300_000,
            r"buffer_size=10000: full replay buffers take 4\d\d kB, but this machine has 300 kB",
        ),
        ({"buffer_size": 10_000}, None, None),
        ({"buffer_size": 10_000}, 500_000, None),
        ({"rollout_schedule": 50}, 300_000, r"rollout_batch_size=100: full .* take 7\d\d kB.*Lower rollout_batch_size"),
        ({"rollout_schedule": GROWING}, 70_000, "rollout_batch_size=100"),
        ({"rollout_schedule": lambda steps: 50}, 300_000, "rollout_batch_size=100"),
        ({"rollout_schedule": "auto"}, 200_000, "rollout_batch_size=100"),
        ({"rollout_schedule": 50, "model_buffer_size": 500}, 300_000, None),
        ({"rollout_schedule": 50, "real_ratio": 1}, 300_000, None),
    ],
)
def test_what_does_not_fit_is_warned_of(monkeypatch, recwarn, settings, there, message):
    monkeypatch.setattr(memory, "machine_memory", lambda: there)
    MBPO("MlpPolicy", "Pendulum-v1", **{"buffer_size": 100, "rollout_batch_size": 100, **settings})
    assert [bool(re.search(message or "", str(warning.message))) for warning in recwarn] == [True] * (message is not None)
    assert all(warning.filename == __file__ for warning in recwarn)


def test_memory_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "memory.max")
    total = memory.machine_memory()
    assert total is None or total > 10**8
    for text, expected in (("max", total), ("1000", total and 1000), (str(2**60), total)):
        (tmp_path / "memory.max").write_text(text)
        assert memory.machine_memory() == expected


def test_estimate_follows_the_arguments():
    def told(**kwargs):
        kwargs = {"buffer_size": 1000, "rollout_batch_size": 100, **kwargs}
        return estimate(MBPO("MlpPolicy", gym.make("Pendulum-v1"), **kwargs))

    plain = told()
    assert told(model_buffer_size=150).model_buffer == 150 * 9 * 4
    assert told(retained_rollouts=2).model_buffer == plain.model_buffer / 2
    assert told(rollout_schedule=3).model_buffer == plain.model_buffer * 3
    assert told(rollout_schedule=lambda steps: 3).model_buffer == plain.model_buffer * 3
    off = told(real_ratio=1)
    assert off.model_buffer == off.growing == off.rollouts == 0 and off.real_buffer == plain.real_buffer
    assert told(buffer_size=2000).real_buffer == plain.real_buffer * 2
    assert told(dynamics_kwargs={"n_members": 14}).networks > plain.networks
    assert (
        told(rollout_batch_size=3 * ROLLOUT_BLOCK["cpu"]).rollouts < 3 * told(rollout_batch_size=ROLLOUT_BLOCK["cpu"]).rollouts
    )


MEASURED = """
import threading, time
import gymnasium as gym, torch as th
from sb3_mbpo import MBPO, DynamicsModel
from sb3_mbpo.runtime.memory import estimate

th.set_num_threads(1)
PAGE = 4096

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE

class Nothing(DynamicsModel):
    def fit(self, transitions, progress=None):
        return {{}}
    def sample(self, obs, actions):
        return obs.clone(), th.zeros(len(obs))

def made(**kwargs):
    return MBPO(
        "MlpPolicy", gym.make("Pendulum-v1"), dynamics_class=Nothing, learning_starts=20, gradient_steps=1, batch_size=16,
        policy_kwargs={{"net_arch": [8]}}, buffer_size=1000, termination_fn="never", model_train_freq=10, seed=0, **kwargs
    )

made(rollout_batch_size=1000).learn(40)  # what libraries load on first use
model = made(rollout_batch_size=50_000, rollout_schedule={schedule})
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
model.learn({steps})
done = True
watcher.join()
print(peak - before, estimate(model).peak, model.replay_buffer.model_buffer.rows.nbytes, estimate(model).model_buffer)
"""


@pytest.mark.expensive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [('{"min_length": 1, "max_length": 20, "start": 20, "end": 300}', 360), ("20", 80)],
)
def test_estimate_against_the_peak_of_a_process(schedule, steps):
    code = MEASURED.format(schedule=schedule, steps=steps)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured, told, rows, rows_told = map(int, result.stdout.split())
    assert rows == rows_told
    assert measured == pytest.approx(told, rel=0.2)
