"""Compilation and judgement of every contestant, for the same slice with the same options."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import autoshard
from autoshard.candidates import compile_plan, compile_variants, pick_fastest
from benchmarks import expert_programs, expert_programs_stacked, logical_axes
from benchmarks.hand_layouts import argument_specs, constrained, hand_layouts, sizes_of
from benchmarks.judge import judge
from costmodels.machine.topology import Topology

_GIB, _MIB = 2**30, 2**20
EXPERTS = "experts"
"""The example of cases with programs of their own."""
_SHOWN = 8
"""The number of costliest collectives in a row."""


def program_of(case: Any) -> expert_programs.Program | None:
    """The program of a case that has experts' own rules; None for an example."""
    rooms = (expert_programs, expert_programs_stacked)
    makers = [getattr(room, case.phase, None) for room in rooms if case.example == EXPERTS]
    return next((make(**case.sizes) for make in makers if make), None)


def workload_of(case: Any) -> autoshard.Workload:
    """The workload of a case."""
    program = program_of(case)
    if program:
        return program.workload
    return getattr(importlib.import_module(f"examples.{case.example}"), case.phase)(**case.sizes)


def merged(topology: Topology) -> list[tuple[str, ...]]:
    """The ways to merge a torus into two axes: cuts of its letters; the first of equivalent ones."""
    names = [axis.name for axis in topology.axes if axis.size > 1]
    if len(names) < 3:
        return [tuple(names)]
    sizes = topology.axis_sizes
    found: dict[frozenset[int], tuple[str, ...]] = {}
    for cut in range(1, len(names)):
        ways = ("".join(names[:cut]), "".join(names[cut:]))
        key = frozenset(_product(way, sizes) for way in ways)
        found.setdefault(key, ways)
    return list(found.values())


def _product(names: str, sizes: dict[str, int]) -> int:
    product = 1
    for name in names:
        product *= sizes[name]
    return product


