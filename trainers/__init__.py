"""Trainers on transformers' Trainer, one a model."""
