"""Benchmark programs a user can run."""
