"""Crossovers between the layouts of a mixture of experts, as the tables of `docs/rules.md`.

    python docs/expert_crossovers.py          # writes the tables into the page

The layouts of the experts over all chips, for tokens that are split over these chips before and after:

- *gathered*: all chips gather the tokens, each computes the rows of its own experts, and the results are reduce-scattered;
- *sent*: each row is sent to the chip of its expert, and its result back;
- *columns*: all chips gather the tokens, each computes its hidden columns of every expert, and the results are
  reduce-scattered.

The first table has the ratio of the bandwidth times of *gathered* and *sent*, from the expressions of
`costmodels.machine.collectives`. The second has the times of the cost model for one layer. `tests/rules/test_crossovers.py`
compares the page with this script.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sympy
from jax import Array, lax

from autoshard.tracing.trace import trace
from costmodels.machine.collectives import bytes_symbol, expression, hop_symbol, launch_symbol, values
from costmodels.machine.topology import Topology, parse_topology
from costmodels.operations import price
from costmodels.program.grouped import CHAIN, grouped
from costmodels.program.program import Operation, Program
from search.formulation.intra_op import intra_op_collectives, payload
from search.formulation.reshard import step_seconds
from search.formulation.strategies import Strategy

PAGE = Path(__file__).resolve().parent / "rules.md"
BEGIN, END = "<!-- expert crossovers: by docs/expert_crossovers.py -->", "<!-- end of expert crossovers -->"
NETWORKS = ("v5p:8x1x1", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8", "h100:1x8", "h100:4x8")
WIDTH, HIDDEN, EXPERTS = 2048, 768, 128
"""The experts of a layer of Qwen3-30B-A3B (its config.json)."""
MACHINES, TOKENS, CHOSEN = ("v5e:4x4", "v5p:4x4x4", "h100:1x8"), (1024, 8192, 65536), (1, 2, 4, 8)
K, LOAD, SENT = sympy.symbols("k lambda V", positive=True)


def ratio(topology: Topology) -> sympy.Expr:
    """The bandwidth time of a gather and a reduce-scatter of the tokens over that of two all-to-alls, in $k$ and $\\lambda$.

    With $V$ bytes of tokens in all, each of $n$ chips sends $k \\lambda V / n$ bytes in an all-to-all.
    """
    axes = [axis for axis in topology.axes if axis.size > 1]
    table = values(axes, topology.pricing, topology.total_bytes_per_second)
    table |= dict.fromkeys((*map(hop_symbol, axes), launch_symbol()), 0.0)

    def seconds(kind: str, sent: sympy.Expr) -> sympy.Expr:
        return expression(kind, axes, topology.pricing).subs({**table, bytes_symbol(): sent}).doit()

    gathered = seconds("all-gather", SENT) + seconds("reduce-scatter", SENT)
    return sympy.nsimplify(gathered / (2 * seconds("all-to-all", K * LOAD * SENT / topology.size)), rational=True)


def layer(x: Array, numbers: Array, sizes: Array, weights: Array, gate: Array, up: Array, down: Array) -> Array:
    """Tokens through their experts; the rows are sorted by expert, and `numbers` are those of their tokens."""
    rows = x[numbers]
    hidden = jax.nn.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    return jnp.zeros_like(x).at[numbers].add(lax.ragged_dot(hidden, down, sizes) * weights[:, None])


@lru_cache
def chain(tokens: int, chosen: int) -> tuple[Program, Operation]:
    """The layer as a program, and its chain."""
    shapes: list[Any] = [((tokens, WIDTH), jnp.bfloat16), ((tokens * chosen,), jnp.int32), ((EXPERTS,), jnp.int32)]
    shapes += [((tokens * chosen,), jnp.bfloat16), *[((EXPERTS, WIDTH, HIDDEN), jnp.bfloat16)] * 2]
    shapes += [((EXPERTS, HIDDEN, WIDTH), jnp.bfloat16)]
    program = trace(layer, *(jax.ShapeDtypeStruct(*each) for each in shapes), chains=True).program
    return program, next(op for op in program.operations if op.primitive == CHAIN)


def times(topology: Topology, tokens: int, chosen: int) -> dict[str, float]:
    """Seconds of the layer under each layout, with the collectives around and inside it."""
    program, op = chain(tokens, chosen)
    groups, axes = grouped(op), tuple(axis.name for axis in topology.axes if axis.size > 1)
    assert groups is not None and groups.tokens is not None and groups.hidden is not None
    whole = tokens * WIDTH * 2.0
    around = sum(float(step_seconds(kind, axes, whole, topology)) for kind in ("all-gather", "reduce-scatter"))
    layouts = {"gathered": {groups.groups}, "sent": {groups.groups, groups.tokens}, "columns": {groups.hidden}}
    found = {}
    for name, split in layouts.items():
        strategy = Strategy(tuple(axes if i in split else () for i in range(len(op.factors))))
        shards = np.array([[float(prod(topology.axis_sizes[a] for a in each)) for each in strategy.splits]])
        own = price(program, op, shards, topology.chip, load=topology.pricing.expert_load).seconds[0]
        inside = (
            float(step_seconds(each.kind, each.axes, payload(program, op, strategy, each, topology), topology))
            for each in intra_op_collectives(op, strategy, topology)
        )
        found[name] = float(own) + (sum(inside) if name == "sent" else around)
    return found


def lines() -> Iterator[str]:
    """The lines of both tables."""
    yield "| experts over | chips | gathered / sent | sent is faster below, at $\\lambda = 1$ | at $\\lambda = 1.5$ |"
    yield "|---|---|---|---|---|"
    for name in NETWORKS:
        topology = parse_topology(name)
        factor = ratio(topology) * K * LOAD
        most = float(factor)
        yield f"| `{name}` | {topology.size} | ${most:.4g}/(k\\lambda)$ | $k < {most:.4g}$ | $k < {most / 1.5:.4g}$ |"
    yield ""
    yield "| on | tokens | " + " | ".join(f"$k = {k}$" for k in CHOSEN) + " |"
    yield "|---|---|" + "---|" * len(CHOSEN)
    for name in MACHINES:
        for tokens in TOKENS:
            yield (
                f"| `{name}` | {tokens} | " + " | ".join(_cell(parse_topology(name), tokens, k) for k in CHOSEN) + " |"
            )


def _cell(topology: Topology, tokens: int, chosen: int) -> str:
    found = times(topology, tokens, chosen)
    best = min(found, key=lambda name: found[name])
    return " / ".join(f"**{s * 1e3:.3g}**" if name == best else f"{s * 1e3:.3g}" for name, s in found.items())


def page() -> str:
    """The page with the tables as computed now."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([before + BEGIN, "", *lines(), "", END + after])


if __name__ == "__main__":
    PAGE.write_text(page())
