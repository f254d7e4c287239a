"""Settings and information of the machine: threads, memory, denormal numbers, versions."""
