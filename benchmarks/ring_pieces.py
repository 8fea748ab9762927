"""The compiled time of a ring's pieces against that of the whole matmul: the catalogue's `piece_loss`.

    python benchmarks/ring_pieces.py [CHIP ...]

A row is a matmul whose left operand is gathered over four chips, compiled with the TPU compiler (libtpu, no TPU) at once and
as a ring, as plans are emitted. `reference` is the compiler's time of the whole matmul on the core in µs, times the part that
the cost model expects of pieces (starts, tiles, reads); `ours` that of the pieces. The loss of a chip is the geometric mean of
`ours` over `reference`, each at least 1, less 1: apart for rows that are gathered, whose results are written to their places
(`piece_loss`), and for what is summed over, whose results are added up (`summed_piece_loss`).

Rows of chips that do not run again keep their last result.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "ring_pieces.json"

from autoshard.annotating.hbm_traffic import annotate_traffic  # noqa: E402
from autoshard.auditing.replay import replay  # noqa: E402
from autoshard.emitting.collectives.rings import gather_in_ring, multiply_pieces  # noqa: E402
from autoshard.emitting.targets import devices_of, mesh_of  # noqa: E402
from autoshard.tracing.trace import trace  # noqa: E402
from costmodels.machine.rings import has_two_ways, piece_slowdown  # noqa: E402
from costmodels.machine.topology import Topology, parse_topology  # noqa: E402
from costmodels.operations import price  # noqa: E402
from search.formulation.collective_steps import CollectiveStep  # noqa: E402
from search.formulation.layouts import Layout  # noqa: E402
from search.formulation.rings import is_summed, piece_factor, piece_seconds  # noqa: E402

TOPOLOGIES = {"v4": "v4:4x4x4", "v5p": "v5p:4x4x4", "v5e": "v5e:4x4", "v6e": "v6e:4x4"}
SHAPES = ((512, 16384, 4096), (1024, 8192, 8192), (2048, 8192, 4096), (2048, 4096, 8192))
"""Rows, what is summed over, and columns on a chip, as prefills have them."""


def measure(topology: Topology, shape: tuple[int, int, int], dim: int) -> dict[str, Any]:
    """The row of a matmul whose left operand is gathered in a dimension: 0 for rows, 1 for what is summed over."""
    rows, inner, columns = shape
    left, right = (jax.ShapeDtypeStruct(each, jnp.bfloat16) for each in ((rows, inner), (inner, columns)))
    program = annotate_traffic(trace(jnp.matmul, left, right)).program
    op = next(op for op in program.operations if op.op_class == "matmul")
    axis, mesh = topology.axes[-1], mesh_of(devices_of(topology, "tpu"), topology.axis_sizes)
    cut = P(axis.name) if dim == 0 else P(None, axis.name)
    whole = Layout(((), ()))
    step = CollectiveStep("all-gather", (axis.name,), whole, whole, source_dim=dim)

    def at_once(a: Any, b: Any) -> Any:
        return lax.all_gather(a, axis.name, axis=dim, tiled=True) @ b

    def in_pieces(a: Any, b: Any) -> Any:
        found = gather_in_ring(step, a, topology.axis_sizes, has_two_ways(axis))
        return multiply_pieces(op, 0, found, b, jnp.matmul)

    seconds = []
    for on_chip in (at_once, in_pieces):
        mapped = jax.shard_map(on_chip, mesh=mesh, in_specs=(cut, P()), out_specs=P(), check_vma=False)
        placed = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(mesh, spec))
                  for each, spec in ((left, cut), (right, P()))]  # fmt: skip
        replayed = replay(jax.jit(mapped).lower(*placed).compile().as_text() or "", topology)
        assert replayed is not None
        seconds.append(replayed.core_seconds)
    one = np.ones((1, len(op.factors)))
    expected = (
        piece_seconds(program, op, 0, dim, axis.size, one, topology) / price(program, op, one, topology.chip).seconds
    )
    summed = is_summed(op, piece_factor(op, 0, dim))
    expected /= piece_slowdown(topology.chip, True, summed)
    return {
        "row": f"{topology.name} {'summed' if summed else 'rows'} {rows}x{inner}x{columns}",
        "reference": seconds[0] * float(expected[0]) * 1e6,
        "ours": seconds[1] * 1e6,
        "chip": topology.chip.name,
        "summed": summed,
        "libtpu": version("libtpu"),
    }


def main() -> None:
    """Runs the matmuls of the chips, and prints and keeps the efficiencies."""
    known = {row["row"]: row for row in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.exists() else {}
    for chip in sys.argv[1:] or TOPOLOGIES:
        topology = parse_topology(TOPOLOGIES[chip])
        for dim in (0, 1):
            for shape in SHAPES:
                row = measure(topology, shape, dim)
                known[row["row"]] = row
                print(f"{row['row']:40s} {row['reference']:8.1f} {row['ours']:8.1f}", flush=True)
    RESULTS.write_text(json.dumps(list(known.values()), indent=1) + "\n", "utf-8")
    for chip in TOPOLOGIES:
        for summed, name in ((False, "piece_loss"), (True, "summed_piece_loss")):
            rows = [row for row in known.values() if (row["chip"], row["summed"]) == (chip, summed)]
            ratios = [max(row["ours"] / row["reference"], 1.0) for row in rows]
            if ratios:
                mean = exp(sum(map(log, ratios)) / len(ratios))
                print(f"{chip} {name} {mean - 1:.2f}, {min(ratios) - 1:.2f} to {max(ratios) - 1:.2f}")


if __name__ == "__main__":
    main()
