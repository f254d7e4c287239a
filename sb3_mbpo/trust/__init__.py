"""How far predictions are used: bounds, filters, rollout length, imagined fraction."""
