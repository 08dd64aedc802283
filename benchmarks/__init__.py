"""Ours against the rivals on the same inputs in one process."""
