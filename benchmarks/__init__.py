"""Benchmarks that compare this project with its peers, on the same inputs in one process."""
