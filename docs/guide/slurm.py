"""
Train on a Slurm cluster with submitit.

A job that is pre-empted, or that runs out of time, saves and is queued again.

    pip install ".[slurm,mujoco]"
    python slurm.py --cluster slurm --folder /shared/runs/hopper_0
"""

import argparse
import os
import signal
from typing import Any

import submitit

from sb3_mbpo import MBPO, ResumeCallback


class Training(submitit.helpers.Checkpointable):
    """A job that may be run again: it continues where it was interrupted."""

    def __call__(self, folder: str, env: str, steps: int, **settings: Any) -> int:
        # submitit's signal before the end. It ignores SIGTERM, which Slurm may send.
        callback = ResumeCallback(folder, signals=["SIGUSR2"], verbose=1)
        agent = MBPO("MlpPolicy", env, **settings).learn(steps, callback)
        if callback.interrupted is not None:
            # All is saved. submitit's handler queues the job again and ends this one.
            os.kill(os.getpid(), getattr(signal, callback.interrupted))
        return agent.num_timesteps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    # For checkpoints; every machine must see it.
    parser.add_argument("--folder", required=True)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=125_000)
    args = parser.parse_args()
    jobs = os.path.join(args.folder, "jobs")
    executor = submitit.AutoExecutor(folder=jobs, cluster=args.cluster)
    # As many cores as threads. Slurm sends the signal 90 seconds before the end.
    executor.update_parameters(
        timeout_min=240, cpus_per_task=1, slurm_max_num_timeout=20
    )
    job = executor.submit(Training(), args.folder, args.env, args.steps)
    print(f"job {job.job_id}, output in {job.paths.stdout}")
    print(f"{job.result():,} steps")


if __name__ == "__main__":
    main()
