"""Image processors, tokenizers and processors: from files to tensors and back."""
