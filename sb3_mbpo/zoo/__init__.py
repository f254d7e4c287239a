"""The RL Zoo's commands with the algorithms of this package."""
