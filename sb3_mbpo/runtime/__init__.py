"""The machine: threads, memory, denormal numbers, versions."""
