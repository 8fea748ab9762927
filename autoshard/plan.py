"""The plan: what every array and operation does on the mesh, what it costs, and how far that is proven.

A `Plan` is plain frozen data that a file can hold. It names operations by their position in the traced program and carries
the program's fingerprint; to run, it is bound to the function again, which is traced anew and must have the same
fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding

from autoshard.emitting import bind, placing, targets
from autoshard.emitting import formats as emitted_formats
from autoshard.emitting.emission import BY_DEFAULT, Emission
from autoshard.emitting.jitted import Formats, jitted
from autoshard.emitting.program import spec_of
from autoshard.errors import TopologyError
from costmodels.dimensions import Dimensions
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice
from search.formulation.layouts import Layout
from search.solve import Proof

if TYPE_CHECKING:
    from autoshard.explaining.formulas import Formulas
    from autoshard.naming.parallelism import Parallelism


@dataclass(frozen=True)
class ArrayPlan:
    """One argument, closed-over constant or result: its path in the user's words, its layout, and its bytes on one chip.

    `weak` marks a Python scalar, whose type gives way to the types it meets. `order` has the dimensions from major to minor in
    memory; it is empty where they lie as the device lays out arrays by default.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    bytes_per_chip: float
    donated: bool = False
    weak: bool = False
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlannedCollective:
    """One collective of the plan.

    `bytes` is the payload per chip: the gathered result of an all-gather, the local operand otherwise. `count` executions
    in one step take `seconds` together. `where` says which array changes layout for which operation, in the user's words.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float
    seconds: float
    where: str


@dataclass(frozen=True)
class Estimate:
    """What one step costs under the cost model; seconds, and bytes per chip.

    `compute_seconds` and `memory_seconds` are the two sides of the operations' rooflines, each summed over operations as
    if it were alone; `seconds` sums the larger of the two per operation and all collectives.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    peak_bytes: float
    peak_where: str
    budget_bytes: float
    collectives: tuple[PlannedCollective, ...]


