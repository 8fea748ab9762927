"""The fourth pass: a plan becomes a sharded JAX function, with its meshes, shardings and formats."""
