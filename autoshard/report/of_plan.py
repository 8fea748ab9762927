"""The data of a plan's page."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from autoshard._util.tables import figure, percent, size, time
from autoshard.carrying.render import export_note
from autoshard.errors import ExportError
from autoshard.explaining.bottlenecks import regimes
from autoshard.explaining.explain import margin, short_name, spec_text
from autoshard.explaining.layer_groups import group_arrays, group_collectives, group_operations, type_of
from autoshard.explaining.memory_orders import order_text
from autoshard.export import export
from autoshard.naming.parallelism import parallelism
from autoshard.planning.records import ArrayPlan, PlanRecord
from costmodels.bottlenecks import Work
from search.answer.check_memory import alive_bytes
from search.answer.solution import Proof

_MOST_CHIPS = 1024
"""The maximum number of drawn chips."""
_MOST_ARRAYS = 200
"""The maximum number of arrays in the drawing, the largest first."""


def plan_page_data(
    plan: PlanRecord, audit: Mapping[str, Any] | None = None, tokens: float | None = None
) -> dict[str, Any]:
    """The data of a plan's page; all numbers are finite.

    **Arguments:**

    - `tokens`: the tokens of one step, for the throughput.
    """
    found = regimes(plan)
    return {
        "title": f"{plan.name} on {plan.topology.name}",
        "summary": [
            *_summary(plan, audit),
            *_rates(plan, tokens),
            *(_audit_figures(audit) if audit is not None else ()),
        ],
        "specs": _specs(plan),
        "carried": export_note(plan),
        "timeline": timeline(plan),
        "warnings": list(plan.warnings),
        "parallelism": str(parallelism(plan.program, plan.topology, plan.choice)) if plan.program is not None else "",
        "plain": [
            dict(zip(("step", "margin"), margin(plan, each), strict=True)) | {"name": each.name}
            for each in plan.baselines
        ],
        "axes": [{"name": axis.name, "size": axis.size, "ring": axis.ring} for axis in plan.topology.axes],
        "drawn": min(plan.topology.size, _MOST_CHIPS),
        "arrays": _arrays(plan),
        "operations": _operations(plan),
        "collectives": _collectives(plan),
        "memory": _memory(plan),
        "roofline": _roofline(plan, [_dot(work) for work in found.works if work.total_seconds]),
        "regimes": {name: seconds for name, seconds in found.seconds.items() if seconds},
        "formulas": _formulas(plan),
        "audit": dict(audit) if audit is not None else None,
        "constants": [
            {"name": name, "value": f"{each.value:g}", "status": each.status, "source": each.source}
            for name, each in plan.topology.chip.constants.items()
        ],
    }


def _rates(plan: PlanRecord, tokens: float | None) -> list[dict[str, str]]:
    """The MFU of the planned step, and its throughput if the tokens of a step are known."""
    matmuls = [op for op in plan.operations if op.matmul]
    chip, seconds = plan.topology.chip, plan.estimate.seconds
    peak = chip.matmul_flops_per_second(_matmul_dtype(plan))
    mfu = sum(op.flops for op in matmuls) / (seconds * peak) if seconds else 0.0
    cards = [{"name": "MFU", "value": percent(mfu), "note": f"of {peak / 1e12:g} TFLOP/s per chip, planned"}]
    if tokens and seconds:
        rate = tokens / seconds
        note = f"{figure(rate / plan.topology.size)} per chip, {figure(tokens)} in a step, planned"
        cards.append({"name": "tokens per second", "value": figure(rate), "note": note})
    return cards


def _matmul_dtype(plan: PlanRecord) -> str:
    """The type of the first matmul."""
    return next((op.dtype for _, op in plan.program.matmuls()), "bfloat16") if plan.program else "bfloat16"


def _specs(plan: PlanRecord) -> str:
    """The specs of all arguments as Python source, to be copied; empty if they cannot be written."""
    try:
        return export(plan, "specs")
    except ExportError:
        return ""


_MOST_STEPS = 120
"""The maximum number of operations of a timeline."""


def timeline(plan: PlanRecord) -> dict[str, Any]:
    """The operations of one layer in their order, each after its collectives, with the seconds of one run.

    A layer is one run of the body of the loop that takes most of the step; without loops, it is the whole program.
    """
    if plan.program is None:
        return {"title": "", "steps": []}
    regions = [op.region for op in plan.program.operations]
    spent: dict[int, float] = {}
    for op, region in zip(plan.operations, regions, strict=True):
        spent[region] = spent.get(region, 0.0) + op.seconds + op.collective_seconds
    loops = [region for region in spent if plan.program.regions[region].kind == "loop"]
    chosen = max(loops, key=lambda region: spent[region], default=0)
    steps = []
    for op, region in zip(plan.operations, regions, strict=True):
        if region != chosen or not op.count:
            continue
        name, strategy = short_name(op), op.strategy
        on_chip = "compute" if op.compute_seconds >= op.memory_seconds else "HBM"
        own = on_chip if op.regime == "communication" else op.regime
        for kind, seconds in (("communication", op.collective_seconds), (own, op.seconds)):
            if seconds:
                words = f"collectives for {name}" if kind == "communication" else name
                steps.append({"name": words, "strategy": strategy, "regime": kind, "seconds": seconds / op.count})
    longest = sorted(range(len(steps)), key=lambda at: -steps[at]["seconds"])[:_MOST_STEPS]
    runs = plan.program.multiplicity(chosen)
    title = f"One of {runs:g} runs of the largest loop's body" if chosen else "The whole program"
    return {"title": title, "steps": [steps[at] for at in sorted(longest)]}


def _summary(plan: PlanRecord, audit: Mapping[str, Any] | None) -> list[dict[str, str]]:
    estimate, proof = plan.estimate, plan.proof
    local = estimate.seconds - estimate.collective_seconds
    wire = time(estimate.collective_seconds)
    proven = "no plan that fits is faster under the cost model"
    gap = f"no plan is faster than {time(proof.bound_seconds)}, gap {percent(proof.gap)}"
    share = percent(estimate.peak_bytes / estimate.budget_bytes)
    return [
        {
            "name": "step, planned",
            "value": time(estimate.seconds),
            "note": f"{time(local)} on the chip, {wire} of collectives",
        },
        *_compiled_step(audit),
        {"name": "proof", "value": proof.status, "note": proven if proof.status == "OPTIMAL" else gap},
        *_proof_items(proof),
        {
            "name": "memory",
            "value": size(estimate.peak_bytes),
            "note": f"{share} of {size(estimate.budget_bytes)} per chip",
        },
        {"name": "chips", "value": f"{plan.topology.size} × {plan.topology.chip.name}", "note": plan.topology.name},
    ]


def _compiled_step(audit: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The step of the compiled program beside the planned one, if an audit knows it."""
    seconds = audit["seconds"] if audit is not None else {}
    found = seconds.get("replayed")
    how = "its schedule replayed"
    if not found and seconds.get("compiled_compute") is not None:
        found, how = seconds["compiled_compute"] + seconds["compiled_collectives"], "by the compiler's cycles"
    if not found:
        return []
    note = f"{found / seconds['planned']:.2f} times the plan, {how}"
    return [{"name": "step, compiled", "value": time(found), "note": note}]