@dataclass(frozen=True)
class OperationPlan:
    """One operation: its strategy by name and per factor, and its cost in one step of the program.

    `einsum` writes the factors as letters (factor 0 is `a`, and so on), `sizes` their sizes and `splits` their mesh axes, in
    that order. `seconds` is all its runs; `collective_seconds` the changes of layout of its operands, and the reductions
    inside it. `regime` is what takes longest: "compute", "HBM", "communication" or "overhead". `runner_up` describes the
    cheapest other strategy, with what the step would cost more if this operation alone changed.
    """

    name: str
    primitive: str
    source: str
    einsum: str
    splits: tuple[tuple[str, ...], ...]
    strategy: str
    count: float
    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float
    seconds: float
    collective_seconds: float
    regime: str
    runner_up: str = ""
    matmul: bool = False
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """A plain layout, such as "Megatron 1D": the seconds of its best plan, and a bound that no plan of its kind is below.

    Where it has no plan, the seconds are infinite, and `why` says why.
    """

    name: str
    seconds: float
    bound_seconds: float
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """A layout of a function over a topology, with its cost and its proof; made by `autoshard.search`.

    **Attributes:**

    - `arguments`, `constants`, `results`: an `ArrayPlan` each, flat, in order.
    - `in_tree`, `out_tree`: how flat arguments and results nest, as `autoshard.trees` writes it to files.
    - `operations`: an `OperationPlan` per operation of the traced program, in its numbering; those that only bring arrays in,
      out or round a loop cost nothing.
    - `choice`: the strategies and layouts by operation and value number, for emission.
    - `warnings`: everything the plan does not vouch for, in sentences.
    - `program`, `dimensions`: the program that was costed, and its sizes by name: what formulas are made of. Plans of
      older files have none.
    - `baselines`: what plain layouts would take, if that was asked for.
    - `emission`: how the plan is emitted where no rule decides, as `choose_formats` and `verify` found it best.
    - `treedefs`: JAX's own structure of arguments and results, which files do not hold.
    """

    name: str
    topology: Topology
    fingerprint: str
    arguments: tuple[ArrayPlan, ...]
    constants: tuple[ArrayPlan, ...]
    results: tuple[ArrayPlan, ...]
    in_tree: Any
    out_tree: Any
    choice: Choice
    estimate: Estimate
    proof: Proof
    operations: tuple[OperationPlan, ...]
    donate_argnums: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    jax_version: str = ""
    program: Program | None = field(default=None, repr=False)
    dimensions: Dimensions | None = field(default=None, repr=False)
    baselines: tuple[Baseline, ...] = ()
    emission: Emission = BY_DEFAULT
    treedefs: tuple[Any, Any] | None = field(default=None, repr=False, compare=False)

    # --- layouts as JAX writes them ------------------------------------------------------------------------------

    @property
    def in_specs(self) -> tuple[Any, ...]:
        """The arguments' `PartitionSpec`s, shaped like the arguments."""
        return self._arguments_like([spec_of(array.layout) for array in self.arguments])

    @property
    def out_specs(self) -> Any:
        """The results' `PartitionSpec`s, shaped like the result."""
        return self._results_like([spec_of(array.layout) for array in self.results])

    def shardings(self, mesh: Mesh) -> tuple[tuple[Any, ...], Any]:
        """The arguments' and the results' `NamedSharding`s on a mesh that has the plan's axes."""
        bind.check_mesh(self, mesh)

        def placed(arrays: Sequence[ArrayPlan]) -> list[NamedSharding]:
            return [NamedSharding(mesh, spec_of(array.layout)) for array in arrays]

        return self._arguments_like(placed(self.arguments)), self._results_like(placed(self.results))

    def _arguments_like(self, leaves: list[Any]) -> tuple[Any, ...]:
        return bind.arguments_like(self, leaves)

    def _results_like(self, leaves: list[Any]) -> Any:
        return bind.results_like(self, leaves)

    # --- execution -----------------------------------------------------------------------------------------------

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh with the plan's axes over `devices`, each where it stands in the torus; over all that JAX sees by default.

        A plan for host devices takes the first of them, and makes them if JAX has not started yet.

        **Raises:** `TopologyError` when there are not as many devices as the plan has chips.
        """
        try:
            if devices is None and self.topology.chip.kind == "cpu":
                devices = targets.host_devices(self.topology.size)
            return targets.mesh_of(jax.devices() if devices is None else devices, self.topology.axis_sizes)
        except targets.TargetError as error:
            raise TopologyError(f"The plan is for {self.topology.name}, {self.topology.size} chips. {error}") from error

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as planned: a function of the same arguments, in which every array lies and moves as the plan says.

        It runs by itself and under `jax.jit`, `jax.grad` and `jax.vmap`; on the mesh of `jax.set_mesh` if there is one, else
        on `make_mesh()`. The function is traced with the arguments it is called with.

        **Raises:** when called, `PlanMismatchError` if the plan is not for this function and these arguments, `TopologyError`
        if the mesh has not the plan's axes.
        """
        return bind.bound(self, fn, None)

    def jit(self, fn: Callable[..., Any], mesh: Mesh | None = None, *, formats: Formats = "plan") -> Any:
        """`jax.jit` of `fn` as planned, with the plan's shardings and formats of arguments and results and its donations.

            plan.jit(decode)(params, cache, tokens, position)
            plan.jit(decode, mesh).lower(*args).compile()

        Without a `mesh` it runs on the one of `jax.set_mesh` if there is one, else on `make_mesh()`. A plan from a file does
        not know custom pytree nodes; where the arguments or results have some, their placement is left to the arrays
        themselves and to the compiler, which takes it from the plan inside the function. On TPUs whose memory the plan nearly
        fills, the compiler is told not to compute things again before it is full; JAX wants such options outermost, so
        within another `jax.jit` there take `apply`.

        Arrays whose dimensions lie in another order than planned are relaid at each call, and a warning says so once; `place`
        does it beforehand. With `formats="default"` all arrays lie as the device lays them out by default.
        """
        return jitted(self, fn, mesh or self._mesh_at_hand(), formats)

    def formats(self, mesh: Mesh | None = None) -> tuple[tuple[Any, ...], Any]:
        """The arguments' and the results' `jax.experimental.layout.Format`s: shardings, and orders of dimensions in memory.

        The layout of a format is None where the array lies as the device lays it out by default, and on devices of another
        kind than the plan's chips.
        """
        return emitted_formats.formats(self, mesh or self._mesh_at_hand())

    def place(
        self, tree: Any, argument: str | int | None = None, *, mesh: Mesh | None = None, donate: bool = False
    ) -> Any:
        """The arrays of a tree brought into their shards and formats, once: NumPy's, JAX's, or those of a checkpoint.

            params = plan.place(params, argument="params")
            params, cache, tokens, position = plan.place((params, cache, tokens, position))

        **Arguments:**

        - `argument`: the argument that the tree is, by its name or position, or a part of one by its path, such as
          `"params/layers/0"`; the tuple of all by default.
        - `mesh`: the mesh to lie on; that of `jax.set_mesh` if there is one, else `make_mesh()`.
        - `donate`: whether the memory of JAX's own arrays may be taken, so that none is there twice.

        **Raises:** `PlanMismatchError` with the paths, shapes and types that differ; `ExportError` when there is no such
        argument; `TopologyError` if the mesh has not the plan's axes.
        """
        return placing.place(self, tree, mesh or self._mesh_at_hand(), argument, donate)

    def _mesh_at_hand(self) -> Mesh:
        return bind.mesh_in_context(self) or self.make_mesh()

    def abstract_args(self, mesh: Mesh | None = None, argument: str | int | None = None) -> Any:
        """The arguments as `jax.ShapeDtypeStruct`s that know where and how they lie: what Orbax restores a checkpoint into.

            params = checkpointer.restore(path, plan.abstract_args(argument="params"))

        Where the plan has orders of dimensions, Orbax restores into them with `StandardRestore(..., support_layout=True)`;
        `place` brings what is restored without that into them.

        **Arguments:**

        - `mesh`: the mesh to lie on; that of `jax.set_mesh` if there is one, else `make_mesh()`.
        - `argument`: one argument, by its name or position, instead of the tuple of all.

        A plan from a file has dicts for custom pytree nodes, as `in_specs` has.

        **Raises:** `ExportError` when there is no such argument, or for types that only JAX can make (random keys);
        `TopologyError` if the mesh has not the plan's axes.
        """
        at = None if argument is None else placing.position(self, argument)
        found = self._arguments_like(placing.abstract(self, mesh or self._mesh_at_hand()))
        return found if at is None else found[at]

    # --- words and files -----------------------------------------------------------------------------------------

    def explain(self, symbolic: bool = False) -> str:
        """The plan as text: every matmul with its strategy, cost, regime and runner-up; `symbolic` adds formulas."""
        from autoshard.explaining.explain import render

        return render(self, symbolic=symbolic)

    def formulas(self) -> Formulas:
        """What the plan costs in closed form, in named dimensions, axis sizes and rates.

            found = plan.formulas()
            found.total.seconds                                    # a SymPy expression
            found.at(found.total.seconds)                          # plan.estimate.seconds
            found.at(found.total.wire_bytes, B=128)                # with the same strategies, at another batch

        **Raises:** `ValueError` for a plan from an older file, which does not hold the program.
        """
        from autoshard.explaining.formula_sections import formulas

        return formulas(self)

    def regimes(self) -> Any:
        """What every operation and the whole step wait for: an `autoshard.regimes.Regimes`, which prints as a table."""
        from autoshard.explaining.bottlenecks import regimes

        return regimes(self)

    def parallelism(self) -> Parallelism:
        """The kinds of parallelism that the plan amounts to, by axis.

            str(plan.parallelism())     # "fully sharded data parallel (ZeRO-3) over x, 4 ways; tensor parallel over y, 4 ways"

        **Raises:** `ValueError` for a plan from an older file, which does not hold the program.
        """
        from autoshard.naming.parallelism import parallelism

        if self.program is None:
            raise ValueError(f"The plan {self.name!r} does not hold its program: it is from an older file. Plan anew.")
        return parallelism(self.program, self.topology, self.choice)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan to a JSON file, all or nothing; `autoshard.load` reads it."""
        from autoshard.planning.plan_file import save

        save(self, path)

    def export(
        self,
        format: str,
        path: str | PathLike[str] | None = None,
        *,
        argument: str | int | None = None,
        names: Any = None,
        axes: Mapping[str, str] | None = None,
    ) -> str:
        """The layouts of the arguments in a format that others read, as text; also written to `path` if that is given.

            plan.export("rules", "partition_rules.py", argument="params")

        **Arguments:**

        - `format`: "specs", a pytree of `PartitionSpec`s as Python source; "rules", ordered pairs of a regular expression over
          `/`-joined paths and a `PartitionSpec`, as Python source; "flax", rules for logical axes as Python source; "maxtext",
          the same as MaxText's `custom_mesh_and_rule` YAML.
        - `argument`: one argument, by its name or position, instead of all; paths then start inside it.
        - `names`: for logical axes, the names of the arrays' dimensions: a pytree of tuples (or `PartitionSpec`s) of names, or
          a mapping of regular expressions over paths to tuples of names. By default (not for MaxText) dimensions of one
          size have one name.
        - `axes`: other names for mesh axes, such as `{"x": "data", "y": "model"}`.

        **Raises:** `ExportError` for what the format cannot say, with the arrays; `OSError` when the file cannot be written.
        """
        from pathlib import Path

        from autoshard._util.files import write_whole
        from autoshard.export import export

        text = export(self, format, argument, names, axes)
        if path is not None:
            write_whole(Path(path), text)
        return text
