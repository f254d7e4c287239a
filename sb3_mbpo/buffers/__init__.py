"""Replay buffer of real transitions and model buffer of imagined ones."""
