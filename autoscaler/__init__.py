"""How many replicas are needed, and where to get them."""
