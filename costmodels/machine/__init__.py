"""Chips, topologies, and the collectives on them."""

from costmodels.machine.chips import Chip as Chip
from costmodels.machine.chips import catalogue as catalogue
from costmodels.machine.chips import chip as chip
from costmodels.machine.conventions import Pricing as Pricing
from costmodels.machine.topology import Axis as Axis
from costmodels.machine.topology import Topology as Topology
from costmodels.machine.topology import parse_topology as parse_topology
