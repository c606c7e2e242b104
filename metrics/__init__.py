"""Metrics: each folder is an evaluate.Metric that evaluate.load(path) also loads."""
