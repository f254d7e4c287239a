"""Learning beside acting: a second process learns while the first one steps the env."""
