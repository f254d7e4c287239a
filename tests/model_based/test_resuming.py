import signal
import threading

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO, InvalidTransition, ResumeCallback
from sb3_mbpo.checkpoints.checkpoint import listed, read


def test_no_handlers_without_the_callback_nor_off_the_main_thread(tmp_path):
    before, seen = signal.getsignal(signal.SIGTERM), []

    class Look(BaseCallback):
        def _on_step(self):
            seen.append(signal.getsignal(signal.SIGTERM))
            return True

    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    agent.learn(2, Look())
    thread = threading.Thread(target=agent.learn, args=(2, [ResumeCallback(tmp_path), Look()]))
    thread.start(), thread.join()
    assert seen == [before] * 4


def test_an_error_leaves_the_handlers_as_they_were(tmp_path):
    class Fail(BaseCallback):
        def _on_step(self):
            raise RuntimeError("mine")

    before = signal.getsignal(signal.SIGTERM)
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.raises(RuntimeError, match="mine"):
        agent.learn(10, [ResumeCallback(tmp_path), Fail()])
    assert signal.getsignal(signal.SIGTERM) is before and agent.resume_callback is None


def test_tensorboard_goes_on_in_its_folder(tmp_path):
    pytest.importorskip("tensorboard")

    for total in (35, 60):
        agent = MBPO("MlpPolicy", "Pendulum-v1", tensorboard_log=str(tmp_path / "tb"), **FAST)
        agent.learn(total, ResumeCallback(tmp_path / "run"))
    assert agent.num_timesteps == 60
    assert [path.name for path in (tmp_path / "tb").iterdir()] == ["MBPO_1"]


@pytest.mark.parametrize("of_agent, of_callback", [(0, 0), (1, 0), (0, 1)])
def test_a_resume_says_so(tmp_path, capsys, of_agent, of_callback):
    MBPO("MlpPolicy", "Pendulum-v1", verbose=of_agent, **FAST).learn(2, ResumeCallback(tmp_path))
    agent = MBPO("MlpPolicy", "Pendulum-v1", verbose=of_agent, **FAST)
    capsys.readouterr()
    agent.learn(4, ResumeCallback(tmp_path, verbose=of_callback))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Resumed at step 2 from")]
    assert len(lines) == max(of_agent, of_callback)


def test_saving_an_agent_in_the_midst_of_a_run(tmp_path):
    """Its zip knows nothing of the callback."""
    callbacks = [ResumeCallback(tmp_path / "run"), CheckpointCallback(30, str(tmp_path), "agent")]
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40, callbacks)
    assert MBPO.load(tmp_path / "agent_30_steps.zip").resume_callback is None


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize], ids=["raw", "normalised"])
def test_an_invalid_transition_leaves_a_checkpoint(tmp_path, wrap):
    """The error passes through; the run goes on from there, at the start of an episode, once the env is mended."""

    def made():
        return MBPO("MlpPolicy", wrap(make_vec_env("Pendulum-v1", 1)), **FAST)

    class Break(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 33:
                self.training_env.envs[0].unwrapped.state[1] = float("nan")
            return True

    agent = made()
    with pytest.raises(InvalidTransition, match="after 33 steps"):
        agent.learn(60, [ResumeCallback(tmp_path), Break()])
    seen = None if wrap is not VecNormalize else agent.env.obs_rms.count
    saved = next(listed(tmp_path))
    state, tensors = read(saved.path)
    assert saved.step == 33 and "failed" in state["envs_lost"]
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    with pytest.warns(UserWarning, match="start of an episode"):
        agent = made().learn(60, ResumeCallback(tmp_path))
    assert agent.num_timesteps == 60 and agent.replay_buffer.size() == 60
    assert all(th.isfinite(parameter).all() for parameter in agent.policy.parameters())
    if seen is not None:
        # The statistics went on: a reset and 27 steps more.
        assert agent.env.obs_rms.count == pytest.approx(seen + 28) and np.isfinite(agent.env.obs_rms.mean).all()


def test_a_diverged_agent_is_not_saved(tmp_path):
    """The error names it, and the newest checkpoint is that of before."""

    class Spoil(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 33:
                next(self.model.policy.parameters()).data.fill_(float("nan"))
            return True

    callback = ResumeCallback(tmp_path, every=10)
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match="Learning has diverged: after 33 steps"):
        agent.learn(60, [callback, Spoil()])
    saved = next(listed(tmp_path))
    tensors = {name: tensor for name, tensor in read(saved.path)[1].items() if name.startswith("parameters.policy.")}
    assert saved.step < 33 and tensors and all(tensor.isfinite().all() for tensor in tensors.values())
