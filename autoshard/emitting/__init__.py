"""The fourth pass: from a plan to a sharded JAX function, with its mesh, shardings and formats."""
