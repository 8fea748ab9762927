"""The buffers of a mixture of experts: those that do not fit into on-chip memory are in HBM, as in compiled programs."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.tracing.trace import trace
from costmodels.grouped_costs import grouped_rows
from costmodels.machine.topology import parse_topology
from costmodels.operations import evaluate, flops
from costmodels.program.grouped import grouped, own_rows, rows_in_all
from examples.mixtral import ragged_experts
from search.answer.check_grouped import GroupedWork
from search.memory.chain_buffers import chain_buffer_bytes, chains

MIB = 2**20


def mixture(tokens: int, width: int, hidden: int, experts: int, chosen: int) -> tuple[Any, tuple[Any, Any]]:
    """Tokens `[T, E]` and their experts' results."""
    shapes = {"router": (width, experts), "w_gate": (experts, width, hidden)}
    shapes |= {"w_up": shapes["w_gate"], "w_down": (experts, hidden, width)}
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def fn(layer: Any, x: Any) -> Any:
        return x + ragged_experts(layer, x, chosen)

    return fn, (layer, jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16))


@pytest.mark.parametrize(
    ("rows", "chip", "expected"),
    [
        (8192, "v5p:1x1x1", 2 * 8 + 16),  # two hidden arrays beside the rows
        (8192, "v5e:1x1", 0),  # all are on the chip
        (65_536, "v5p:1x1x1", 2 * 64 + 128),
        (65_536, "v5e:1x1", 64 + 128),  # one hidden array is on the chip, the rows never fit there
        (131_072, "v5e:1x1", 2 * 128 + 256),  # nothing fits
    ],
)
def test_the_buffers_in_hbm_are_those_beyond_on_chip_memory(rows: int, chip: str, expected: float) -> None:
    fn, args = mixture(rows // 2, 1024, 512, 8, 2)
    program = trace(fn, *args, chains=True).program
    (at,) = chains(program)
    whole = np.ones((1, len(program.operations[at].factors)))
    assert chain_buffer_bytes(program, parse_topology(chip), at, whole) == pytest.approx(expected * MIB)


@pytest.mark.parametrize("load", [1.0, 1.1, 1.5, 4.0])
def test_a_chain_multiplies_the_rows_of_its_buffer(load: float) -> None:
    """Those that the cost model, the checker and the emitted program count: whole registers, and no more than there are."""
    fn, args = mixture(50, 64, 32, 16, 2)
    program = trace(fn, *args, chains=True).program
    op = program.operations[chains(program)[0]]
    groups = grouped(op)
    assert groups is not None and groups.tokens is not None
    for chips, sources in ((1, 1), (2, 1), (16, 1), (2, 2), (4, 8), (16, 16)):
        shards = np.ones((1, len(op.factors)))
        shards[0, [groups.groups, groups.tokens]] = chips, sources
        (counted,) = evaluate(grouped_rows(groups, load), op, shards)
        emitted = own_rows(100, chips, load) if sources == 1 else rows_in_all(100, sources, chips, load)
        local = [factor.size / n for factor, n in zip(op.factors, shards[0], strict=True)]
        assert counted == emitted == GroupedWork(op, local, load).rows
        if sources == 1:
            whole = op.flops_per_point * prod(factor.size for factor in op.factors)
            assert evaluate(flops(op, load), op, shards) == pytest.approx(whole * emitted / 100)


@pytest.mark.tpu
@pytest.mark.slow
def test_the_planned_peak_of_a_mixture_is_the_compiled_one() -> None:
    """Gathered rows of 48 MiB and hidden arrays of 18 MiB: libtpu has one of the latter in HBM, and the sum by token."""
    fn, args = mixture(4096, 2048, 768, 32, 8)
    split = P(("x", "y"))
    pins = {"layer.w_*": split, "x": split}
    plan = autoshard.search(fn, *args, topology="v5e:2x2", pins=pins)
    found = autoshard.audit(plan, fn, *args, target="tpu")
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)
