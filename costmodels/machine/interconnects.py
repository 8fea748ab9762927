"""Interconnects of chips: a torus, switches, or a bus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Wraparound = Literal["all axes multiples of 4", "axis of 16", "never"]
"""When the two ends of a torus axis are joined ("How To Scale Your Model", part 2)."""


@dataclass(frozen=True)
class Torus:
    """Every chip is linked to its two neighbours along each of `axes` axes.

    `link_bytes_per_second` is one-way, per link.
    """

    axes: float
    link_bytes_per_second: float
    hop_seconds: float
    wraparound: Wraparound = "never"


@dataclass(frozen=True)
class Switch:
    """Nodes of `chips_per_node` chips on one switch, and the nodes on a slower network.

    `egress_bytes_per_second` is one-way, per chip, into its node's switch; `node_egress_bytes_per_second` is one-way,
    per node, into the network between nodes.
    """

    chips_per_node: float
    egress_bytes_per_second: float
    hop_seconds: float
    node_egress_bytes_per_second: float
    node_hop_seconds: float


@dataclass(frozen=True)
class Bus:
    """Devices with equal links to each other, such as the devices of one host."""

    egress_bytes_per_second: float
    hop_seconds: float


Interconnect = Torus | Switch | Bus
