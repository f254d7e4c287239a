"""Checkpoints: the state of a run, of its envs and of its callbacks, saved and restored."""
