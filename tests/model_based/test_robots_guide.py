"""The programs of the guide on real robots, with smaller numbers."""

import re
from pathlib import Path

import numpy as np
import pytest
from tiny import FAST

import sb3_mbpo

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "robots.md"
PROGRAMS = re.findall(r"## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
SMALLER = {"5_000": "10", "2_000": "60", "1_000": "60", "600": "60", "500": "20", "learn(200)": "learn(40)", "// 400": "// 20"}


@pytest.mark.parametrize(("title", "program"), PROGRAMS, ids=[title for title, _ in PROGRAMS])
def test_it_runs(title, program, monkeypatch):
    if "background=True" in program:
        # Skipped: it starts a second process, which takes seconds; test_background.py checks what the same calls give.
        pytest.skip("test_background.py makes the same calls")  # the reason is above
    quick = {name: FAST[name] for name in ("policy_kwargs", "batch_size", "rollout_batch_size", "dynamics_kwargs")}

    class Quick(sb3_mbpo.MBPO):
        def __init__(self, *args, **kwargs):
            kwargs.setdefault("learning_starts", 20)
            super().__init__(*args, **quick, **kwargs)

    monkeypatch.setattr(sb3_mbpo, "MBPO", Quick)
    for number, smaller in SMALLER.items():
        program = program.replace(number, smaller)
    names = {}
    np.random.seed(0)
    exec(program.replace('"Pendulum-v1"', '"Pendulum-v1", max_episode_steps=10') if "gym.make" in program else program, names)
    assert names["agent"].num_timesteps >= 40 and names["agent"]._n_updates > 0
    if "curriculum" in title:
        assert names["agent"].env.envs[0].unwrapped.g == 9.0


def test_every_section_with_a_program_was_found():
    assert len(PROGRAMS) == GUIDE.read_text(encoding="utf-8").count("```python") == 6
