"""Cost models of operations, collectives and chips. Imports neither JAX nor OR-Tools."""
