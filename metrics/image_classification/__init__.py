"""How well images were classified: the first class, the first five, and each class by itself."""
