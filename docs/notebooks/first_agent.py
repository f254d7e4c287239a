# %% [markdown]
# # Your first agent
#
# After this notebook you can train an agent, see how it learns, look at what it does, and save and load it.
# It takes about two minutes on one CPU core.
#
# If you know SB3's `SAC`, you know `DHMBPO`: the same arguments, callbacks, logger, `save` and `load`.
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
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 800))

# %%
import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import DHMBPO

# %% [markdown]
# ## Train
#
# `Pendulum-v1` is a pendulum that has to be swung up. An episode has 200 steps. The best returns are around -150, a random
# policy has about -1,200.
#
# The first 100 actions are random. Then the agent fits a model of the env (the *dynamics*), and makes one update in each step.
# An update looks five steps ahead through the dynamics. `EvalCallback` is SB3's: it plays five episodes every 100 steps.

# %%
agent = DHMBPO("MlpPolicy", "Pendulum-v1", learning_starts=100, seed=0)
env = Monitor(gym.make("Pendulum-v1"))
evaluation = EvalCallback(env, eval_freq=100, log_path="first_agent", verbose=0)
agent = agent.learn(STEPS, callback=evaluation)

# %% [markdown]
# ## The learning curve
#
# Each point is the mean return of five episodes, the band is their standard deviation. The agent has seen no more real steps
# than the axis shows.

# %%
results = np.load("first_agent/evaluations.npz")
mean, std = results["results"].mean(axis=1), results["results"].std(axis=1)
figure, axes = plt.subplots(figsize=(7, 3.5))
axes.plot(results["timesteps"], mean, marker="o")
axes.fill_between(results["timesteps"], mean - std, mean + std, alpha=0.2)
axes.axhline(-200, color="gray", linestyle="--", label="usually called solved")
axes.set(xlabel="real steps", ylabel="return", title="Pendulum-v1, seed 0")
axes.legend()
plt.show()

# %% [markdown]
# ## What it does
#
# The agent swings the pendulum up, and holds it there: the angle is 0 at the top.


# %%
def play(policy, seed):
    """:return: the angle and the torque in each step of an episode, and its return"""
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=seed)
    angles, torques, total, done = [], [], 0.0, False
    while not done:
        action = policy(obs)
        obs, reward, terminated, truncated, _ = env.step(action)
        angles.append(np.arctan2(obs[1], obs[0]))
        torques.append(action[0])
        total, done = total + float(reward), terminated or truncated
    return angles, torques, total


SEED = 4  # an episode that begins with the pendulum hanging down
rng = np.random.default_rng(0)
episodes = {
    "random actions": play(lambda obs: rng.uniform(-2, 2, 1), seed=SEED),
    "the agent": play(lambda obs: agent.predict(obs, deterministic=True)[0], seed=SEED),
}
figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 4.5))
for name, (angles, torques, total) in episodes.items():
    top.plot(angles, label=f"{name}, return {total:.0f}")
    bottom.plot(torques)
top.set(ylabel="angle, rad")
bottom.set(ylabel="torque", xlabel="step of the episode")
top.legend()
plt.show()

# %% [markdown]
# ## Save, load, go on
#
# The zip holds policy, optimizers and dynamics. The real transitions are a file of their own, as with SB3.

# %%
agent.save("first_agent/agent")
agent.save_replay_buffer("first_agent/buffer")

loaded = DHMBPO.load("first_agent/agent", env=gym.make("Pendulum-v1"))
loaded.load_replay_buffer("first_agent/buffer")
loaded.learn(50, reset_num_timesteps=False)
print(f"{loaded.num_timesteps} steps in all, {loaded.replay_buffer.size()} real transitions")

# %% [markdown]
# ## Next
#
# - [Your own environment](your_environment.ipynb)
# - [When to trust the model](trust_the_model.ipynb)
# - [DHMBPO against SAC](dhmbpo_and_sac.ipynb)
