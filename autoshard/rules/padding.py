"""Padding per primitive: the fill that it needs, and whether it keeps zeros; data for `autoshard.annotating.padding`.

A padded dimension is longer than the program's: its last elements are not part of any array. A primitive accepts padding
if its other results do not depend on these elements, or if a fill value makes them neutral.
"""

from __future__ import annotations

from typing import Literal

from autoshard.rules.elementwise import LINEAR, MARKERS, NONLINEAR

Fill = Literal["zero", "lowest", "highest", "false", "true"]
"""The value of padded elements that leaves a reduction unchanged."""

NEUTRAL: dict[str, Fill] = {
    "dot_general": "zero",
    "reduce_sum": "zero",
    "reduce_max": "lowest",
    "reduce_min": "highest",
    "reduce_or": "false",
    "reduce_and": "true",
    "scatter-add": "zero",
    "scatter-sub": "zero",
}
"""Reductions, with the fill of the padded elements of their reduced dimensions."""

_ELEMENTWISE = frozenset({*NONLINEAR, *LINEAR, *MARKERS}) - {"threefry2x32", "pvary", "reshard", "shard_map_layout"}

_BY_DIMENSION = frozenset(
    """
    add add_any argmax argmin broadcast_in_dim concatenate convert_element_type cumlogsumexp cummax cummin cumprod cumsum div
    dynamic_slice dynamic_update_slice gather iota mul pad reduce_prod reduce_xor reshape rev scatter scatter-add scatter-max
    scatter-min scatter-mul scatter-sub select_n slice sort split squeeze stack sub top_k transpose unstack
    """.split()
)

ACCEPTING = _ELEMENTWISE | _BY_DIMENSION | frozenset(NEUTRAL)
"""Primitives whose `parallel` dimensions may be padded: no other element depends on the padded ones.

Random numbers are not among them: they depend on the shape.
"""

LOOKED_UP = frozenset({"gather", "dynamic_slice", "slice"})
"""Primitives that read single elements of a `sum` dimension, by an index within the dimension as it is without padding."""

BY_POSITION = LOOKED_UP | frozenset(
    "dynamic_update_slice iota scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub".split()
)
"""Primitives whose results depend on positions within a dimension: padding may only be at its end."""

KEEPING_ZERO = frozenset(
    """
    abs add add_any asin asinh atan atanh broadcast_in_dim ceil concatenate conj convert_element_type copy dynamic_slice
    dynamic_update_slice erf expm1 floor gather imag log1p max min neg real reduce_max reduce_min reduce_precision
    reduce_sum reshape round select_n sharding_constraint sign sin sinh slice split sqrt square squeeze
    stop_gradient sub tan tanh transpose
    """.split()
)
"""Primitives whose result is zero where all operands (except a selector and indices) are zero."""

MULTIPLYING = frozenset({"mul", "dot_general"})
"""Primitives whose result is zero where one operand is zero and the others are finite."""
