"""A faster SAC update: explicit gradients on the CPU, a CUDA graph on a GPU."""
