"""The models, their shared layers and their attention."""
