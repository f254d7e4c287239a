# %% [markdown]
# # DHMBPO against SAC
#
# After this notebook you know what a learned model buys on a small task, what it costs, and how to compare algorithms fairly.
# It takes about two minutes on one CPU core.
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there. There is no released package yet: the first cell installs it from your copy of the repository, whose
# address you put there. Elsewhere, [install it](../guide/install.md) first.

# %%
import os
import sys

# Google Colab: there is no released package. Put the address of your repository here.
REPOSITORY = ""  # "https://github.com/YOU/sb3_mbpo"
if "google.colab" in sys.modules:
    os.system(f'{sys.executable} -m pip install -q "sb3_mbpo[extra] @ git+{REPOSITORY}"')

# The test of this notebook sets a smaller number.
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 600))

# %%
import time

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import DHMBPO

# %% [markdown]
# ## Three agents, the same real steps
#
# - `SAC` with its defaults: one update per step.
# - `SAC` with 10 updates per step: the simplest way to use more computation for fewer real steps.
# - `DHMBPO`: one update per step, which looks five steps ahead through the learned dynamics.
#
# All have the same 100 random steps, the same seed and the same evaluation episodes.

# %%
AGENTS = {
    "SAC, 1 update per step": (SAC, {}),
    "SAC, 10 updates per step": (SAC, {"gradient_steps": 10}),
    "DHMBPO, 1 update per step": (DHMBPO, {}),
}
curves, rows = {}, {}
for name, (algorithm, settings) in AGENTS.items():
    agent = algorithm("MlpPolicy", "Pendulum-v1", learning_starts=100, seed=0, **settings)
    folder = f"against/{len(curves)}"
    env = Monitor(gym.make("Pendulum-v1"))
    env.reset(seed=100)
    callback = EvalCallback(env, eval_freq=100, log_path=folder, verbose=0)
    start = time.process_time()
    agent.learn(STEPS, callback=callback)
    results = np.load(f"{folder}/evaluations.npz")
    curves[name] = results["timesteps"], results["results"].mean(axis=1)
    passed = results["timesteps"][curves[name][1] > -200]
    rows[name] = {
        "return at the end": round(curves[name][1][-1]),
        "steps to -200": passed[0] if len(passed) else f"not in {STEPS}",
        "CPU seconds, with evaluations": round(time.process_time() - start),
    }

# %%
figure, axes = plt.subplots(figsize=(7, 4))
for name, (steps, returns) in curves.items():
    axes.plot(steps, returns, marker="o", label=name)
axes.axhline(-200, color="gray", linestyle="--")
axes.set(xlabel="real steps", ylabel="mean return", title="Pendulum-v1, seed 0")
axes.legend()
plt.show()

# %%
pd.DataFrame(rows).T

# %% [markdown]
# ## How to read it
#
# - The model buys real steps and costs computation. If a real step is free, take SAC with one update per step and more steps.
#   If a real step is slow or wears a machine, the model pays.
# - SAC with more updates per step is a strong baseline on small tasks. Always include it.
# - **This is one seed.** It shows how to compare, not who is better. Three seeds of this task, and more tasks, are in
#   [the results of DHMBPO](../dhmbpo.md#results).
#
# ## The same with one command
#
# `sb3_mbpo compare` trains several seeds in parallel processes and writes a report with figures, intervals and settings:
#
# ```bash
# pip install ".[compare,mujoco]"
# sb3_mbpo compare --env Pendulum-v1 --algo dhmbpo sac sac:gradient_steps=20 --seeds 3 --steps 2000 --threshold -200
# ```
