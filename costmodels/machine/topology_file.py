"""Topologies as TOML files: the inverse of `costmodels.machine.topology.parse_topology`."""

from __future__ import annotations

import json
from collections.abc import Iterator

from costmodels.machine.chips import Constant, chip
from costmodels.machine.topology import Axis, Topology, complete_axes

_AXIS_KEYS = ("bytes_per_second", "wraparound", "hop_seconds")


def topology_toml(topology: Topology, heading: str = "") -> str:
    """The text of a TOML file that `parse_topology` reads back, with every constant's status and source.

    It has only the constants that differ from the catalogue's.

    **Arguments:**

    - `heading`: a comment at the top.
    """
    shape = [axis.size for axis in topology.within_slice]
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    lines += [f"chip = {_text(topology.chip.name)}", f"shape = {shape}"]
    lines += [f"slices = {topology.slices}"] if topology.slices > 1 else []
    lines += [f"name = {_text(topology.name)}", "", "[constants]", *_constants(topology)]
    for axis, plain in zip(topology.axes, complete_axes(topology).axes, strict=True):
        lines += _axis(axis, plain)
    return "\n".join(lines) + "\n"


def _constants(topology: Topology) -> Iterator[str]:
    known = chip(topology.chip.name).constants
    for name, constant in topology.chip.constants.items():
        if constant != known.get(name):
            yield f"{name} = {_table(constant)}"


def _axis(axis: Axis, plain: Axis) -> Iterator[str]:
    changed = {key: getattr(axis, key) for key in _AXIS_KEYS if getattr(axis, key) != getattr(plain, key)}
    if changed:
        yield from ("", f"[axes.{axis.name}]")
        yield from (f"{key} = {json.dumps(value)}" for key, value in changed.items())


def _table(constant: Constant) -> str:
    return f'{{ value = {constant.value!r}, status = "{constant.status}", source = {_text(constant.source)} }}'


def _text(text: str) -> str:
    """A basic string of TOML: a JSON string with one more escaped character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
