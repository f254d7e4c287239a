# %% [markdown]
# # Your own environment
#
# After this notebook you can train on an environment that you wrote, with actions that are not symmetric, observations in any
# unit, and episodes that end by a rule that the agent has to learn. And you can go on after an interruption.
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
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 700))

# %%
import shutil
import signal
import warnings

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import DHMBPO, ResumeCallback

# %% [markdown]
# ## The environment
#
# A drone of 1 kg that moves up and down. Three things make it a typical environment of one's own:
#
# - The motor only pushes upwards, from 0 to 20 N, and 9.81 N keep the drone in the air. **The range of actions is not
#   symmetric.** SB3 scales it to [-1, 1] for the agent; you have nothing to do.
# - Height is in millimeters and speed in meters per second. **The scales differ**, so `VecNormalize` is useful. The dynamics
#   normalizes by itself, but the actor and the critics do not.
# - The episode ends when the drone touches the ground or the ceiling, 4 m above it. The agent is not told this rule.
#   **It learns from real episodes when an episode ends.**
#
# The reward is 1 at a height of 2 m, and less the further the drone is from it. The last two methods are for resuming: they say
# what changes while the env runs. Without them everything else is restored, and the run continues at the start of an episode.


# %%
class Hover(gym.Env):
    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(-10_000, 10_000, (2,), dtype=np.float32)
    action_space = gym.spaces.Box(0.0, 20.0, (1,), dtype=np.float32)

    def _observe(self):
        return np.array([1000 * self.height, self.speed], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.height, self.speed = self.np_random.uniform(0.5, 3.5), self.np_random.uniform(-0.5, 0.5)
        return self._observe(), {}

    def step(self, action):
        self.speed += 0.05 * (float(action[0]) - 9.81)
        self.height += 0.05 * self.speed
        crashed = not 0 < self.height < 4
        reward = 1 - abs(self.height - 2) / 2
        return self._observe(), reward, crashed, False, {}

    def get_state(self):
        return {"height": self.height, "speed": self.speed}

    def set_state(self, state):
        self.height, self.speed = state["height"], state["speed"]


with warnings.catch_warnings():
    # It recommends a symmetric range of actions. SB3 makes one of this range.
    warnings.simplefilter("ignore")
    check_env(Hover(), skip_render_check=True)
gym.register("Hover-v0", Hover, max_episode_steps=100)

# %% [markdown]
# `max_episode_steps=100` is a *time limit*: after 100 steps the env reports `truncated`. This is not an end of the task, and the
# agent does not learn it as one. Do not report a time limit as `terminated`.
#
# ## Train, and be interrupted
#
# `ResumeCallback` needs a folder. It saves a checkpoint from time to time, and when the process gets a signal such as SIGTERM,
# as a cluster sends it at the end of a job. Here a callback of our own sends it to this process, half-way.


# %%
def make_agent():
    env = VecNormalize(make_vec_env(lambda: gym.make("Hover-v0"), seed=0), norm_reward=False)
    return DHMBPO("MlpPolicy", env, learning_starts=100, model_train_freq=200, seed=0)


class TimeIsUp(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == STEPS // 2:
            signal.raise_signal(signal.SIGTERM)
        return True


shutil.rmtree("hover", ignore_errors=True)
agent = make_agent()
agent.learn(STEPS, callback=[ResumeCallback("hover"), TimeIsUp()])
print(f"interrupted after {agent.num_timesteps} steps")

# %% [markdown]
# ## Go on
#
# The same program, run again, makes a new agent, finds the checkpoint and makes the remaining steps. On a CPU the result is
# equal, bit for bit, to that of a run that was not interrupted, because the env can be restored. The statistics of
# `VecNormalize` are part of the checkpoint.

# %%
agent = make_agent()
agent.learn(STEPS, callback=ResumeCallback("hover", verbose=1))
print(f"{agent.num_timesteps} steps in all")

# %% [markdown]
# ## What it reached
#
# The height in five episodes. For an episode of evaluation the observation has to be normalized with the same statistics.


# %%
def heights_of_an_episode(seed):
    env = gym.make("Hover-v0")
    obs, _ = env.reset(seed=seed)
    heights, total, done = [obs[0] / 1000], 0.0, False
    while not done:
        action, _ = agent.predict(agent.get_vec_normalize_env().normalize_obs(obs), deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        heights.append(obs[0] / 1000)
        total, done = total + reward, terminated or truncated
    return heights, total


figure, axes = plt.subplots(figsize=(7, 3.5))
for seed in range(5):
    heights, total = heights_of_an_episode(seed)
    axes.plot(heights, label=f"return {total:.0f}")
axes.axhspan(-0.2, 0, color="gray", alpha=0.4)
axes.axhspan(4, 4.2, color="gray", alpha=0.4)
axes.set(xlabel="step of the episode", ylabel="height, m", title="five episodes; the best return is below 100")
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# ## Did it learn when an episode ends?
#
# The agent learned the rule from the real ends it has seen. `agent.learned_termination` is asked about next heights from -1 m
# to 5 m. The gray regions are the true rule.

# %%
heights = np.linspace(-1, 5, 301)
next_obs = th.as_tensor(np.stack([1000 * heights, np.zeros(301)], axis=1), dtype=th.float32)
actions = th.zeros(301, 1)
probability = agent.learned_termination.probability(next_obs, actions, next_obs).detach()
ends = agent.replay_buffer.dones.sum() - agent.replay_buffer.timeouts.sum()

figure, axes = plt.subplots(figsize=(7, 3))
axes.axvspan(-1, 0, color="gray", alpha=0.3, label="the true rule")
axes.axvspan(4, 5, color="gray", alpha=0.3)
axes.plot(heights, probability, label="learned: probability that the episode ends")
axes.set(xlabel="next height, m", title=f"learned from {ends:.0f} real ends")
axes.legend()
plt.show()

# %% [markdown]
# Ends on one side do not tell where the other side is. If the agent has never seen one of them, the line is wrong there.
# While an agent learns, `dynamics/termination_precision` and `dynamics/termination_recall` are logged. If you know the rule,
# pass it: `termination_fn=lambda obs, actions, next_obs: (next_obs[:, 0] <= 0) | (next_obs[:, 0] >= 4000)`. It gets raw
# observations. A function that disagrees with the real ends is noticed, and a warning is issued.
