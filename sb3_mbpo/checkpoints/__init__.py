"""Runs that are cut and go on: checkpoints, the state of training and of envs."""
