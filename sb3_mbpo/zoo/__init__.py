"""The RL Zoo's commands for the algorithms of this package."""
