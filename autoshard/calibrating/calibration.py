"""Calibration: a topology with constants fitted to timings on the attached devices, and its errors."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from autoshard._util.files import write_whole
from autoshard._util.tables import percent, table
from autoshard._util.tables import time as duration
from autoshard.annotating.attached import topology_of
from autoshard.calibrating.microbenchmarks import Ranges, cases
from autoshard.calibrating.step_check import StepCheck
from autoshard.calibrating.timing import Patience, shortest
from autoshard.emitting import targets
from autoshard.errors import TopologyError
from costmodels.fitting import Residual, Timing, fit_topology, predict, residuals
from costmodels.machine.chips import Constant
from costmodels.machine.topology import Topology
from costmodels.machine.topology_file import topology_toml

Say = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """A topology with measured constants, the timings behind them, and its prediction errors.

    - `before`: the topology with the catalogue's constants; `topology`: with the measured ones.
    - `timings`: all timings; those that are not `fitted` are held out.
    - `source`: the machine, the day and the versions.
    - `seconds`: the duration of the calibration.
    - `checks`: whole steps of models, predicted and measured.
    """

    before: Topology
    topology: Topology
    timings: tuple[Timing, ...]
    source: str
    seconds: float
    checks: tuple[StepCheck, ...] = ()

    @property
    def residuals(self) -> list[Residual]:
        """Relative errors of the predictions per series, with "all" as the last."""
        return residuals(self.timings, self.topology)

    @property
    def measured(self) -> dict[str, Constant]:
        """The measured constants, by dotted name."""
        return {name: each for name, each in self.topology.chip.constants.items() if each.source == self.source}

    def toml(self) -> str:
        """The topology as TOML, for `search --topology`."""
        heading = f"Measured by autoshard calibrate: {self.source}\n{_METHOD}"
        return topology_toml(self.topology, heading)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the topology file atomically."""
        write_whole(Path(path), self.toml())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON; each timing with its predicted time."""
        return {
            "topology": self.topology.to_dict(),
            "source": self.source,
            "seconds": self.seconds,
            "constants": {name: constant.value for name, constant in self.measured.items()},
            "residuals": [asdict(each) for each in self.residuals],
            "timings": [
                asdict(timing) | {"series": timing.series, "predicted_seconds": predict(timing, self.topology)}
                for timing in self.timings
            ],
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        return "\n".join(_report(self)) + "\n"


_METHOD = (
    "All devices work at the same time. The shortest of several interleaved repetitions counts.\n"
    "Least squares of relative errors, weighted against outliers, on two thirds of the sizes."
)


def calibrate(
    devices: str = "auto",
    dtypes: Sequence[str] | None = None,
    ranges: Ranges | None = None,
    patience: Patience | None = None,
    progress: Say = lambda _: None,
) -> Calibration:
    """Measures the attached devices and fits the constants of the cost model to them.

        calibration = autoshard.calibrate("cpu:8")
        print(calibration)                      # constants, and errors on held-out sizes
        calibration.save("host.toml")           # for autoshard.search(..., topology="host.toml")

    **Arguments:**

    - `devices`: "auto" for all that JAX sees, or their topology: "cpu:2x4" makes eight host devices.
    - `dtypes`: of matmuls; weights are read in the first. By default the usual ones of such chips.
    - `ranges`, `patience`: the sizes, and the duration of each timing.

    **Raises:** `TopologyError` if the devices do not fit the topology.
    """
    before = topology_of(devices)
    mesh = _mesh(before)
    started = time.monotonic()
    chosen = tuple(dtypes or (("float32", "bfloat16") if before.chip.kind == "cpu" else ("bfloat16", "float32")))
    found = cases(before, ranges or Ranges(), chosen)
    times = shortest([case.make(mesh) for case in found], patience or Patience(), progress)
    timings = tuple(replace(case.timing, seconds=each) for case, each in zip(found, times, strict=True))
    source = _source(mesh.devices.flat[0], before)
    topology = fit_topology(timings, before, source)
    room = {name: Constant(value, source, "measured") for name, value in _room(mesh.devices.flat[0], before).items()}
    topology = replace(topology, chip=topology.chip.override(room, source))
    return Calibration(before, topology, timings, source, time.monotonic() - started)


def _mesh(topology: Topology) -> Any:
    try:
        if topology.chip.kind == "cpu":
            return targets.mesh_of(targets.host_devices(topology.size), topology.axis_sizes)
        return targets.mesh_of(jax.devices(), topology.axis_sizes)
    except targets.TargetError as error:
        raise TopologyError(f"{topology.name} cannot be measured: {error}") from error


def _room(device: Any, topology: Topology) -> dict[str, float]:
    """The usable memory, as the device reports it; for host devices a share of the host's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return {"usable_hbm_bytes": float(stats["bytes_limit"])}
    if topology.chip.kind == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        share = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // topology.size)
        return {"hbm_bytes": share, "usable_hbm_bytes": share}
    return {}


def _source(device: Any, topology: Topology) -> str:
    """The machine, the day and the versions."""
    kind = _processor() if topology.chip.kind == "cpu" else device.device_kind
    cores = f" with {os.cpu_count()} cores" if topology.chip.kind == "cpu" else ""
    today = datetime.date.today().isoformat()
    return f"{topology.size} × {kind}{cores}, {today}, jax {jax.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


# --- the report


def _report(calibration: Calibration) -> Iterator[str]:
    yield f"{calibration.topology.name}, measured in {calibration.seconds:.0f} s: {calibration.source}"
    yield from (f"  {line}" for line in _METHOD.splitlines())
    yield from ("", "Constants")
    was = calibration.before.chip.constants
    rows = [
        (
            name,
            f"{was[name].value:.4g}" if name in was else "-",
            was[name].status if name in was else "-",
            f"{c.value:.4g}",
        )
        for name, c in calibration.measured.items()
    ]
    yield from _indent(table(("constant", "before", "which was", "measured"), rows, "<><>"))
    yield from ("", "Errors of predicted times")
    headers = ("series", "sizes", "median", "held out", "median", "worst", "predicted / measured")
    rows = [_residual_row(each) for each in calibration.residuals]
    yield from _indent(table(headers, rows, "<>>>>>>"))
    yield "  held out: every third size, and collectives over several axes; never fitted"
    if calibration.checks:
        yield from ("", "Steps")
        headers = ("step", "predicted", "to start it", "measured", "predicted / measured")
        rows = [_check_row(check) for check in calibration.checks]
        yield from _indent(table(headers, rows, "<>>>>"))
        yield "  to start it: the time of an empty program, which plans do not count; the ratio adds it to the prediction"


def _residual_row(each: Residual) -> tuple[str, ...]:
    def error_text(error: float | None) -> str:
        return "-" if error is None else percent(error)

    errors = (str(each.fitted), error_text(each.fitted_median), str(each.held_out), error_text(each.held_out_median))
    return (each.series, *errors, error_text(each.held_out_worst), f"{each.bias:.2f}")


def _check_row(check: StepCheck) -> tuple[str, ...]:
    times = (check.predicted_seconds, check.start_seconds, check.measured_seconds)
    return (check.name, *map(duration, times), f"{check.ratio:.2f}")


def _indent(lines: Sequence[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
