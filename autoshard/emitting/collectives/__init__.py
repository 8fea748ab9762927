"""Collectives as JAX operations on one chip's shard."""
