"""Agents, buffers and policies as files, and back."""
