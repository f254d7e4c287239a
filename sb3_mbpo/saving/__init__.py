"""Saves and loads agents, replay buffers and policies."""
