"""FLOPs and HBM bytes of a step against those of the compiled TPU program, at full size.

Each workload is searched, compiled ahead of time by libtpu for chips that are not attached. Its HLO text is read with
loops multiplied (`autoshard.auditing.hlo_costs`): FLOPs of matmuls, and HBM bytes without those of collectives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import autoshard
from autoshard.auditing.hlo_costs import CompiledCosts, compiled_costs
from autoshard.emitting import targets
from autoshard.plan import Plan
from examples import llama, palm

FLOPS_WITHIN, BYTES_WITHIN = 0.01, 0.15


def workloads() -> Iterator[tuple[str, autoshard.Workload, str]]:
    """Name, workload and topology."""
    yield "PaLM 540B decode, batch 64, v4:4x4x4", palm.decode("540b", batch=64), "v4:4x4x4"
    yield "PaLM 540B prefill, 1 × 2048, v4:4x4x4", palm.prefill("540b", batch=1), "v4:4x4x4"
    yield "Llama 3 70B decode, batch 64, v5e:4x4", llama.decode("70b", batch=64), "v5e:4x4"


def compiled(plan: Plan, work: autoshard.Workload) -> CompiledCosts:
    """The costs of a plan's compiled TPU program.

    **Raises:** `autoshard.AutoshardError` without libtpu.
    """
    topology = plan.topology
    devices = targets.tpu_devices(topology.name, topology.shape, topology.chip.name)
    mesh = targets.mesh_of(devices, topology.axis_sizes)
    return compiled_costs(plan.jit(work.fn, mesh=mesh).lower(*work.args).compile().as_text())


def rows() -> list[dict[str, Any]]:
    """Per workload one row of FLOPs and one of bytes: `reference` is the compiler's."""
    found = []
    for name, work, where in workloads():
        plan = autoshard.search(work.fn, *work.args, topology=where, donate_argnums=work.donate_argnums)
        flops = sum(op.flops for op in plan.operations if op.matmul)
        moved = sum(op.bytes for op in plan.operations)
        row: dict[str, Any] = {"source": "libtpu, ahead of time; loops multiplied", "proof": plan.proof.status}
        row |= plan.proof.account()
        sides = (("FLOPs a chip", flops, FLOPS_WITHIN), ("HBM bytes a chip", moved, BYTES_WITHIN))
        try:
            got = compiled(plan, work)
        except autoshard.AutoshardError as error:
            none: dict[str, Any] = {"reference": None, "ours": None, "why": str(error)}
            found += [{"row": f"{name}: {what}", **none, **row} for what, _, _ in sides]
            continue
        for (what, ours, within), theirs in zip(sides, (got.flops, got.hbm_bytes), strict=True):
            note = "" if got.counts_known else "a loop's length is not known: counted once"
            found.append(
                {"row": f"{name}: {what}", "reference": theirs, "ours": ours, "within": within, "note": note, **row}
            )
        print(f"{name}: done", file=sys.stderr, flush=True)
    return found


def main() -> None:
    from benchmarks.published import run

    run(["programs"])


if __name__ == "__main__":
    main()
