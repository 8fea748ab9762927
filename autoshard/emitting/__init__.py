"""The fourth pass: from a plan to a sharded JAX function, with its mesh, shardings and formats."""

from autoshard.emitting.collectives.reshard_steps import run_step as run_step
from autoshard.emitting.program import emit as emit
from autoshard.emitting.sharding import spec_of as spec_of
