"""SAC's update, faster: derivatives written out on the CPU, one CUDA graph on a GPU."""
