"""The audit: a comparison of the compiled program with its plan in collectives, memory, FLOPs and time.

A planned collective is found if the compiled program runs one of the same kind over the same axes with the same bytes
as often. Rewrites that keep the plan are recognised and reported:

| the compiled program | is the same plan |
|---|---|
| runs several planned collectives as one, or one in several pieces | at the same cost, or lower |
| reshards an array once for several uses | at lower cost |
| runs a planned all-reduce as a reduce-scatter and an all-gather | at the same cost |
| reduces and slices where a reduce-scatter was planned | at higher cost |
| gathers by an all-reduce of arrays padded with zeros | at higher cost |
| reduces and scatters padded rows, then moves a few to their owners | at higher cost |
| sends 16-bit floats as float32, on host devices | at twice the bytes, which are expected there |

All other planned collectives are *missing*, all other compiled ones are *unplanned*. Shares are relative to the plan's
communication time, with compiled collectives priced by the plan's model. For differences of any class, the program is
not as planned if bytes on a set of mesh axes, memory or FLOPs leave their bounds (`autoshard.auditing.bounds`).

Matmuls are compared with the plan by their FLOPs, for each source line. A line that computes more than planned had an
operand *replicated*, or was *recomputed* because the compiler formed a result twice instead of keeping it. An array
that is gathered only for slices of it has the partitioner's name, an involuntary full rematerialization. Arguments and
results are compared with the plan by their bytes on one chip, donated ones by whether results overwrite them.

The time of a TPU program's step is that of its schedule, replayed (`autoshard.auditing.replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from autoshard.auditing import findings, hlo_collectives
from autoshard.auditing.findings import CompileTarget, Finding, seconds_of
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.auditing.hlo_costs import flops_formed_again, matmul_flops
from autoshard.auditing.hlo_interface import read_arguments
from autoshard.auditing.hlo_parser import parse
from autoshard.auditing.matching import Pair, axes_of, match_collectives
from autoshard.auditing.planned_times import attribute_time, distinct_rings, overlaps, planned_seconds, ring_parts
from autoshard.auditing.record import AuditRecord
from autoshard.auditing.render import render
from autoshard.auditing.replay import replay
from autoshard.emitting import bind, targets
from autoshard.emitting.jitted import default_way, jit_plan
from autoshard.errors import AutoshardError
from autoshard.planning.carriage import Carry
from autoshard.planning.records import PlannedCollective, PlanRecord
from costmodels.program.grouped import OVERFLOW
from search.answer.assignment import collectives as solution_collectives


class AuditError(AutoshardError):
    """A plan could not be compiled for the audit's target; the compiler's error is chained."""


class Audit(AuditRecord):
    """The result of an audit; `str(audit)` is a table. Its attributes are those of `AuditRecord`."""

    def __str__(self) -> str:
        return render(self)


def audit(
    plan: PlanRecord,
    fn: Callable[..., Any],
    *args: Any,
    target: CompileTarget = "host",
    devices: Sequence[Any] | None = None,
    carry: Carry | None = None,
) -> Audit:
    """Compiles a planned function and compares the compiled program with the plan.

        audit = autoshard.audit(plan, decode, params, cache, tokens, position, target="tpu")
        audit.ok, audit.peak_bytes

    **Arguments:**

    - `args`: the arguments the plan was searched for, arrays or `jax.ShapeDtypeStruct`s; nothing is allocated or run.
    - `target`: "host" compiles for CPU devices of this machine, which is quick and partitions in the same way, "tpu"
      for the plan's own chips with the real TPU compiler (libtpu), without any TPU, "gpu" with the real XLA:GPU
      compiler, without any GPU (extra `gpu`).
    - `devices`: the devices to compile for instead.
    - `carry`: the way in which the program carries the plan, as for `Plan.jit`.

    **Raises:** `PlanMismatchError` when the plan is of another function or other arguments; `AuditError` when the compiler
    refuses the program (for instance, for lack of memory); `AutoshardError` when the target is not available.
    """
    if target not in ("host", "tpu", "gpu"):
        raise AutoshardError(f'target must be "host", "tpu" or "gpu", got {target!r}.')
    way = carry or default_way(plan)
    lowered, arrays = lower(plan, fn, *args, target=target, devices=devices, carry=way)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise AuditError(
            f"The {target} compiler refused {plan.name} for {plan.topology.name}. It says: {error}"
        ) from error
    return compare(plan, compiled.as_text(), target, compiled_peak_bytes(compiled.memory_analysis()), arrays, way)


def lower(
    plan: PlanRecord,
    fn: Callable[..., Any],
    *args: Any,
    target: CompileTarget = "host",
    devices: Sequence[Any] | None = None,
    carry: Carry | None = None,
) -> tuple[Any, tuple[tuple[int, str], ...]]:
    """The lowered program of a planned function, and the number and type of the array that each collective sends.

    Arguments and errors are those of `audit`.
    """
    topology = plan.topology
    mesh = targets.mesh_of(targets.devices_of(topology, target) if devices is None else devices, topology.axis_sizes)
    shapes = jax.tree_util.tree_map(_shape, args)
    arrays = _sent_arrays(plan, fn, shapes)
    return jit_plan(plan, fn, mesh, carry=carry or default_way(plan)).lower(*shapes), arrays


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf


def compiled_peak_bytes(memory: Any) -> float | None:
    """Peak memory per chip, as the compiler counts it; None if it does not.

    A TPU's peak also contains data prefetched into on-chip memory during the end of the previous program. Arguments,
    results and temporaries that are not aliased are in HBM, and bound it from above.
    """
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if not peak:
        return None
    in_hbm = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return float(min(peak, in_hbm - memory.alias_size_in_bytes))


def _sent_arrays(plan: PlanRecord, fn: Callable[..., Any], args: Sequence[Any]) -> tuple[tuple[int, str], ...]:
    """The number and type of the array that each planned collective sends."""
    program = bind.trace_as_planned(plan, fn, args).program
    sent = solution_collectives(program, plan.topology, plan.choice)
    return tuple((each.value, program.values[each.value].dtype) for each in sent)


def compare(
    plan: PlanRecord,
    text: str,
    target: CompileTarget = "host",
    peak_bytes: float | None = None,
    arrays: Sequence[tuple[int, str]] = (),
    carry: Carry = "manual",
) -> Audit:
    """Compares the text of a compiled program with a plan.

    **Arguments:**

    - `text`: `compiled.as_text()`.
    - `peak_bytes`: the compiled program's peak memory per chip, if known; on host devices it is not compared.
    - `arrays`: number and type of the array that each planned collective sends, if known: an array that is
      planned twice may be sent once, and host devices widen some types.
    - `carry`: the way in which the program carries the plan.
    """
    topology, estimate = plan.topology, plan.estimate
    arrays = arrays or [(-1 - i, "") for i in range(len(estimate.collectives))]
    compiled = tuple(c for c in hlo_collectives.collectives(text, topology.axis_sizes) if axes_of(c, topology))
    planned, pairs = _pair_with(plan, compiled, target, arrays, carry)
    due, done = findings.planned_flops(plan.operations), matmul_flops(text) if text else {}
    found = _findings(plan, text, pairs, target, peak_bytes, due, done)
    cycles, clock = hlo_collectives.estimated_cycles(text), topology.chip.clock_hertz
    replayed = replay(text, topology) if text and target == "tpu" else None
    costs = attribute_time(replayed.costly, planned_seconds(plan.operations)) if replayed else ()
    found += findings.find_in_time(estimate.seconds, replayed.seconds, costs) if replayed else ()
    sent = [each for each, _ in distinct_rings(estimate.collectives, arrays, topology)]
    beside = overlaps(sent, topology, replayed) if replayed and _has_rings(plan, carry) else ()
    found += findings.find_in_overlap(beside, estimate.seconds)
    return Audit(
        target=target,
        name=plan.name,
        topology=topology,
        planned=planned,
        planned_seconds=estimate.seconds,
        planned_collective_seconds=estimate.collective_seconds,
        planned_peak_bytes=estimate.peak_bytes,
        collectives=compiled,
        pairs=pairs,
        differences=tuple(sorted(found, key=lambda each: (not each.counts, -abs(each.share)))),
        peak_bytes=peak_bytes,
        compute_seconds=cycles / clock if cycles and clock else None,
        planned_flops=sum(due.values()),
        flops=sum(done.values()),
        replay=replayed,
        costs=costs,
        line_flops=tuple((line, due.get(line, 0.0), done.get(line, 0.0)) for line in {**due, **done}),
        carry=carry,
        overlap=beside,
    )


def _pair_with(
    plan: PlanRecord,
    compiled: Sequence[CompiledCollective],
    target: CompileTarget,
    arrays: Sequence[tuple[int, str]],
    carry: Carry,
) -> tuple[tuple[PlannedCollective, ...], tuple[Pair, ...]]:
    """The planned collectives among several chips, and all of them beside the compiled ones."""
    of = plan.estimate.collectives
    has_rings = _has_rings(plan, carry)
    emitted = distinct_rings(of, arrays, plan.topology) if has_rings else zip(of, arrays, strict=True)
    rows = [
        (part, *array)
        for each, array in emitted
        for part in (ring_parts(each, plan.topology) if has_rings else (each,))
        if axes_of(part, plan.topology)
    ]
    planned = tuple(each for each, _, _ in rows)
    widths = [2.0 if target == "host" and dtype in _WIDENED else 1.0 for _, _, dtype in rows]
    narrow = [target == "tpu" and dtype == "float32" for _, _, dtype in rows]
    values = [value for _, value, _ in rows]
    return planned, match_collectives(planned, values, compiled, plan.topology, widths, narrow)


def _has_rings(plan: PlanRecord, carry: Carry) -> bool:
    """Whether the program runs the plan's rings: only the one that is written by hand does, unless it is emitted without."""
    return carry == "manual" and plan.emission.rings is not False


def _findings(
    plan: PlanRecord,
    text: str,
    pairs: Sequence[Pair],
    target: CompileTarget,
    peak_bytes: float | None,
    due: Mapping[str, float],
    done: Mapping[str, float],
) -> list[Finding]:
    """All differences between the compiled program and the plan."""
    estimate, topology = plan.estimate, plan.topology
    spent = sum(seconds_of(c, topology) * pair.count for pair in pairs for c in pair.compiled)
    wire = sum(p.seconds for p in estimate.collectives) or max(estimate.seconds, spent)
    found = findings.find_in_collectives(pairs, topology, target, wire)
    if peak_bytes and target != "host":
        found += findings.find_in_memory(estimate.peak_bytes, peak_bytes)
    if text:
        found += findings.find_overflow_paths(parse(text).overflow_paths if OVERFLOW in text else 0)
        found += findings.find_in_work(due, done, flops_formed_again(text))
        given = read_arguments(text)
        found += findings.find_in_interface(plan.arguments, plan.results, given, estimate.peak_bytes)
    return found


_WIDENED = ("bfloat16", "float16")
"""Types that the host compiler sends as float32."""
