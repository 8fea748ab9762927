"""Topologies: meshes of chips, and the links along each axis.

`parse_topology("v4:4x4x4")` is a torus of TPUs, `"h100:4x8"` four nodes of eight GPUs, `"cpu:2x4"` eight devices of one
host. Axes are named x, y, z, w in the order of their sizes. `"2xv4:4x4x4"` is two slices of v4:4x4x4 on the data-center
network, which is the axis w, before the others. A TOML file has the same information and may set other numbers:

```toml
chip = "v4"
shape = [4, 4, 4]
name = "our v4 slice"                # optional, like everything below
measured = true                      # constants that fit published wall-clock times; with it, overlap is "async" by default
slices = 2                           # number of slices of that shape, on the data-center network

[constants]                          # any number of the chip, by its name in the catalogue
hbm_bytes_per_second = 1.1e12
flops_per_second.bfloat16 = 2.5e14   # "given"; or with its source, as `autoshard calibrate` writes it:
matrix_tile = { value = 128, status = "measured", source = "our machine, 2026-11-21" }

[axes.z]                             # any of bytes_per_second, wraparound, hop_seconds
wraparound = false

[pricing]                            # the conventions of costmodels.machine.conventions
bandwidth = "total"
overlap = 0.4                        # or "looped", "async"
```
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from costmodels.machine.chips import (
    Chip,
    ChipFormatError,
    chip,
    chip_from_dict,
    constant_from_dict,
    use_measured_constants,
)
from costmodels.machine.conventions import ASYNC, PHYSICAL, Pricing, PricingError, pricing_from_dict
from costmodels.machine.interconnects import Switch, Torus, Wraparound

AXIS_NAMES = ("x", "y", "z", "w")
DCN_AXIS = "w"
"""The axis between slices of a torus, on the data-center network; no torus has that many axes of its own."""


class TopologyFormatError(ValueError):
    """Raised for an invalid topology; states the expected form."""


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, and the links along it.

    - `bytes_per_second`: one-way, as achieved; of each link on a `torus` axis, out of each chip on a `switch` axis.
    - `wraparound`: whether a torus axis closes to a ring.
    - `hop_seconds`: latency from a chip to its neighbour, or through the switch.
    - `launch_seconds`: the start-up time of a collective.
    """

    name: str
    size: int
    kind: Literal["torus", "switch"]
    bytes_per_second: float
    wraparound: bool = False
    hop_seconds: float = 0.0
    launch_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or not self.bytes_per_second > 0 or self.kind not in ("torus", "switch"):
            fits = "an axis must have a size of 1 or more, bytes_per_second above 0 and kind 'torus' or 'switch'"
            raise TopologyFormatError(f"{self}: {fits}.")

    @property
    def ring(self) -> bool:
        """Whether both directions of a torus axis lead to different neighbours: two chips have one link, not two."""
        return self.kind == "torus" and self.wraparound and self.size > 2


