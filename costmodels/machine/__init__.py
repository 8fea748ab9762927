"""Chips, topologies, and the collectives on them."""
