"""Dynamics models: the base class and the paper's ensemble."""
