"""Least-squares fits of a topology's constants to timings.

Every modelled time is a sum of unknown constants, each times a known number:

| piece of work | seconds | unknown |
|---|---|---|
| matmul | $o + μ_d c$ | $o$ overhead of an operation, $μ_d$ the slowdown of a dtype against its stated rate |
| vector | $μ_v c$ | $μ_v$, of the vector unit |
| memory | $μ_m b$, plus the overhead if the model has one | $μ_m$, of HBM |
| collective | $l + h α_i + w / W_i$ | $l$ launch; $α_i$ a hop and $W_i$ the bandwidth of the links of axis $i$ |

with $c$ and $b$ the model's compute and memory seconds at the constants that the topology has, and $h$, $w$ its hops and
communicated bytes. This module evaluates the model for them, with all other constants set to 0 or infinity.

A fit makes $\\sum_i |\\log (\\hat t_i / t_i)|$ small, by reweighted least squares of relative errors: short times count as
much as long ones, outliers little, and no constant is below 0. Timings that are not `fitted` are held out: they are only
predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from costmodels.machine.chips import Chip, Constant
from costmodels.machine.collectives import seconds as collective_seconds
from costmodels.machine.interconnects import Switch, Torus
from costmodels.machine.topology import Axis, Topology, complete_axes
from costmodels.operations import price
from costmodels.program.program import Factor, Operation, Output, Program, Use, Value

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FAST = 1e30
"""Bytes per second of links with negligible cost."""
_ITEMSIZES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "float64": 8.0, "int8": 1.0}


@dataclass(frozen=True)
class Timing:
    """The measured time of one piece of work that all chips run at the same time.

    - `kind`: "matmul", "vector" (elementwise work on arrays that fit a cache), "memory" (elementwise work on arrays that do
      not), "one row" (a matmul bound by reading its weight), or a kind of collective.
    - `sizes`: m, k and n of a matmul; the elements of elementwise work; the bytes per chip of a collective, by the
      convention of `costmodels.machine.collectives`.
    - `flops_per_element`: of elementwise work.
    - `axes`: of a collective.
    - `fitted`: whether the constants may be fitted to it.
    """

    kind: str
    sizes: tuple[int, ...]
    seconds: float
    dtype: str = "float32"
    axes: tuple[str, ...] = ()
    flops_per_element: float = 2.0
    fitted: bool = True

    @property
    def series(self) -> str:
        """Its name without its size: "matmul float32", "all-gather over xy"."""
        return f"{self.kind} over {''.join(self.axes)}" if self.axes else f"{self.kind} {self.dtype}"


def predict(timing: Timing, topology: Topology) -> float:
    """The modelled seconds of the work of a timing."""
    if timing.kind in COLLECTIVES:
        axes = tuple(topology.axis(name) for name in timing.axes)
        return float(collective_seconds(timing.kind, axes, float(timing.sizes[0])))
    return model_seconds(timing, topology.chip)[2]


def fit_topology(timings: Sequence[Timing], topology: Topology, source: str) -> Topology:
    """The topology with every constant that the timings determine; all others are unchanged.

    A published rate stays and its efficiency is measured; an assumed rate is itself measured.

    **Arguments:**

    - `timings`: of any kinds; timings that are not `fitted` are ignored.
    - `source`: the source of the measured constants: machine, date, versions.
    """
    used = [timing for timing in timings if timing.fitted]
    chip = topology.chip
    for fit in (_fit_matmul, _fit_vector, _fit_memory):
        found = fit(used, chip)
        chip = chip.override({name: Constant(value, source, "measured") for name, value in found.items()}, source)
    links = _fit_collectives(used, replace(topology, chip=chip))
    chip = chip.override({name: Constant(value, source, "measured") for name, value in links.items()}, source)
    return complete_axes(replace(topology, chip=chip))


# --- on the chip


def model_seconds(timing: Timing, chip: Chip) -> tuple[float, float, float]:
    """Modelled seconds of one run: compute, memory, all."""
    program = _program(timing)
    op = program.operations[0]
    cost = price(program, op, np.ones((1, len(op.factors))), chip)
    return float(cost.compute_seconds[0]), float(cost.memory_seconds[0]), float(cost.seconds[0])


def _program(timing: Timing) -> Program:
    """The timed work as a program of one operation."""
    matmul = timing.kind in ("matmul", "one row")
    dims = ((0, 1), (1, 2), (0, 2)) if matmul else ((0,), (0,))
    size = _ITEMSIZES[timing.dtype]
    values = tuple(
        Value(f"array {i}", tuple(timing.sizes[f] for f in each), timing.dtype, size) for i, each in enumerate(dims)
    )
    uses = tuple(Use(i, tuple((f,) for f in each)) for i, each in enumerate(dims))
    operation = Operation(
        timing.kind,
        "dot_general" if matmul else "mul",
        tuple(Factor(n, "sum" if matmul and i == 1 else "parallel") for i, n in enumerate(timing.sizes)),
        uses[:-1],
        uses[-1:],
        op_class="matmul" if matmul else "fused",
        traffic=(0, 1, Output()) if matmul else (0, Output()),
        flops_per_point=2.0 if matmul else timing.flops_per_element,
        dtype=timing.dtype,
    )
    return Program(timing.kind, values, (operation,))


def _overhead(timing: Timing, chip: Chip) -> float:
    """The seconds that the model adds to the longer side of an operation."""
    compute, memory, seconds = model_seconds(timing, chip)
    return max(seconds - max(compute, memory), 0.0)


def _fit_matmul(timings: Sequence[Timing], chip: Chip) -> dict[str, float]:
    """Rates by dtype and the overhead of an operation."""
    used = [timing for timing in timings if timing.kind == "matmul"]
    dtypes = list(dict.fromkeys(timing.dtype for timing in used))
    if not used:
        return {}
    compute = np.array([model_seconds(timing, chip)[0] for timing in used])
    columns = [np.where([timing.dtype == dtype for timing in used], compute, 0.0) for dtype in dtypes]
    overhead, *slower = robust_fit([np.ones(len(used)), *columns], [timing.seconds for timing in used])
    rates = {
        f"flops_per_second.{dtype}": (chip.matmul_flops_per_second(dtype), by)
        for dtype, by in zip(dtypes, slower, strict=True)
        if by
    }
    return {"op_overhead_seconds": overhead, **_measured_rates(chip, "matmul_efficiency", rates)}


def _measured_rates(chip: Chip, efficiency: str, rates: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Measured rates, as constants.

    If the chip has an efficiency and the first rate is published, that rate stays and the efficiency changes; the other
    rates are set so that the same efficiency gives the measured ones. Otherwise, or if the measured rate exceeds the
    published one, all rates are the measured ones and the efficiency is 1.

    **Arguments:**

    - `rates`: name to the stated rate, and the factor by which the model at the chip's constants is too fast.
    """
    constants = chip.constants
    reached = constants[efficiency].value if efficiency in constants else 1.0
    first = next(iter(rates), None)
    if first is None:
        return {}
    new = reached / rates[first][1]
    if efficiency in constants and first in constants and constants[first].status == "published" and new <= 1:
        others = {name: rate * reached / by / new for name, (rate, by) in rates.items() if name != first}
        return {efficiency: new, **others}
    found = {name: rate * reached / by for name, (rate, by) in rates.items()}
    return found | ({efficiency: 1.0} if efficiency in constants else {})


