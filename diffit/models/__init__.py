"""Floor 1: the networks, and the zoo that names them."""
