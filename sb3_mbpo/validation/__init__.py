"""Checks of arguments, spaces, wrappers and env outputs, with errors that say what to do."""
