"""Limits to the use of predictions: bounds, filters, rollout length, imagined fraction."""
