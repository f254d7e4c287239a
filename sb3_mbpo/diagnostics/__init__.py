"""Accuracy of the dynamics: measured during learning, or reported for a saved agent."""
