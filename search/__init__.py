"""The layout search: strategies, reshards, the CP-SAT model and its independent checker, without JAX."""
