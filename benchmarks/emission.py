"""What does each planned collective compile to, alone? Kinds × mesh axes × shapes × compilers, as they are emitted.

    python benchmarks/emission.py [--only TOPOLOGY ...]

One row per step: `ours` is 1 if the compiled program has exactly the planned collective (kind, axes, bytes except for padded
rows), `reference` is 1 if the search may plan it (`search.formulation.collective_steps.emittable`). A step that is planned
but compiles to something else is a miss. A step that is never planned but compiles as written only reduces the choice. Run it
under every supported JAX: the table has the version.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "emission.json"
TOPOLOGIES = ("cpu:2x2x2", "v5e:4x4", "v4:4x4x4", "v4:2x2x2", "h100:8")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SHAPES = {
    # One chip's piece before the step: many rows, rows that no block divides, a decode batch, few rows, few rows behind the
    # first dimension, a dimension between the first and those of a tile.
    "prefill": ((1024, 8192), 0),
    "columns": ((1024, 8192), 1),
    "odd rows": ((50257, 4096), 1),
    "decode": ((64, 4096), 1),
    "few rows": ((4, 4096), 1),
    "heads": ((64, 2, 128), 0),
    "experts": ((2, 64, 64, 512), 1),
}


@dataclass(frozen=True)
class Written:
    """One step on one chip's shard."""

    kind: str
    axes: tuple[str, ...]
    what: str
    shape: tuple[int, ...]
    dim: int


def cases(topology: Any) -> Iterator[Written]:
    """All kinds over one axis, over two and over all, if the shard divides."""
    names = [axis.name for axis in topology.axes if axis.size > 1]
    for count in range(1, len(names) + 1):
        axes = tuple(names[:count])
        chips = prod(topology.axis_sizes[axis] for axis in axes)
        for kind in KINDS:
            for what, (shape, dim) in SHAPES.items():
                other = (dim + 1) % len(shape)
                fits = shape[dim] % chips == 0 and (kind != "all-to-all" or shape[other] % chips == 0)
                if fits and (kind != "collective-permute" or count > 1):
                    yield Written(kind, axes, what, shape, dim)


def step_of(case: Written, sizes: Mapping[str, int]) -> Any:
    """The step between layouts; a permutation reverses the order of the axes."""
    from search.formulation.collective_steps import CollectiveStep, permuted_axes
    from search.formulation.layouts import Layout

    rank, at, other = len(case.shape), case.dim, (case.dim + 1) % len(case.shape)

    def split(dim: int, axes: tuple[str, ...] = case.axes) -> Any:
        return Layout(tuple(axes if i == dim else () for i in range(rank)))

    whole, partial = Layout(((),) * rank), Layout(((),) * rank, tuple(sorted(case.axes)))
    match case.kind:
        case "all-gather":
            return CollectiveStep(case.kind, case.axes, split(at), whole, source_dim=at)
        case "reduce-scatter":
            return CollectiveStep(case.kind, case.axes, partial, split(at), target_dim=at)
        case "all-reduce":
            return CollectiveStep(case.kind, case.axes, partial, whole)
        case "all-to-all":
            return CollectiveStep(case.kind, case.axes, split(at), split(other), source_dim=at, target_dim=other)
    turned = split(at, case.axes[::-1])
    return CollectiveStep(case.kind, permuted_axes(split(at), turned, sizes), split(at), turned)


def measured(case: Written, topology: Any, mesh: Any) -> dict[str, Any]:
    """One step, compiled alone."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from autoshard.auditing import hlo_collectives
    from autoshard.emitting.collectives.reshard_steps import FEW_ROWS, run_step
    from search.formulation.collective_steps import emittable

    sizes = topology.axis_sizes
    step = step_of(case, sizes)
    shape = tuple(n * prod(sizes[axis] for axis in dim) for n, dim in zip(case.shape, step.source.dims, strict=True))
    everywhere = PartitionSpec(tuple(mesh.axis_names))

    def run(chips: Any) -> Any:
        return run_step(step, jnp.tanh(chips[0]), sizes)[None]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    dtype = jnp.float32 if topology.chip.kind == "cpu" else jnp.bfloat16
    given = jax.ShapeDtypeStruct((topology.size, *case.shape), dtype)
    text = jax.jit(mapped).lower(given).compile().as_text() or ""
    found = [each for each in hlo_collectives.collectives(text, sizes) if each.axes]
    payload = step.payload(dtype.dtype.itemsize * prod(shape), sizes)
    wanted = (step.kind, frozenset(step.axes))
    faithful = [(each.kind, frozenset(each.axes or ())) for each in found] == [wanted]
    padded = FEW_ROWS if step.kind == "reduce-scatter" else 0.0
    faithful = faithful and payload <= found[0].bytes <= payload * (1 + padded)
    may = emittable(step, shape, dtype.dtype.itemsize, topology)
    name = f"{topology.name} {case.kind} over {''.join(case.axes)}, {case.what} {case.shape} dim {case.dim}"
    return {
        "row": name,
        "reference": int(may),
        "ours": int(faithful),
        "compiled": [
            f"{each.kind} over {''.join(each.axes or ())} of {each.bytes} ({each.spelling})" for each in found
        ],
        "jax": jax.__version__,
    }


def rows_of(name: str) -> list[dict[str, Any]]:
    """All steps on one topology; why there are none, where its compiler is not installed."""
    import jax

    from autoshard.emitting import targets
    from costmodels.machine.topology import parse_topology

    topology = parse_topology(name)
    jax.config.update("jax_num_cpu_devices", max(8, topology.size if topology.chip.kind == "cpu" else 8))
    try:
        if topology.chip.kind == "tpu":
            devices: Sequence[Any] = targets.tpu_devices(topology.name, topology.shape, topology.chip.name)
        elif topology.chip.kind == "gpu":
            devices = targets.gpu_devices(topology)
        else:
            devices = targets.host_devices(topology.size)
    except targets.TargetError as error:
        return [{"row": name, "reference": None, "ours": None, "why": str(error), "jax": jax.__version__}]
    mesh = targets.mesh_of(devices, topology.axis_sizes)
    return [measured(case, topology, mesh) for case in cases(topology)]


def main() -> None:
    """Prints the misses and a count per topology, and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=TOPOLOGIES, metavar="TOPOLOGY", help="keep the rows of others, and of other JAXs"
    )
    chosen = parser.parse_args().only
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    for name in chosen:
        found = rows_of(name)
        here = (name, found[0]["jax"])
        known = [row for row in known if (row["row"].split(" ")[0], row["jax"]) != here] + found
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        if found[0]["ours"] is None:
            print(f"{name}: {found[0]['why']}", flush=True)
            continue
        planned = [row for row in found if row["reference"]]
        print(
            f"{name}, jax {found[0]['jax']}: {sum(row['ours'] for row in planned)} of {len(planned)} steps that may be planned "
            "compile as written"
        )
        for row in found:
            if row["reference"] != row["ours"]:
                said = "MISS" if row["reference"] else "never planned, though faithful"
                print(f"  {said}: {row['row']}: {' + '.join(row['compiled']) or 'nothing'}")
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    main()