def _proof_items(proof: Proof) -> list[dict[str, str]]:
    """The deciding solver, with the rest of presolve; empty for a plan from an older file."""
    if not proof.solver:
        return []
    left = f"{proof.states - proof.fixed_by_presolve:,} of {proof.states:,} strategies and layouts"
    booleans = f"{proof.booleans:,} boolean{'s' * (proof.booleans != 1)}"
    note = f"{proof.solver_status} on {booleans}; presolve left {left}"
    return [{"name": "solver", "value": proof.solver, "note": note}]


def _audit_figures(audit: Mapping[str, Any]) -> list[dict[str, str]]:
    """The compiled program beside the plan, as a headline figure."""
    planned = sum(each["planned"] for each in audit["wire_bytes"])
    compiled = sum(each["compiled"] for each in audit["wire_bytes"])
    wire = f"wire {compiled / planned:.3f}" if planned else f"{size(compiled)} on the wire"
    expected = ", an excess that the audit names and expects" if audit["ok"] and compiled > 1.02 * planned else ""
    peak = audit["peak_bytes"]
    held = f", peak memory {peak['compiled'] / peak['planned']:.3f}" if peak["compiled"] and peak["planned"] else ""
    verdict = "as planned" if audit["ok"] else "not as planned"
    if audit.get("slow"):
        verdict += f", {audit['seconds']['replayed'] / audit['seconds']['planned']:.2f} times as slow"
    return [
        {"name": f"compiled ({audit['target']})", "value": verdict, "note": f"{wire}{held} of the plan's{expected}"}
    ]