def _fit_vector(timings: Sequence[Timing], chip: Chip) -> dict[str, float]:
    used = [timing for timing in timings if timing.kind == "vector"]
    if not used:
        return {}
    columns = [np.array([model_seconds(timing, chip)[0] for timing in used])]
    (slower,) = robust_fit(columns, [timing.seconds - _overhead(timing, chip) for timing in used])
    return {"vector_flops_per_second": chip.vector_flops_per_second / slower} if slower else {}


def _fit_memory(timings: Sequence[Timing], chip: Chip) -> dict[str, float]:
    used = [timing for timing in timings if timing.kind in ("memory", "one row")]
    left = [timing.seconds - _overhead(timing, chip) for timing in used]
    kept = [i for i, seconds in enumerate(left) if seconds > 0]
    if not kept:
        return {}
    columns = [np.array([model_seconds(used[i], chip)[1] for i in kept])]
    (slower,) = robust_fit(columns, [left[i] for i in kept])
    return _measured_rates(
        chip, "hbm_efficiency", {"hbm_bytes_per_second": (chip.hbm_bytes_per_second, slower)} if slower else {}
    )


# --- between chips


def _fit_collectives(timings: Sequence[Timing], topology: Topology) -> dict[str, float]:
    """Launch, hops and bandwidth from collectives over single axes; axes with equal links share their constants."""
    used = [timing for timing in timings if timing.kind in COLLECTIVES and len(timing.axes) == 1]
    if not used:
        return {}
    alike = _links(topology)
    groups = list(dict.fromkeys(alike[timing.axes[0]] for timing in used))
    hops = [_column(used, topology, alike, group, hop_seconds=1.0, bytes_per_second=_FAST) for group in groups]
    wires = [_column(used, topology, alike, group, hop_seconds=0.0, bytes_per_second=1.0) for group in groups]
    launch, *found = robust_fit([np.ones(len(used)), *hops, *wires], [timing.seconds for timing in used])
    stated = topology.chip.constants
    reached = stated["wire_efficiency"].value if "wire_efficiency" in stated else 1.0
    constants, rates = {"collective_overhead_seconds": launch}, {}
    for group, hop, wire in zip(groups, found[: len(groups)], found[len(groups) :], strict=True):
        constants[f"{group}hop_seconds"] = hop
        name, many = _bandwidth(topology, group)
        if wire:  # else not distinguishable from the launch: unchanged
            rates[name] = (stated[name].value, stated[name].value * reached * wire / many)
    return constants | _measured_rates(topology.chip, "wire_efficiency", rates)


