"""Configurations of the models: one declared, validated file each."""
