"""The CP-SAT model and its solver, on the whole of what presolve leaves or on parts of it."""
