"""Reads and checks at construction what users pass to an algorithm: arguments, functions, wrapped envs."""
