"""The reward as a function of the transition: learned, or a user's compared with the real ones."""
