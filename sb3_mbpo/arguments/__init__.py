"""What users pass to an algorithm: arguments, functions, wrapped envs; checked at construction."""