def _arrays(plan: PlanRecord) -> list[dict[str, Any]]:
    roles = {"argument": plan.arguments, "constant": plan.constants, "result": plan.results}
    every = [(array, count, role) for role, arrays in roles.items() for array, count in group_arrays(arrays)]
    largest = sorted(every, key=lambda found: -found[0].bytes_per_chip)[:_MOST_ARRAYS]
    return [_array(plan, *found) for found in largest]


def _array(plan: PlanRecord, array: ArrayPlan, count: int, role: str) -> dict[str, Any]:
    return {
        "path": array.path,
        "role": role,
        "type": type_of(array, count),
        "shape": list(array.shape),
        "split": [list(axes) for axes in array.layout.dims],
        "spec": spec_text(array.layout),
        "order": order_text(plan, array),
        "bytes": array.bytes_per_chip,
    }


def _operations(plan: PlanRecord) -> list[dict[str, Any]]:
    spent = group_operations(op for op in plan.operations if op.seconds + op.collective_seconds > 0)
    return [
        {
            "name": short_name(op),
            "source": op.source,
            "einsum": op.einsum,
            "strategy": op.strategy,
            "regime": op.regime,
            "runs": op.count,
            "seconds": op.seconds,
            "collectives": op.collective_seconds,
            "share": (op.seconds + op.collective_seconds) / plan.estimate.seconds,
            "matmul": op.matmul,
            "next": op.runner_up,
        }
        for op in sorted(spent, key=lambda op: -(op.seconds + op.collective_seconds))
    ]


def _collectives(plan: PlanRecord) -> list[dict[str, Any]]:
    """The collectives and the local slices of reshards, the longest first."""
    found = (*plan.estimate.collectives, *plan.estimate.slices)
    return [
        {
            "kind": "local slice" if each.kind == "slice" else each.kind,
            "axes": "".join(each.axes),
            "bytes": each.bytes,
            "runs": each.count,
            "seconds": each.seconds,
            "where": each.where,
        }
        for each in sorted(group_collectives(found), key=lambda each: -each.seconds)
    ]


def _memory(plan: PlanRecord) -> dict[str, Any]:
    """Bytes of a chip during each operation; empty for a plan from an older file."""
    if plan.program is None:
        return {"points": [], "given": 0, "budget": plan.estimate.budget_bytes}
    alive = alive_bytes(plan.program, plan.topology, plan.choice)
    points = [{"name": op.name, "bytes": held} for op, held in zip(plan.program.operations, alive, strict=True)]
    given = sum(array.bytes_per_chip for array in (*plan.arguments, *plan.constants))
    return {"points": points, "given": given, "budget": plan.estimate.budget_bytes}


def _dot(work: Work) -> dict[str, Any]:
    seconds = work.total_seconds
    return {
        "name": work.name,
        "intensity": work.intensity if isfinite(work.intensity) else 0.0,
        "rate": work.flops / seconds,
        "seconds": seconds,
        "regime": work.regime,
    }


def _roofline(plan: PlanRecord, dots: list[dict[str, Any]]) -> dict[str, Any]:
    chip = plan.topology.chip
    dtype = _matmul_dtype(plan)
    return {
        "flops": chip.reached_matmul_flops_per_second(dtype),
        "vector": chip.vector_flops_per_second,
        "bytes": chip.reached_hbm_bytes_per_second,
        "dots": [dot for dot in dots if dot["intensity"] > 0 and dot["rate"] > 0],
    }


def _formulas(plan: PlanRecord) -> str:
    if plan.program is None:
        return ""
    from autoshard.explaining.formula_sections import sections

    return "\n\n".join("\n".join(section) for section in sections(plan))
