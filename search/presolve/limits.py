"""The tolerances for comparing bound and plan."""

from collections.abc import Callable

Say = Callable[[str], None]
"""Called with a line of text now and then."""

TOLERANCE = 1e-9
"""Relative difference between bound and plan that counts as 0: sums of thousands of terms differ by as much."""
PRECISION = 1e-6
"""The part of a plan's cost that rounding in the integer model may leave undecided.

The proof reports the actual value.
"""
