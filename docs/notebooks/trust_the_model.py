# %% [markdown]
# # When to trust the model
#
# After this notebook you can tell whether an agent's model is good, how far ahead it predicts, and what the agent does when it
# is not good. It takes about two minutes on one CPU core.
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
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 850))

# %%
import warnings

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.logger import configure

from sb3_mbpo import MBPO, ModelErrorCallback, write_report

# %% [markdown]
# ## An agent that measures its model
#
# `ModelErrorCallback` plays new episodes in a separate env and compares the dynamics with them. The agent learns exactly as
# without it. `rollout_schedule="auto"` sets the rollout length k by the same question: over how many steps does the dynamics
# predict well? To be quick, this agent makes 4 updates per step instead of 20 and imagines less.

# %%
SMALLER = {
    "gradient_steps": 4,
    "rollout_batch_size": 10_000,
    "model_train_freq": 200,
    "learning_starts": 200,
}


def learn(make_env, folder, **arguments):
    agent = MBPO("MlpPolicy", make_env(), seed=0, **SMALLER, **arguments)
    agent.set_logger(configure(folder, ["csv"]))
    callback = ModelErrorCallback(make_env, every=200, n_episodes=2)
    agent.learn(STEPS, callback=callback, log_interval=1)
    return agent, callback.diagnosis, pd.read_csv(f"{folder}/progress.csv")


def make_pendulum():
    return gym.make("Pendulum-v1")


agent, diagnosis, log = learn(make_pendulum, "trust/pendulum", rollout_schedule="auto")
names = ("error_1", "error_20", "rollout_length")
columns = ["time/total_timesteps", *(f"model_error/{name}" for name in names)]
log[columns].dropna().round(3)

# %% [markdown]
# The errors are in standard deviations of the observation: 1 is as wrong as always predicting the mean. They are those after 1
# step and after 20 steps without a look at the real env. With "auto", k (`rollout_length`) grows as the model gets better.
#
# ## Imagined against real
#
# One real episode, and what the dynamics imagines from the same start with the same actions. Each of the 20 thin lines draws
# its own noise. Where they spread, the dynamics is not sure.

# %%
env = gym.make("Pendulum-v1")
obs, _ = env.reset(seed=3)
real, actions = [obs], []
for _ in range(60):
    action, _ = agent.predict(obs, deterministic=True)
    obs, *_ = env.step(action)
    real.append(obs)
    # The dynamics takes actions in [-1, 1], Pendulum's are in [-2, 2].
    actions.append(th.as_tensor(action / 2).repeat(20, 1))

imagined = [th.as_tensor(real[0]).repeat(20, 1)]
for action in actions:
    with th.no_grad():
        next_obs, _ = agent.dynamics.sample(imagined[-1], action)
    imagined.append(next_obs)
imagined = th.stack(imagined).numpy()  # (61, 20, 3)

figure, panels = plt.subplots(3, sharex=True, figsize=(7, 5.5))
labels = ("cos(angle)", "sin(angle)", "angular velocity")
for dimension, (panel, name) in enumerate(zip(panels, labels)):
    panel.plot(imagined[:, :, dimension], color="tab:orange", linewidth=0.6, alpha=0.6)
    panel.plot(np.array(real)[:, dimension], color="tab:blue")
    panel.set_ylabel(name)
panels[0].set_title("real (blue) and imagined (orange)")
panels[-1].set_xlabel("steps ahead")
plt.show()

# %% [markdown]
# ## How errors grow with the number of steps
#
# This is why MBPO branches short rollouts from real states, and does not imagine whole episodes. The dashed line is the limit
# of "auto": an error of a tenth of a standard deviation. "auto" measures it on the agent's newest steps at the last fit, and
# this figure on new episodes, so the two may differ.

# %%
lengths = range(1, 21)
scaled = [diagnosis.errors(k)[:, 1:] / diagnosis.spread[1:] for k in lengths]  # without the reward
errors = [np.sqrt(np.nanmean(error**2)) for error in scaled]
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(lengths, errors, marker="o")
axes.axhline(0.1, color="gray", linestyle="--")
axes.set(xlabel="steps ahead", ylabel="error, standard deviations", ylim=0)
axes.set_title(f"k of auto is {agent.rollout_length}")
plt.show()

# %% [markdown]
# ## A model that does not help: the gate
#
# Here the reward is replaced by noise. No model can predict it, so imagined rewards are useless. The agent notices: after each
# fit it compares the predictions with the real steps since the last fit. If the dynamics explains less than a tenth of their
# variance, it uses fewer imagined rows in a batch, and none below a twentieth. Then it is SAC with the same number of updates.


# %%
class Noise(gym.RewardWrapper):
    def reward(self, reward):
        return self.np_random.normal()


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    noisy, _, noisy_log = learn(lambda: Noise(make_pendulum()), "trust/noise")
names = ("explained_obs", "explained_reward", "gate", "real_share")
columns = [f"dynamics/{name}" for name in names]
last = {"Pendulum-v1": log, "reward is noise": noisy_log}
table = pd.concat({name: each[columns].dropna().tail(1) for name, each in last.items()})
table.droplevel(1).round(2)

# %% [markdown]
# With a good model the gate is `open`, and a quarter of each batch is real (`real_share`: 1 / updates per step). With noise, the gate names what is
# predicted worst, and batches are all real. After three fits without use, a warning says so:

# %%
for warning in caught:
    if "imagined" in str(warning.message):
        print(warning.message)

# %% [markdown]
# ## The report
#
# All of this on one page, for any agent, also a saved one: `write_report(agent, "report.html")`, or on the command line
# `python -m sb3_mbpo report agent.zip --env Pendulum-v1`. In a notebook, `write_report(...)` as the last line of a cell shows
# the page. It needs no internet, so it can be sent to others.

# %%
report = write_report(agent, "report.html")
print(f"{report.path}, {report.path.stat().st_size // 1024:,} kB")