@dataclass(frozen=True)
class Bench:
    """One function on one slice; every method returns one contestant's row."""

    case: str
    example: str
    workload: autoshard.Workload
    topology: Topology
    mesh: Mesh
    keep: Path | None

    def searched(self) -> tuple[autoshard.Plan, dict[str, float]]:
        """Our plan, with the wall and processor seconds from tracing to proof."""
        started, used = time.monotonic(), time.process_time()
        plan = autoshard.search(
            self.workload.fn,
            *self.workload.args,
            topology=self.topology.name,
            donate_argnums=self.workload.donate_argnums,
        )
        spent = {"search_seconds": time.monotonic() - started, "search_cpu_seconds": time.process_time() - used}
        return plan, spent

    def ours(self, name: str, plan: autoshard.Plan, spent: dict[str, float]) -> dict[str, Any]:
        """Our plan, emitted as `plan.jit` does, in its own formats."""
        row = self._row_of(name, plan.jit(self.workload.fn, self.mesh))
        estimate = plan.estimate
        return {
            **row,
            **spent,
            "proof": plan.proof.status,
            **plan.proof.account(),
            "planned_ms": estimate.seconds * 1e3,
            "planned_wire_ms": estimate.collective_seconds * 1e3,
            "planned_peak_gib": estimate.peak_bytes / _GIB,
        }

    def tuned(self, name: str, plan: autoshard.Plan) -> dict[str, Any]:
        """Our plan in the fastest of the ways to emit it between which no rule decides, as `verify` tries them."""
        fn, args = self.workload.fn, self.workload.args
        first = compile_plan(plan, fn, args, "tpu")
        others = list(compile_variants(first, fn, args, "tpu", lambda _: None))
        best = pick_fastest(first, others).plan
        return {**self.ours(name, best, {}), "emission": best.emission.words(), "ways": 1 + len(others)}

    def partitioned(self, name: str, arguments: Any, results: Any = None) -> dict[str, Any]:
        """The plain function with these argument specs, and result specs or else only those of donated arguments.

        It is compiled with the device's own formats and with those that the compiler chooses; the faster program counts.
        """
        if results is None:
            results = self._donated(arguments)
        placed = [_placed(specs, self.mesh) for specs in (arguments, results)]
        rows = [self._compiled(name, formats, *placed) for formats in ("default", "auto")]
        best = min(rows, key=lambda row: (not row["fits"], row["step_ms"] or inf))
        return {**best, "other_formats_ms": [row["step_ms"] for row in rows if row is not best]} | {
            "arguments": _listed(arguments)
        }

    def hand_layouts(self) -> Iterator[dict[str, Any]]:
        """The expert layouts that differ for this function: argument specs alone, then with activations constrained."""
        seen: list[Any] = []
        args = self.workload.args
        example = importlib.import_module(f"examples.{self.example}")
        for layout in hand_layouts(self.topology, sizes_of(self.example, args)):
            specs = argument_specs(layout, self.example, args, self.topology)
            if specs in seen:
                continue
            seen.append(specs)
            yield self.partitioned(f"{layout.name} (arguments)", specs)
            with constrained(layout, example, self.mesh):
                yield self.partitioned(layout.name, specs)

    def by_rules(self, program: expert_programs.Program) -> Iterator[dict[str, Any]]:
        """The layouts that the rules of a program's authors give: arguments and activations.

        All are compiled with formats that the compiler chooses, then, the fastest first, with the device's own.
        """
        rows = []
        for rules in program.rules:
            rows.append(self._ruled(program, rules, "auto"))
            yield rows[-1]
        order = sorted(range(len(rows)), key=lambda i: (not rows[i]["fits"], rows[i]["step_ms"] or inf))
        for i in order:
            again = self._ruled(program, program.rules[i], "default")
            yield {**again, "contestant": f"{again['contestant']} (default formats)"}

    def _ruled(self, program: expert_programs.Program, rules: logical_axes.RuleSet, formats: str) -> dict[str, Any]:
        arguments = logical_axes.specs(program.named, rules, self.topology)
        mesh = logical_axes.mesh_for(self.mesh, self.topology)
        with logical_axes.in_force(rules, mesh, self.topology):
            placed = [_placed(specs, mesh) for specs in (arguments, self._donated(arguments))]
            return {**self._compiled(rules.name, formats, *placed), "arguments": _listed(arguments)}

    def judged(self, name: str, run: dict[str, Any]) -> dict[str, Any]:
        """The judgement of another process' program."""
        row = self._row(name, run["text"], run["peak_bytes"])
        spent = {"search_seconds": run["seconds"], "search_cpu_seconds": run["cpu_seconds"]}
        return {**row, **spent, "mesh": run["mesh"], "compiler": run["versions"]}

    def specs_from(self, run: dict[str, Any]) -> tuple[Any, Any]:
        """The argument and result specs that another process chose, as trees."""
        shaped = jax.eval_shape(self.workload.fn, *self.workload.args)
        trees = (self.workload.args, run["arguments"]), (shaped, run["results"])
        return tuple(
            jax.tree_util.tree_unflatten(
                jax.tree_util.tree_structure(tree), [PartitionSpec(*(tuple(e) or None for e in spec)) for spec in flat]
            )
            for tree, flat in trees
        )  # pyright: ignore[reportReturnType]

    # --- compiling ----------------------------------------------------------------------------------------------

    def _donated(self, arguments: Any) -> Any:
        """Result shardings that let donated arguments be written in place: (logits, cache) of a decode step."""
        if not self.workload.donate_argnums:
            return None
        (donated,) = self.workload.donate_argnums
        return None, arguments[donated]

    def _compiled(self, name: str, formats: str, ins: Any, outs: Any) -> dict[str, Any]:
        """The plain function, partitioned, with the device's own formats or with those that the compiler chooses."""
        if formats == "auto":
            ins, outs = (
                jax.tree_util.tree_map(
                    lambda s: Format(Layout.AUTO, s), each, is_leaf=lambda x: isinstance(x, NamedSharding)
                )
                for each in (ins, outs)
            )

        def traced_anew(*args: Any) -> Any:
            return self.workload.fn(*args)

        step = jax.jit(traced_anew, in_shardings=ins, out_shardings=outs, donate_argnums=self.workload.donate_argnums)
        return {**self._row_of(name, step), "formats": formats}

    def _row_of(self, name: str, step: Any) -> dict[str, Any]:
        """A jitted function's row, or the compiler's reason for refusing it."""
        started = time.monotonic()
        try:
            compiled = step.lower(*self.workload.args).compile()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            return {"contestant": name, "fits": False, "step_ms": None, "why": _said(error)}
        row = self._row(name, compiled.as_text() or "", _peak_bytes(compiled.memory_analysis()))
        return {**row, "compile_seconds": time.monotonic() - started}

    def _row(self, name: str, text: str, peak: float) -> dict[str, Any]:
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{self.case}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.hlo").write_text(text)
        verdict = judge(text, self.topology)
        dearest = sorted(verdict.sent, key=lambda each: -each.seconds)[:_SHOWN]
        return {
            "contestant": name,
            "fits": peak <= self.topology.chip.usable_hbm_bytes,
            "step_ms": verdict.replayed_seconds * 1e3,
            "sum_ms": verdict.step_seconds * 1e3,
            "floor_ms": verdict.floor_seconds * 1e3,
            "compute_ms": verdict.compute_seconds * 1e3,
            "wire_ms": verdict.wire_seconds * 1e3,
            "wire_mib": verdict.wire_bytes / _MIB,
            "overlapped_ms": verdict.overlapped_seconds * 1e3,
            "prefetch_mib": verdict.prefetch_bytes / _MIB,
            "peak_gib": peak / _GIB,
            "unestimated": verdict.unestimated,
            "notes": list(verdict.notes),
            "dearest_collectives": [
                f"{each.seconds * 1e3:.3f} ms: {each.kind} over {''.join(each.axes)} of {each.bytes} bytes × {each.count}"
                for each in dearest
            ],
        }


def _placed(specs: Any, mesh: Mesh) -> Any:
    """The shardings of a tree of specs; None stays."""

    def place(spec: Any) -> Any:
        return None if spec is None else NamedSharding(mesh, spec)

    return jax.tree_util.tree_map(place, specs, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))


def _peak_bytes(memory: Any) -> float:
    in_hbm = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    bound = in_hbm - memory.alias_size_in_bytes
    return float(min(memory.peak_memory_in_bytes or bound, bound))


def _listed(specs: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    named = [f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {spec}" for path, spec in leaves]
    return named[:24]  # an unrolled model repeats itself


def _said(error: Exception) -> str:
    """The part of a compiler's error with the reason."""
    text = str(error)
    used = re.search(r"(?:Ran out of memory|Used|Exceeded)[^\n]*", text)
    head = "RESOURCE_EXHAUSTED: " if "RESOURCE_EXHAUSTED" in text else ""
    return (head + used[0] if used else text.splitlines()[0])[:300]
