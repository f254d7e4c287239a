"""The shift between the current policy and earlier ones."""

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch as th

from sb3_mbpo.buffers.normalization import normalize_obs
from sb3_mbpo.diagnostics.metrics import gaussian_total_variation

# Number of draws to estimate a total variation, and maximum number of states to average it over.
N_DRAWS, MOST_STATES = 200, 500


def snapshot(agent: Any) -> dict[str, Any] | None:
    """
    A copy of the current policy: the weights of the actor and the statistics of VecNormalize.

    :param agent: a ModelBased algorithm
    :return: tensors and arrays; ``None`` if the policy is deterministic, and has no density to compare
    """
    if not hasattr(agent.actor, "get_action_dist_params"):
        return None
    weights = {name: tensor.detach().clone() for name, tensor in agent.actor.state_dict().items()}
    env = agent._vec_normalize_env
    if env is None or not env.norm_obs:
        return {"weights": weights}
    # For each entry of a Dict; a Box is a single one.
    statistics = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
    moments = {key: (rms.mean.copy(), rms.var.copy()) for key, rms in statistics.items()}
    return {"weights": weights, "obs_moments": moments}


@th.no_grad()
def gaussians(agent: Any, actor: Any, of: Mapping[str, Any], obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The policy's Gaussians before the squashing tanh.

    :param agent: a ModelBased algorithm, for the shape of observations and the settings of its VecNormalize
    :param actor: a copy of the agent's actor, into which the snapshot's weights are loaded
    :param of: a snapshot
    :param obs: raw observations ``(B, obs_dim)``
    :return: mean and standard deviation, each ``(B, action_dim)``
    :raises ValueError: the snapshot has other networks
    """
    try:
        actor.load_state_dict(of["weights"])
    except RuntimeError as error:
        raise ValueError("an earlier policy has other networks than this one") from error
    rows = agent.codec.unflatten(th.as_tensor(obs, dtype=th.float32, device=agent.device))
    if "obs_moments" in of:
        # What normalize_obs reads of a RunningMeanStd
        rms = {key: SimpleNamespace(mean=mean, var=var) for key, (mean, var) in of["obs_moments"].items()}
        now = agent._vec_normalize_env
        env: Any = SimpleNamespace(
            norm_obs=True, obs_rms=rms if agent.codec.is_dict else rms[""], epsilon=now.epsilon, clip_obs=now.clip_obs
        )
        rows = normalize_obs(rows, env)
    mean, log_std, more = actor.get_action_dist_params(rows)
    normal = actor.action_dist.proba_distribution(mean, log_std, **more).distribution
    return normal.mean.double().cpu().numpy(), normal.stddev.double().cpu().numpy()


def policy_shift(agent: Any, earlier: Sequence[Mapping[str, Any]], obs: np.ndarray) -> float:
    """
    An estimate of eps_pi, the total variation between the policy and the one that collected the data.

    The data was collected by a mixture of earlier policies, and D_TV from a mixture is at most the mean of D_TV from its
    parts. This mean over the snapshots and the given states is returned. The theorems use the maximum over all states, which
    cannot be sampled. The random actions of the warm-up are not included.

    :param agent: a ModelBased algorithm with a stochastic policy
    :param earlier: snapshots, at least one
    :param obs: states visited by the current policy, raw ``(B, obs_dim)``
    :return: from 0 to 1
    """
    places = np.arange(min(len(obs), MOST_STATES)) * len(obs) // min(len(obs), MOST_STATES)
    now = snapshot(agent)
    assert now is not None
    actor = copy.deepcopy(agent.actor)
    actor.set_training_mode(False)
    present = gaussians(agent, actor, now, obs[places])
    noise = np.random.default_rng(0).standard_normal((N_DRAWS, present[0].shape[1]))
    apart = [gaussian_total_variation(*present, *gaussians(agent, actor, one, obs[places]), noise) for one in earlier]
    return float(np.mean(apart))
