"""How well objects were counted one by one: the count, the points at the objects, and the decision to stop."""