@dataclass(frozen=True)
class Topology:
    """A mesh of equal chips, with the conventions for the cost of its collectives.

    ```python
    topology = parse_topology("v4:4x4x8")
    topology.size             # 128
    topology.axis_sizes       # {"x": 4, "y": 4, "z": 8}
    topology.symmetries()     # (("x", "y"), ("z",))
    ```
    """

    name: str
    chip: Chip
    axes: tuple[Axis, ...]
    pricing: Pricing = PHYSICAL

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if len(set(names)) < len(names):
            raise TopologyFormatError(f"The axes of {self.name} must have different names, got {', '.join(names)}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes, in order."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        """The number of chips."""
        return prod(self.shape)

    @property
    def slices(self) -> int:
        """The number of slices of a torus, on the data-center network."""
        return prod(self.shape) // prod(axis.size for axis in self.within_slice)

    @property
    def within_slice(self) -> tuple[Axis, ...]:
        """The axes without the one between slices."""
        torus = isinstance(self.chip.interconnect, Torus)
        return tuple(axis for axis in self.axes if axis.kind == "torus" or not torus)

    @property
    def unused_constants(self) -> tuple[str, ...]:
        """The constants of its chip that no cost of this topology depends on."""
        return () if self.slices > 1 else ("dcn_egress_bytes_per_second", "dcn_hop_seconds")

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Axis name to size, in order."""
        return {axis.name: axis.size for axis in self.axes}

    @cached_property
    def total_bytes_per_second(self) -> float:
        """The bandwidth of all links of a chip on the torus, including those of torus axes that the mesh omits."""
        links = [axis.bytes_per_second for axis in self.axes if axis.kind == "torus"]
        if isinstance(torus := self.chip.interconnect, Torus):
            link = torus.link_bytes_per_second * self.chip.wire_efficiency
            links += [link] * (int(torus.axes) - len(links))
        return 2 * sum(links)

    @cached_property
    def _by_name(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in self.axes}

    def axis(self, name: str) -> Axis:
        """The axis of this name.

        **Raises:** `KeyError`, with the names of all axes.
        """
        if name not in self._by_name:
            raise KeyError(f"{self.name} has no axis {name!r}; it has {', '.join(self._by_name)}")
        return self._by_name[name]

    def symmetries(self) -> tuple[tuple[str, ...], ...]:
        """The axes in groups of interchangeable ones, which have the same costs, in order."""
        groups: dict[Axis, list[str]] = {}
        for axis in self.axes:
            groups.setdefault(replace(axis, name="", wraparound=axis.ring), []).append(axis.name)
        return tuple(tuple(names) for names in groups.values())

    def to_dict(self) -> dict[str, Any]:
        """The topology and all constants of its chip as plain data, for JSON."""
        axes = [asdict(axis) for axis in self.axes]
        return {"name": self.name, "chip": self.chip.to_dict(), "axes": axes, "pricing": self.pricing.to_dict()}


def topology_from_dict(data: Mapping[str, Any]) -> Topology:
    """The inverse of `Topology.to_dict`.

    Without `pricing` the conventions are the defaults, as in older plan files.

    **Raises:** `TopologyFormatError` for missing or unknown keys, `ChipFormatError` for a malformed chip, `PricingError`
    for unknown conventions.
    """
    _keys("The topology", data, required=("name", "chip", "axes"), optional=("pricing",))
    known = [f.name for f in fields(Axis)]
    for axis in data["axes"]:
        _keys("An axis of the topology", axis, required=known)
    axes = tuple(Axis(**axis) for axis in data["axes"])
    return Topology(data["name"], chip_from_dict(data["chip"]), axes, pricing_from_dict(data.get("pricing", {})))


def parse_topology(text: str | Path) -> Topology:
    """The topology that `CHIP:AxBxC`, or the path of a TOML file, describes.

    - A TPU has as many sizes as its torus has axes, or fewer. Which axes close to rings follows from the chip: on v4
      and v5p all, if every axis is a multiple of 4; on v5e and v6e those of size 16.
    - A GPU has one size, the GPUs of one node, or two: nodes × GPUs per node.
    - `cpu` has one to four.
    - A prefix such as `2x` before a TPU is the number of slices; between them is the data-center network.

    **Raises:** `TopologyFormatError` for a malformed or impossible topology, `UnknownChipError` for a chip that is not
    in the catalogue. Both are `ValueError`s.
    """
    if isinstance(text, Path) or text.endswith(".toml"):
        return _from_file(Path(text))
    found = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?([\w-]+):(\d+(?:x\d+)*)", text)
    if not found:
        raise TopologyFormatError(
            f"Invalid topology {text!r}: expected CHIP:AxBxC, such as v4:4x4x4 or h100:2x8 (nodes × GPUs), or the path"
            " of a .toml file."
        )
    return topology_of_chip(text, chip(found[2]), [int(size) for size in found[3].split("x")], int(found[1] or 1))


def topology_of_chip(name: str, chip: Chip, sizes: Sequence[int], slices: int = 1) -> Topology:
    """The topology `CHIP:AxBxC` of chips that need not be in the catalogue, in a number of slices.

    **Raises:** `TopologyFormatError`.
    """
    if not 1 <= len(sizes) <= len(AXIS_NAMES):
        raise TopologyFormatError(f"{name} must have 1 to {len(AXIS_NAMES)} sizes, got {len(sizes)}.")
    if min(sizes) < 1:
        raise TopologyFormatError(f"The sizes of {name} must be 1 or more, got {min(sizes)}.")
    return Topology(name, chip, (*_between_slices(name, chip, slices), *_axes(name, chip, sizes)))


def complete_axes(topology: Topology) -> Topology:
    """The topology with the axes that follow from its chip and sizes, without settings for single axes."""
    sizes = [axis.size for axis in topology.within_slice]
    return replace(topology, axes=topology_of_chip(topology.name, topology.chip, sizes, topology.slices).axes)


def use_measured(topology: Topology) -> Topology:
    """The topology with constants that fit published wall-clock times, and the overlap "async" under which they were fitted."""
    chip = use_measured_constants(topology.chip)
    return complete_axes(replace(topology, chip=chip, pricing=replace(topology.pricing, overlap=ASYNC)))


def _between_slices(name: str, chip: Chip, slices: int) -> Iterator[Axis]:
    if slices < 1:
        raise TopologyFormatError(f"{name} must have 1 or more slices, got {slices}.")
    if slices == 1:
        return
    if not isinstance(chip.interconnect, Torus):
        raise TopologyFormatError(
            f"{name} has {slices} slices, but only chips on a torus come in slices. Write GPUs as nodes × GPUs, such as"
            " h100:4x8."
        )
    egress = chip.dcn_egress_bytes_per_second
    if not egress:
        raise TopologyFormatError(
            f"{name} has {slices} slices, but {chip.name} has no bandwidth for the network between them. Set"
            " dcn_egress_bytes_per_second in a .toml file."
        )
    yield Axis(DCN_AXIS, slices, "switch", egress, False, chip.dcn_hop_seconds, chip.collective_overhead_seconds)


def _axes(name: str, chip: Chip, sizes: Sequence[int]) -> Iterator[Axis]:
    launch, reached = chip.collective_overhead_seconds, chip.wire_efficiency
    match chip.interconnect:
        case Torus() as torus:
            _check_torus(name, chip, torus, sizes)
            link, hop, closed = torus.link_bytes_per_second * reached, torus.hop_seconds, _are_rings(torus, sizes)
            for label, size, wrap in zip(AXIS_NAMES, sizes, closed, strict=False):
                yield Axis(label, size, "torus", link, wrap, hop, launch)
        case Switch() as switch:
            _check_switch(name, chip, switch, sizes)
            if len(sizes) == 2:
                # The node's ports are shared by all its GPUs, including those that the topology does not use.
                share = switch.node_egress_bytes_per_second * reached / switch.chips_per_node
                yield Axis("x", sizes[0], "switch", share, False, switch.node_hop_seconds, launch)
            egress, hop = switch.egress_bytes_per_second * reached, switch.hop_seconds
            yield Axis(AXIS_NAMES[len(sizes) - 1], sizes[-1], "switch", egress, False, hop, launch)
        case bus:
            egress = bus.egress_bytes_per_second * reached
            for label, size in zip(AXIS_NAMES, sizes, strict=False):
                yield Axis(label, size, "switch", egress, False, bus.hop_seconds, launch)


def _are_rings(torus: Torus, sizes: Sequence[int]) -> list[bool]:
    """Whether each axis is a ring. Omitted sizes are 1, so v4:4x4 is a slice of a cube, and open."""
    rule: Wraparound = torus.wraparound
    if rule == "all axes multiples of 4":
        whole_cubes = len(sizes) == torus.axes and all(size % 4 == 0 for size in sizes)
        return [whole_cubes] * len(sizes)
    return [rule == "axis of 16" and size == 16 for size in sizes]


def _check_torus(name: str, chip: Chip, torus: Torus, sizes: Sequence[int]) -> None:
    if len(sizes) > torus.axes:
        raise TopologyFormatError(
            f"{name} has {len(sizes)} sizes, but the torus of {chip.name} has {torus.axes:g} axes; write at most"
            f" {torus.axes:g} sizes, such as {chip.name}:{'x'.join(['4'] * int(torus.axes))}."
        )


def _check_switch(name: str, chip: Chip, switch: Switch, sizes: Sequence[int]) -> None:
    most = int(switch.chips_per_node)
    if len(sizes) > 2:
        raise TopologyFormatError(
            f"{name} must have one or two sizes, nodes × GPUs, such as {chip.name}:4x{most}; got {len(sizes)}."
        )
    if sizes[-1] > most:
        nodes = -(-prod(sizes) // most)
        raise TopologyFormatError(
            f"{name} has {sizes[-1]} GPUs on one node, but a node of {chip.name} has {most}; write nodes × GPUs, such"
            f" as {chip.name}:{nodes}x{most}."
        )


def _from_file(path: Path) -> Topology:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TopologyFormatError(f"The topology file {path} cannot be read: {error}.") from error
    _keys(
        str(path),
        data,
        required=("chip", "shape"),
        optional=("name", "slices", "measured", "constants", "axes", "pricing"),
    )
    slices = _check_type(path, "slices", data.get("slices", 1), int, "a whole number")
    shape = _check_type(path, "shape", data["shape"], list, "a list of sizes, such as [4, 4, 4]")
    for size in shape:
        _check_type(path, "shape", size, int, "a list of whole numbers")
    base = chip(_check_type(path, "chip", data["chip"], str, "the name of a chip in quotes"))
    measured = _check_type(path, "measured", data.get("measured", False), bool, "true or false")
    base = use_measured_constants(base) if measured else base
    table = _check_type(path, "constants", data.get("constants", {}), dict, "a table of numbers")
    name = _check_type(path, "name", data.get("name", path.stem), str, "a name in quotes")
    conventions = _check_type(path, "pricing", data.get("pricing", {}), dict, "a table")
    conventions = {"overlap": ASYNC, **conventions} if measured else conventions
    try:
        numbers = dict(_dotted_entries(base.name, table))
        topology = topology_of_chip(name, base.override(numbers, str(path)), shape, slices)
        topology = replace(topology, pricing=pricing_from_dict(conventions))
    except (ChipFormatError, PricingError) as error:
        raise TopologyFormatError(f"{path}: {error}") from error
    changes = _check_type(path, "axes", data.get("axes", {}), dict, "a table with a table per axis")
    _keys(f"{path}: axes", changes, optional=list(topology.axis_sizes))
    return replace(topology, axes=tuple(_change_axis(path, axis, changes.get(axis.name, {})) for axis in topology.axes))


def _dotted_entries(owner: str, table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and tables that hold a `value`, at any depth, by dotted name."""
    for key, entry in table.items():
        dotted = prefix + key
        if not isinstance(entry, Mapping):
            yield dotted, entry
        elif "value" in entry:
            yield dotted, constant_from_dict(owner, dotted, entry)
        else:
            yield from _dotted_entries(owner, entry, f"{dotted}.")


def _change_axis(path: Path, axis: Axis, changes: object) -> Axis:
    where = f"axes.{axis.name}"
    table = _check_type(path, where, changes, dict, "a table")
    _keys(f"{path}: {where}", table, optional=("bytes_per_second", "wraparound", "hop_seconds"))
    for key, value in table.items():
        if key == "wraparound":
            _check_type(path, f"{where}.{key}", value, bool, "true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise TopologyFormatError(f"{path}: {where}.{key} must be a number of 0 or more, got {value!r}.")
    if table.get("bytes_per_second") == 0:
        raise TopologyFormatError(f"{path}: {where}.bytes_per_second must be a number above 0, got 0.")
    if table.get("wraparound") and axis.kind == "switch":
        raise TopologyFormatError(
            f"{path}: {where}.wraparound applies to torus axes only; this axis is a switch. Remove it."
        )
    return replace(axis, **table)


def _check_type(path: Path, key: str, value: Any, kind: type, fits: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TopologyFormatError(f"{path}: {key} must be {fits}, got {value!r}.")
    return value


def _keys(where: str, got: Mapping[str, Any], required: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
    allowed = [*required, *optional]
    faults = [f"lacks {key}" for key in required if key not in got]
    faults += [f"has an unknown key {key}" for key in got if key not in allowed]
    if faults:
        raise TopologyFormatError(f"{where} {' and '.join(faults)}; its keys are {', '.join(allowed)}.")
