"""The planned program on global arrays: the partitioner makes the collectives, and chosen values have their layouts.

The traced steps run as written, on `jax.Array`s of the global shapes. Where a value takes a chosen layout, it passes
through `with_sharding_constraint`. Everything else is left to the compiler's sharding propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding

from autoshard.emitting.memory_orders import Order
from autoshard.emitting.program import Runner
from autoshard.emitting.scope import Scope
from autoshard.emitting.sharding import spec_of
from autoshard.emitting.tpu_workarounds.argument_layout import with_argument_layout
from autoshard.emitting.tpu_workarounds.vector_matmul import product
from autoshard.errors import TopologyError
from autoshard.planning.carriage import Constraint
from autoshard.planning.emission import Emission
from autoshard.rules.elementwise import MARKERS
from autoshard.tracing.blocks import Atom, Literal, OpStep, Traced
from costmodels.machine.topology import Topology
from search.answer.assignment import Choice, kept_layout, needed_layout
from search.formulation.layouts import Layout

_AS_WRITTEN = Emission(residual_barriers=False)


class GlobalRunner(Runner):
    """Runner of a traced program on global arrays; `chosen` are the values, each with the layout it is constrained to."""

    def __init__(
        self,
        traced: Traced,
        choice: Choice,
        topology: Topology,
        mesh: Any,
        chosen: Collection[tuple[int, Layout]],
        orders: Sequence[Order] = (),
    ) -> None:
        super().__init__(traced, choice, topology, _AS_WRITTEN, orders)
        self.mesh, self.chosen = mesh, frozenset(chosen)
        self.constrained = frozenset(value for value, _ in self.chosen)
        self.copied, self.waits = frozenset(), {}

    def reshard(self, value: int, piece: Any, source: Layout, target: Layout) -> Any:
        """The array, constrained to the source, the layouts between its collectives and the target, each if it is chosen."""
        empty = 0 in self.program.values[value].shape
        steps = () if empty or value not in self.constrained else self.path(value, source, target)
        for layout in dict.fromkeys((source, *(step.target for step in steps), target)):
            if (value, layout) in self.chosen:
                piece = lax.with_sharding_constraint(piece, NamedSharding(self.mesh, spec_of(layout)))
        return piece

    def _result(self, scope: Scope, k: int, atom: Atom) -> Any:
        if isinstance(atom, Literal):
            return super()._result(scope, k, atom)
        return scope.get(atom, needed_layout(self.program, self.choice, self.program.results[k], 0))

    def _in_argument_layout(self, piece: Any, value: int) -> Any:
        """The global array whose shards have a TPU's layout of an argument of their shape, also if that is row-major.

        Left to itself, the TPU compiler (libtpu 0.0.42) re-tiles the keys of PaLM 8B before the loop and after it: 9.06 instead
        of 5.73 ms. The layout is set inside a `shard_map`: set on the global array, the compiler gathers the cache of PaLM 540B
        (v4 4×4×4) and runs out of memory.
        """
        layout = kept_layout(self.program, self.choice, value)
        if self.topology.chip.kind != "tpu" or layout.partial:
            return piece
        spec, plain = spec_of(layout), not self.orders.get(value)
        local = partial(with_argument_layout, always=plain)
        return jax.shard_map(local, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)(piece)

    def _operation(self, step: OpStep, scope: Scope) -> None:
        op = self.program.operations[step.operation]
        layouts = iter(needed_layout(self.program, self.choice, step.operation, k) for k in range(len(op.inputs)))
        on_tpu = self.topology.chip.kind == "tpu"
        operands = [a.value if isinstance(a, Literal) else scope.get(a, next(layouts)) for a in step.operands]
        for value, array in zip(step.results, _run_globally(step.eqn, operands, on_tpu), strict=True):
            scope.put(value, array)


def _run_globally(eqn: Any, operands: Sequence[Any], on_tpu: bool) -> Sequence[Any]:
    """Runs one equation on global arrays; placement markers are identities, since the plan decides the placement."""
    if eqn.primitive.name in MARKERS:
        return operands
    if eqn.primitive.name == "dot_general" and on_tpu:
        return [product(eqn, *operands)]
    results = eqn.primitive.bind(*operands, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def constrained(
    traced: Traced,
    choice: Choice,
    topology: Topology,
    mesh: Any,
    constraints: Sequence[Constraint],
    orders: Sequence[Order] = (),
) -> Callable[..., list[Any]]:
    """The program with constraints, as a function of flat arguments and constants, each a global array.

    **Raises:** `TopologyError` for a mesh with explicit or manual axes, whose shardings no constraint can change.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise TopologyError(
            "carry='constraints' needs a mesh whose axes are all AxisType.Auto, as plan.make_mesh() makes it, got"
            f" {', '.join(f'{name}: {kind.name}' for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))}."
            " Use carry='manual' on other meshes."
        )
    chosen = {(value, layout) for each in constraints for value in each.values for layout in each.layouts}
    return GlobalRunner(traced, choice, topology, mesh, chosen, orders)
