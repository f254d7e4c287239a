"""
mbrl-lib's MBPO, for benchmarks/speed.py: its own configuration, except that sizes, updates per step and the entropy
coefficient are as in ours, the target networks follow after each update, and nothing is evaluated.

It trains SAC on imagined transitions only (its ``real_data_ratio: 0``).
"""

import tempfile
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import hydra.utils
import mbrl.util.common
import numpy as np
import torch as th
from mbrl.algorithms import mbpo
from mbrl.env.termination_fns import hopper
from mbrl.models import ModelEnv, ModelTrainer, OneDTransitionRewardModel
from mbrl.planning.sac_wrapper import SACAgent
from mbrl.third_party.pytorch_sac_pranz24.sac import SAC
from mbrl.util import ReplayBuffer
from omegaconf import DictConfig, OmegaConf

from peers import Stopwatch, period, seconds, serve

OBS, ACT = 11, 3


# Hopper's, in the form of their configuration files.
CONFIGURATION = """
seed: 0
device: cpu
dynamics_model:
  _target_: mbrl.models.GaussianMLP
  activation_fn_cfg: {_target_: torch.nn.SiLU}
  device: cpu
  num_layers: 4
  hid_size: 200
  ensemble_size: 7
  deterministic: false
  propagation_method: random_model
  learn_logvar_bounds: true
algorithm:
  learned_rewards: true
  target_is_delta: true
  normalize: true
  normalize_double_precision: true
  random_initial_explore: true
  initial_exploration_steps: 1000
  dataset_size: 100000
  freq_train_model: 250
  real_data_ratio: 0.0
  sac_samples_action: true
  num_eval_episodes: 1
  agent:
    _target_: SAC
    args:
      {policy: Gaussian, hidden_size: 256, lr: 0.0003, gamma: 0.99, tau: 0.005, target_update_interval: 1, device: cpu,
       alpha: 0.2, automatic_entropy_tuning: true, target_entropy: null}
overrides:
  num_elites: 5
  patience: 5
  model_lr: 0.001
  model_wd: 0.00001
  model_batch_size: 256
  validation_ratio: 0.2
  freq_train_model: 250
  effective_model_rollouts_per_step: 400
  rollout_schedule: [1, 2, 1, 1]
  num_epochs_to_retain_sac_buffer: 1
  num_sac_updates_per_step: 20
  sac_updates_every_steps: 1
  sac_batch_size: 256
"""


def configuration(**overrides: int) -> DictConfig:
    config = OmegaConf.create(CONFIGURATION)
    config.overrides.update(overrides)
    return config


def make(config: DictConfig, instantiate: Any = hydra.utils.instantiate) -> Any:
    """``hydra.utils.instantiate``, which can neither make SAC's action space nor keep its hands off SiLU any more."""
    if config._target_ == "SAC":
        return SAC(OBS, gym.spaces.Box(-1, 1, (ACT,)), config.args)
    return instantiate(config, _recursive_=False)


hydra.utils.instantiate = make


@cache
def data(n: int) -> ReplayBuffer:
    """Random rows in a buffer like that of their MBPO."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(n, (OBS,), (ACT,), np.double, np.double, np.double, rng=rng)
    rows = [rng.standard_normal((n, size)) for size in (OBS, ACT, OBS)]
    buffer.add_batch(*rows, rng.standard_normal(n), np.zeros(n, bool), np.zeros(n, bool))
    return buffer


@cache
def parts() -> tuple[Any, ModelTrainer, SACAgent]:
    config = configuration()
    dynamics = mbrl.util.common.create_one_dim_tr_model(config, (OBS,), (ACT,))
    dynamics.set_elite(range(5))
    return dynamics, ModelTrainer(dynamics, optim_lr=1e-3, weight_decay=1e-5), SACAgent(make(config.algorithm.agent))


def fit(train: int, epochs: int) -> dict[str, Any]:
    """Seconds per epoch, with ``train`` transitions and validation on a quarter as many."""
    dynamics, trainer, _ = parts()
    settings = configuration(num_epochs_train_model=epochs, patience=epochs + 1).overrides
    fit = partial(mbrl.util.common.train_model_and_save_model_and_data, dynamics, trainer, settings, data(train * 5 // 4))
    # (model, calls so far, epoch, ...)
    return {"seconds": period(lambda tick: fit(callback=lambda *args: tick(f"epoch {args[2]}")))}


@cache
def rollout_parts() -> tuple[Any, ...]:
    dynamics, _, agent = parts()
    env = gym.make("Hopper-v5")
    imagined = ReplayBuffer(400_000, (OBS,), (ACT,), rng=np.random.default_rng(0))
    return ModelEnv(env, dynamics, hopper, None, generator=th.Generator()), data(10_000), agent, imagined


def rollout(n: int) -> dict[str, Any]:
    return {"seconds": seconds(mbpo.rollout_model_and_populate_sac_buffer, *rollout_parts(), True, 1, n)}


def loop(steps: int) -> dict[str, Any]:
    """Random steps, then so many real ones; returns seconds by phase, and the gradient steps of all fits."""
    watch = Stopwatch()
    phases: dict[str, list[tuple[Any, str]]] = {
        "SAC updates": [(SAC, "update_parameters")],
        "fits": [(mbrl.util.common, "train_model_and_save_model_and_data")],
        "rollouts": [(mbpo, "rollout_model_and_populate_sac_buffer")],
        "env and policy": [(mbrl.util.common, "step_env_and_add_to_buffer")],
        "fit steps": [(OneDTransitionRewardModel, "update")],
    }
    mbpo.evaluate = lambda *args: 0.0
    mbpo.VideoRecorder = lambda folder: type("Nothing", (), {"save": lambda self, name: None})()
    with tempfile.TemporaryDirectory() as folder, watch.timing(phases):
        env = gym.make("Hopper-v5")
        total = seconds(mbpo.train, env, env, hopper, configuration(num_steps=steps, epoch_length=steps), True, folder)
    calls = {"fit steps": watch.calls["fit steps"], "updates": watch.calls["SAC updates"]}
    return {"whole loop": total, **watch.seconds, **calls}


def versions() -> dict[str, Any]:
    return {"versions": f"mbrl {version('mbrl')}, torch {th.__version__}"}


if __name__ == "__main__":
    serve({"fit": fit, "rollout": rollout, "loop": loop, "versions": versions})
