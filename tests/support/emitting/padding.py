"""The law of padding: a program whose dimensions are padded computes what it computes without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from autoshard.annotating.masks import pad_traced
from autoshard.annotating.padding import Occurrences, Padding, dimensions_of, paddings_by_value
from autoshard.emitting.padding import padded, unpadded
from autoshard.tracing.blocks import Literal, Traced
from tests.support.layout_strategies import (
    assert_equal,
    assert_well_formed,
    cpu_topology,
    problem_of,
    quick,
    random_choices,
    run_planned,
    traced_on,
)


def paddable(traced: Traced, operations: Iterable[int] | None = None) -> list[Occurrences]:
    """The dimensions that may be padded, of some operations or of the matmuls."""
    return [each for each in dimensions_of(traced.program, operations) if not each.refusal]


def draw_paddings(dimensions: Iterable[Occurrences], rng: np.random.Generator) -> list[Padding]:
    """Random paddings of some of the dimensions, no two of which overlap."""
    chosen: list[Occurrences] = []
    for each in dimensions:
        if rng.random() < 0.7 and not any(each.overlaps(other) for other in chosen):
            chosen.append(each)
    return [each.padding(each.size + int(rng.integers(1, 6))) for each in chosen]


def assert_padding_does_not_matter(
    fn: Callable[..., Any],
    *args: Any,
    paddings: Callable[[Traced], list[Padding]],
    shape: str = "2x2",
    count: int = 2,
    seed: int = 0,
    tolerance: float = 1e-4,
    defined: Callable[..., list[Any]] | None = None,
) -> list[Padding]:
    """Runs a padded function under random layouts, compares with the function itself, and returns its paddings."""
    topology = cpu_topology(shape)
    plain = traced_on(topology, fn, *args)
    chosen = paddings(plain)
    traced = pad_traced(plain, chosen)
    assert_well_formed(traced)
    by_value = paddings_by_value(traced.program, chosen)
    values = (*traced.argument_values, *traced.constant_values)
    given = _at_once(padded, (*jax.tree.leaves(args), *traced.constants), [by_value.get(v, ()) for v in values])
    choices = random_choices(problem_of(traced, topology), np.random.default_rng(seed), count)
    outputs = [() if isinstance(v, Literal) else by_value.get(v, ()) for v in traced.block.outputs]
    expected = jax.jit(fn, compiler_options=quick())(*args)
    for results in run_planned(replace(traced, constants=()), topology, choices, *given):
        assert_equal(_at_once(unpadded, results, outputs), expected, tolerance, defined)
    return chosen


def _at_once(resize: Callable[..., Any], arrays: Sequence[Any], paddings: Sequence[Sequence[Padding]]) -> list[Any]:
    """Arrays with their paddings, or without, in one compilation."""
    return jax.jit(lambda *flat: list(map(resize, flat, paddings)), compiler_options=quick())(*arrays)
