"""Shared by all tests."""

import torch as th

# Small networks, and several test processes side by side: more threads only get in each other's way.
th.set_num_threads(1)
