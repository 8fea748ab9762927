"""Chains of grouped matmuls on one chip: their equations on some of the rows, and rows sent to the chips of their groups."""
