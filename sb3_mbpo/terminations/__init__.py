"""Terminations of imagined episodes: known rules and a learned one."""
