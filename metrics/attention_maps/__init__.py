"""How well a model's relevance maps fit where it should have looked, and what its answers depend on."""