def _column(
    timings: Iterable[Timing], topology: Topology, alike: dict[str, str], group: str, **constants: float
) -> np.ndarray:
    """The coefficient of one constant of a group of links in each timing."""

    def without_constants(axis: Axis) -> Axis:
        return replace(axis, launch_seconds=0.0, **constants)

    return np.array(
        [
            float(
                collective_seconds(
                    timing.kind, (without_constants(topology.axis(timing.axes[0])),), float(timing.sizes[0])
                )
            )
            if alike[timing.axes[0]] == group
            else 0.0
            for timing in timings
        ]
    )


def _links(topology: Topology) -> dict[str, str]:
    """Axis to the prefix of its links' constants."""
    match topology.chip.interconnect:
        case Switch() if len(topology.axes) == 2:
            return {topology.axes[0].name: "switch.node_", topology.axes[1].name: "switch."}
        case other:
            return {axis.name: f"{type(other).__name__.lower()}." for axis in topology.axes}


def _bandwidth(topology: Topology, group: str) -> tuple[str, float]:
    """The constant of a group's bandwidth, and the number of axes whose links it sums."""
    match topology.chip.interconnect:
        case Torus():
            return "torus.link_bytes_per_second", 1.0
        case Switch() as switch if group == "switch.node_":
            return "switch.node_egress_bytes_per_second", switch.chips_per_node
        case other:
            return f"{type(other).__name__.lower()}.egress_bytes_per_second", 1.0


# --- least squares


_ROUNDS = 20
"""Reweightings of a robust fit."""
_CLOSE = 0.02
"""The error, in logarithms, below which a timing has its full weight in a robust fit."""


def robust_fit(columns: Sequence[np.ndarray], target: Sequence[float]) -> list[float]:
    """The $x \\ge 0$ that approximately minimises $\\sum_i |\\log (\\sum_j a_{ij} x_j / t_i)|$.

    Plain least squares of relative errors would follow the shortest times: a prediction that is ten times too short has
    error 0.9, one that is ten times too long 9. Iteratively reweighted least squares give this sum instead. If plain least
    squares leave no error, nothing changes.

    **Arguments:** as for `relative_least_squares`.
    """
    matrix, times = np.stack(columns, axis=1), np.asarray(target, dtype=float)
    found = relative_least_squares(columns, target)
    for _ in range(_ROUNDS):
        model = np.maximum(matrix @ np.array(found), _CLOSE * times)
        apart = np.maximum(np.abs(np.log(model / times)), _CLOSE)
        weights = np.sqrt(times / (model * apart))
        found = relative_least_squares(columns, target, weights)
    return found


def relative_least_squares(
    columns: Sequence[np.ndarray], target: Sequence[float], weights: np.ndarray | None = None
) -> list[float]:
    """The $x \\ge 0$ that minimises $\\sum_i ((\\sum_j a_{ij} x_j) / t_i - 1)^2$.

    With few unknowns, enumeration is enough: the best nonnegative one of the plain least-squares fits to every subset of
    columns. (The minimum under $x \\ge 0$ is the plain minimum over its own positive columns.)

    **Arguments:**

    - `columns`: $a_j$, one array for each unknown.
    - `target`: $t$, above 0.
    - `weights`: the weight of each error before squaring; 1 by default.
    """
    goal = np.ones(len(target)) if weights is None else weights
    scaled = np.stack(columns, axis=1) / np.asarray(target)[:, None] * goal[:, None]
    sizes = np.linalg.norm(scaled, axis=0)
    live = [j for j in range(len(columns)) if sizes[j] > 0]
    best, least = np.zeros(len(columns)), float(np.sum(goal**2))
    for count in range(1, len(live) + 1):
        for some in combinations(live, count):
            found = np.linalg.lstsq(scaled[:, some] / sizes[list(some)], goal, rcond=None)[0]
            trial = np.zeros(len(columns))
            trial[list(some)] = found / sizes[list(some)]
            error = float(np.sum((scaled @ trial - goal) ** 2))
            if (found >= 0).all() and error < least:
                best, least = trial, error
    return [float(x) for x in best]


@dataclass(frozen=True)
class Residual:
    """Relative errors of the model on one series of timings, fitted and held out; None if there are none."""

    series: str
    fitted: int
    held_out: int
    fitted_median: float | None
    held_out_median: float | None
    held_out_worst: float | None
    bias: float
    """The median of predicted / measured over all its timings."""


def residuals(timings: Sequence[Timing], topology: Topology) -> list[Residual]:
    """The errors of a topology's predictions per series, with "all" as the last."""
    names = list(dict.fromkeys(timing.series for timing in timings))
    groups = [(name, [timing for timing in timings if timing.series == name]) for name in names]
    return [_residual(name, group, topology) for name, group in [*groups, ("all", list(timings))]]


def _residual(name: str, timings: Sequence[Timing], topology: Topology) -> Residual:
    ratios = np.array([predict(timing, topology) / timing.seconds for timing in timings])
    errors, used = np.abs(ratios - 1), np.array([timing.fitted for timing in timings], dtype=bool)
    inside, outside = errors[used], errors[~used]
    return Residual(
        name,
        len(inside),
        len(outside),
        float(np.median(inside)) if len(inside) else None,
        float(np.median(outside)) if len(outside) else None,
        float(outside.max()) if len(outside) else None,
        float(np.median(ratios)),
    )
