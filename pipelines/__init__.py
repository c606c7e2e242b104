"""Tasks for transformers.pipeline, one file each."""
