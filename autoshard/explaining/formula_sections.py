"""A plan's formulas as text: per operation, per kind of operation, per loop, for the whole step, and crossovers."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from autoshard._util.tables import WIDTH, percent, size, time
from autoshard.explaining.crossovers import Block, blocks, cheapest_start, crossover_text, crossovers, volumes
from autoshard.explaining.formulas import Cost, Formulas, formulas_of
from autoshard.explaining.model_shares import breakdown
from autoshard.naming.weights import is_product, weight_operand
from autoshard.planning.records import OperationPlan, PlanRecord
from costmodels.program.program import Operation
from costmodels.symbols import Expr, largest_terms, specialize, text

_LEFT_OUT = 0.001
"""The part of a sum that the omitted smallest terms may make up."""
_MENTIONED = 0.005
"""The share of the step above which an operation is listed."""


def formulas(plan: PlanRecord) -> Formulas:
    """The plan's closed forms: `formulas(plan).total.seconds` at its own numbers is `plan.estimate.seconds`.

    **Raises:** `ValueError` for a plan from an older file, which lacks the program.
    """
    if plan.program is None or plan.dimensions is None:
        raise ValueError(
            "this plan's file is from an older version and lacks the program; search again to get formulas"
        )
    return formulas_of(plan.program, plan.dimensions, plan.topology, plan.choice)


def sections(plan: PlanRecord, width: int = WIDTH) -> Iterator[Iterator[str]]:
    """The sections that `plan.explain(symbolic=True)` adds."""
    found = formulas(plan)
    yield _symbols(plan, found, width)
    yield _operations(plan, found, width)
    yield _kinds(plan, found, width)
    yield _regions(found, width)
    yield _whole_step(found, width)
    yield _shares(found, width)
    yield from (_crossovers(plan, block, width) for block in blocks(found.program, found.dimensions))


def _symbols(plan: PlanRecord, found: Formulas, width: int) -> Iterator[str]:
    yield "Symbols (formulas are of one chip)"
    used = {str(symbol) for cost in found.total for symbol in cost.free_symbols}
    dims = {name: f"{number:,}" for name, number in found.dimensions.sizes.items() if name in used}
    axes = {axis.name.upper(): f"{axis.size}" for axis in plan.topology.axes}
    rates = {name: f"{found.numbers[name]:g}" for name in found.numbers if name in used - {*dims, *axes}}
    for title, table in (("dimensions", dims), ("mesh axes", axes), ("rates, in SI units", rates)):
        if table:
            yield from _wrap(title, ", ".join(f"{name} = {number}" for name, number in table.items()), width)
    yield "  an operation takes the longer of FLOPs / C and HBM bytes / W_hbm; a matmul counts whole tiles and o_op;"
    yield "  only the longer one is shown, without roundings that have no effect here"
    if found.numbers["m_chip"]:
        yield "  an array of at most m_chip bytes stays on the chip between two operations (loop carries share that room)"
        yield "  and is not in the HBM bytes here"
    yield f"  largest terms first; terms that make up less than {percent(_LEFT_OUT)} are counted, not shown"
    for left, right in found.dimensions.relations:
        yield f"  {left.replace('*', '·')} = {right.replace('*', '·')} in this program"


def _operations(plan: PlanRecord, found: Formulas, width: int) -> Iterator[str]:
    yield "Operations, one run"
    rows = [(i, op) for i, op in enumerate(plan.operations) if _matters(plan, op)]
    lines: dict[tuple[str, ...], list[str]] = {}
    for i, op in rows:
        body = tuple(_quantities(_run_cost(found, i), found, width))
        lines.setdefault(body, []).append(_title(op, found, i))
    for body, titles in lines.items():
        yield f"  {titles[0]}" + (f", and {len(titles) - 1} equal ones" if len(titles) > 1 else "")
        yield from body


def _matters(plan: PlanRecord, op: OperationPlan) -> bool:
    return op.matmul or op.seconds + op.collective_seconds > _MENTIONED * plan.estimate.seconds


def _title(op: OperationPlan, found: Formulas, i: int) -> str:
    runs = found.runs(found.program.operations[i].region)
    return f"{op.name}: {op.strategy}" + (f", {text(runs)} runs" if runs != 1 else "")


def _run_cost(found: Formulas, i: int) -> Cost:
    """One run of an operation, with the reshards in its own region; reshards elsewhere belong to another region."""
    region = found.program.operations[i].region
    made = {use.value for use in found.program.operations[i].outputs}
    mine = [
        s for s in found.steps if s.region == region and (s.operation == i or (s.operation is None and s.value in made))
    ]
    cost = found.operations[i]
    for step in mine:
        cost = Cost(*(a + b for a, b in zip(cost, step.cost, strict=True)))
    return cost


def _quantities(cost: Cost, found: Formulas, width: int) -> Iterator[str]:
    """One line each for FLOPs, bytes and seconds that are not 0."""
    rows = (
        ("FLOPs", cost.flops, lambda n: f"{n:.4g}"),
        ("HBM bytes", cost.hbm_bytes, size),
        ("sent bytes", cost.wire_bytes, size),
        ("seconds", cost.seconds, time),
    )
    for name, expression, shown in rows:
        if expression != 0:
            sum_ = _sum(specialize(expression, found.numbers), found)
            yield from _wrap(f"    {name:10s}", f"{sum_} = {shown(found.at(expression))}", width)


def _sum(expression: Expr, found: Formulas) -> str:
    terms, rest = largest_terms(expression, found.numbers, _LEFT_OUT)
    shown = " + ".join(text(term) for term in terms)
    if not rest:
        return shown
    return f"{shown} + {len(rest)} smaller term{'s' if len(rest) > 1 else ''}"


def _kinds(plan: PlanRecord, found: Formulas, width: int) -> Iterator[str]:
    yield "Kinds of operations, one step"
    whole = plan.estimate.seconds
    for kind, cost in found.by_kind(lambda i, op: kind_of(found, i, op)).items():
        part = found.at(cost.seconds) / whole if whole else 0.0
        yield f"  {kind}: {percent(part)} of the step"
        yield from _quantities(cost, found, width)


def kind_of(found: Formulas, i: int, op: Operation) -> str:
    """The kind of an operation, as a row title."""
    if op.op_class == "matmul":
        by_weight = is_product(op) and weight_operand(found.program, i) is not None
        return "matmuls by weights" if by_weight else "matmuls of activations"
    names = {
        "fused": "elementwise and reductions",
        "memory": "gathers, scatters, updates",
        "boundary": "stacked results",
    }
    return names.get(op.op_class, op.op_class)


def _regions(found: Formulas, width: int) -> Iterator[str]:
    loops = [pair for pair in found.by_region().items() if found.program.regions[pair[0]].kind == "loop"]
    if loops:
        yield "Loops, one round"
        for region, cost in loops:
            yield f"  {found.program.regions[region].name}: {text(found.runs(region))} iterations"
            yield from _quantities(cost, found, width)


def _whole_step(found: Formulas, width: int) -> Iterator[str]:
    yield "Whole step"
    yield from _quantities(found.total, found, width)


def _shares(found: Formulas, width: int) -> Iterator[str]:
    """Parameters, FLOPs and activation bytes by kind, with their shares."""
    rows = breakdown(found.program, found.dimensions)
    yield "Shares of the whole program, one step on all chips together"
    for row in rows:
        yield f"  {row.kind}"
        columns = (("parameters", row.parameters), ("FLOPs", row.flops), ("made bytes", row.activation_bytes))
        for at, (name, expression) in enumerate(columns, start=1):
            if expression != 0:
                part = found.at(expression) / sum(found.at(each[at]) for each in rows)
                line = f"{_sum(expression, found)} = {found.at(expression):.4g}, {percent(part)}"
                yield from _wrap(f"    {name:10s}", line, width)


def _crossovers(plan: PlanRecord, block: Block, width: int) -> Iterator[str]:
    """The volumes of the named layouts of a block, and their crossovers."""
    yield f"Weight-stationary or weight-gathered: {' · '.join(block.weights)}"
    yield "  bytes that a chip sends for one block, over all its links, with (N-1)/N taken as 1 (Pope et al. 2022)"
    yield from (f"    {name:8s} {text(each)}" for name, each in volumes(block, plan.topology).items())
    found = crossovers(block, plan.topology)
    yield f"  {found[0].below if found else cheapest_start(block, plan.topology)} sends least with few tokens"
    yield from (f"  {crossover_text(each, block)}" for each in found)


def _wrap(title: str, line: str, width: int) -> Iterator[str]:
    """A line after its title, with indented continuations."""
    first = f"  {title}  "
    yield from wrap(
        line,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        break_long_words=False,
    )
