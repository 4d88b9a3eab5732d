"""How each ATen operator carries channels through a network's graph."""
