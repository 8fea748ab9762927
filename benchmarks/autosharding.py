"""XLA's AutoSharding, ahead of time for a TPU slice: run by the Python of the peer's own environment.

JAX offered it as `AUTO` until 0.10.0 (jax-ml/jax commit c6c02034 removed it); it still runs with jax 0.9.2 and its libtpu
0.0.37, without a TPU, on GSPMD and a mesh of at most two axes: on three it finds no feasible solution. The axes of a
torus are therefore merged into two, named by the letters that they join ("x", "yz").

    .venv-peer/bin/python benchmarks/autosharding.py '{"example": "palm", "phase": "decode", ...}' out.json

writes the compiled text, the argument and result specs that it chose, seconds and peak memory. It knows nothing of
autoshard: the examples take from it only the record that holds a function and its arguments.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Without TPUs, libtpu must neither query the cloud for the machine type nor take the lock of the chips.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v4-8",
    TPU_LOG_DIR="disabled",
    JAX_PLATFORMS="cpu",
)


def workload_of(task: dict[str, Any]) -> Any:
    """The example's workload, with the record itself in place of the package that the example takes it from."""
    spec = importlib.util.spec_from_file_location("autoshard", ROOT / "autoshard" / "workload.py")
    assert spec and spec.loader
    record = importlib.util.module_from_spec(spec)
    sys.modules["autoshard"] = record
    spec.loader.exec_module(record)
    sys.path.insert(0, str(ROOT))
    example = importlib.import_module(f"examples.{task['example']}")
    return getattr(example, task["phase"])(**task["sizes"])


def mesh_of(task: dict[str, Any]) -> Any:
    """The slice's devices row-major by their coordinates, with neighbouring axes merged as in the task."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    described = topologies.get_topology_desc(platform="tpu", topology_name=task["topology"], **task["options"])
    placed = np.empty(len(described.devices), dtype=object)
    placed[:] = sorted(described.devices, key=lambda device: (*device.coords, device.core_on_chip))
    sizes = task["axis_sizes"]
    shape = [math.prod(sizes[name] for name in merged) for merged in task["merged"]]
    return Mesh(placed.reshape(shape), tuple(task["merged"]))


def main() -> None:
    """Lays out and compiles one workload, and writes the result."""
    import jax

    jax.config.update("jax_use_shardy_partitioner", False)
    from jax._src.named_sharding import AUTO  # pyright: ignore[reportAttributeAccessIssue]

    task = json.loads(sys.argv[1])
    workload, mesh = workload_of(task), mesh_of(task)
    step = jax.jit(
        workload.fn, in_shardings=AUTO(mesh), out_shardings=AUTO(mesh), donate_argnums=workload.donate_argnums
    )
    lowered = step.lower(*workload.args)
    started, used = time.monotonic(), time.process_time()
    compiled = lowered.compile()
    found = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": peak_bytes(compiled.memory_analysis()),
        "arguments": specs_of(compiled.input_shardings[0]),
        "results": specs_of(compiled.output_shardings),
        "versions": f"jax {jax.__version__}",
        "text": compiled.as_text(),
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


def specs_of(shardings: Any) -> list[list[list[str]]]:
    """Flat specs as lists of letters per dimension."""
    import jax

    leaves = jax.tree_util.tree_leaves(shardings)
    return [[_letters(entry) for entry in getattr(leaf, "spec", ())] for leaf in leaves]


def _letters(entry: Any) -> list[str]:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return [letter for name in names for letter in name]


def peak_bytes(memory: Any) -> float:
    """Peak memory per chip; this release does not always count it, and arguments, results and temporaries bound it."""
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    bound = whole - memory.alias_size_in_bytes
    return float(min(memory.peak_memory_in_bytes or bound, bound))


if __name__ == "__main__":
    main()
