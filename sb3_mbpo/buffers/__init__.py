"""The replay buffer of real transitions, and the model buffer of imagined ones."""
