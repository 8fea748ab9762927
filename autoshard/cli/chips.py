"""`autoshard chips`: the chip catalogue, with the source of every number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, get_args

import typer

from autoshard._util.tables import WIDTH, table, wrap_text
from autoshard.cli import common
from costmodels.machine.chips import Chip, Status, UnknownChipError, catalogue
from costmodels.machine.chips import chip as chip_named
from costmodels.machine.interconnects import Bus, Switch, Torus


def chips(
    name: Annotated[str | None, typer.Argument(metavar="[CHIP]", help="All constants of this chip.")] = None,
    json: common.AsJson = False,
    width: common.Width = None,
) -> None:
    """List the chip catalogue, or every constant of one chip with its status and source."""
    from json import dumps

    with common.report_errors(json=json):
        found = list(catalogue().values()) if name is None else [_chip(name)]
    if json:
        typer.echo(dumps([each.to_dict() for each in found], indent=2))
        return
    typer.echo(
        "\n".join(
            _constants(found[0], width or common.columns()) if name else _catalogue(found, width or common.columns())
        )
    )


def _chip(name: str) -> Chip:
    try:
        return chip_named(name)
    except UnknownChipError as error:
        raise common.Misuse(str(error)) from error


def _catalogue(chips: Iterable[Chip], width: int) -> list[str]:
    rows = [
        (
            chip.name,
            f"{chip.matmul_flops_per_second('bfloat16') / 1e12:g}",
            f"{chip.usable_hbm_bytes / 2**30:.4g}",
            f"{chip.hbm_bytes_per_second / 1e9:g}",
            _interconnect(chip),
            _statuses(chip),
        )
        for chip in chips
    ]
    headers = ("chip", "TFLOP/s", "GiB", "HBM GB/s", "interconnect", "its numbers are")
    note = (
        "TFLOP/s in bfloat16, usable GiB, one-way interconnect. autoshard chips CHIP lists all constants with sources."
    )
    return [*table(headers, rows, "<>>>~~", width), "", *wrap_text(note, width, 0)]


def _interconnect(chip: Chip) -> str:
    match chip.interconnect:
        case Torus() as torus:
            return f"{torus.axes:g}D torus, {torus.link_bytes_per_second / 1e9:g} GB/s a link"
        case Switch() as switch:
            node = f"nodes of {switch.chips_per_node:g}: {switch.egress_bytes_per_second / 1e9:g} GB/s a chip"
            return f"{node}, {switch.node_egress_bytes_per_second / 1e9:g} a node"
        case Bus() as bus:
            return f"bus, {bus.egress_bytes_per_second / 1e9:g} GB/s a device"


def _statuses(chip: Chip) -> str:
    counts = Counter(constant.status for constant in chip.constants.values())
    return ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status])


def _constants(chip: Chip, width: int) -> list[str]:
    rows = [(name, _number(each.value), each.status, each.source) for name, each in chip.constants.items()]
    return table(("constant", "value", "status", "source"), rows, "<><~" if width < WIDTH else "<><<", width)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and value < 1e12 else f"{value:g}"
