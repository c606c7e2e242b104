"""Checkpoints: each folder is a complete Hub repository; the default ones ship with the package."""
