"""Random calls of primitives, examples of each, and what is defined of a decomposition."""
