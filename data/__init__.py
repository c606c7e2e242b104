"""Data sets: generators, and readers of real formats."""
