"""Loops: what is invariant, which stacks are updated in place, and how often a `while` runs."""
