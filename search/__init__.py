"""Which layout is best: strategies, reshards, the CP-SAT model and its independent checker. Knows no JAX."""
