"""`Plan`: a plan with the methods that users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from autoshard._util.tables import columns, percent, size, time
from autoshard.planning.carriage import Carry
from autoshard.planning.records import PlanRecord

if TYPE_CHECKING:
    from autoshard.emitting.jitted import Formats
    from autoshard.emitting.meshes import AxisNames
    from autoshard.explaining.formulas import Formulas
    from autoshard.naming.parallelism import Parallelism


class Plan(PlanRecord):
    """A layout of a function over a topology, with its cost and its proof, made by `autoshard.search`.

    Its attributes are those of `PlanRecord`: `arguments`, `results`, `operations`, `estimate`, `proof`, `warnings` and more.
    """

    @classmethod
    def of(cls, record: PlanRecord) -> Plan:
        """The same plan with methods."""
        return cls(**{each.name: getattr(record, each.name) for each in fields(record)})

    # --- layouts as JAX writes them ------------------------------------------------------------------------------

    @property
    def in_specs(self) -> tuple[Any, ...]:
        """The arguments' `PartitionSpec`s, shaped like the arguments."""
        from autoshard.emitting import sharding

        return sharding.in_specs(self)

    @property
    def out_specs(self) -> Any:
        """The results' `PartitionSpec`s, shaped like the result."""
        from autoshard.emitting import sharding

        return sharding.out_specs(self)

    def shardings(self, mesh: Mesh, axes: AxisNames | None = None) -> tuple[tuple[Any, ...], Any]:
        """The arguments' and the results' `NamedSharding`s on a mesh; `axes` as for `jit`."""
        from autoshard.emitting import sharding

        return sharding.shardings(self, mesh, axes)

    # --- execution -----------------------------------------------------------------------------------------------

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh with the plan's axes over `devices`, placed by torus coordinates; by default over all that JAX sees.

        A plan for host devices takes the first of them, and makes them if JAX has not started yet.

        **Raises:** `TopologyError` if the number of devices differs from the plan's number of chips.
        """
        from autoshard.emitting import sharding

        return sharding.make_mesh(self, devices)

    def apply(
        self, fn: Callable[..., Any], mesh: Mesh | None = None, *, axes: AxisNames | None = None
    ) -> Callable[..., Any]:
        """`fn` as planned: a function of the same arguments, with the layouts and collectives of the plan.

        It runs directly and under `jax.jit`, `jax.grad` and `jax.vmap`, on the mesh of `jax.set_mesh` if there is one, else
        on `make_mesh()`. The function is traced with the arguments of the call. `mesh` and `axes` as for `jit`.

        **Raises:** when called, `PlanMismatchError` if the plan is not for this function and these arguments, `TopologyError`
        if the mesh does not fit the plan.
        """
        from autoshard.emitting import bind

        return bind.bind_plan(self, fn, mesh, axes=axes)

    def jit(
        self,
        fn: Callable[..., Any],
        mesh: Mesh | None = None,
        *,
        formats: Formats = "plan",
        carry: Carry | None = None,
        axes: AxisNames | None = None,
    ) -> Any:
        """`jax.jit` of `fn` as planned, with the plan's shardings and formats of arguments and results and its donations.

            plan.jit(decode)(params, cache, tokens, position)
            plan.jit(decode, mesh, axes={"x": "data", "y": "model"}).lower(*args).compile()

        Without a `mesh` it runs on the one of `jax.set_mesh` if there is one, else on `make_mesh()`. The axes of a mesh may
        be Auto or Explicit. Without `axes`, they are those of the plan's names and sizes, or else are paired with the plan's
        by size. The devices are taken in the mesh's order; only `make_mesh` follows the torus.

        A plan from a file lacks
        custom pytree nodes. If the arguments or results have some, their shardings are left to the arrays themselves and to
        the compiler, which infers them from the plan inside the function. If the plan nearly fills the memory of a TPU, a
        compiler option limits rematerialisation. JAX accepts such options only on the outermost `jax.jit`, so use `apply`
        within another `jax.jit`.

        Arrays whose order of dimensions in memory differs from the plan are copied at each call, with one warning; `place`
        copies them beforehand. With `formats="default"` all arrays have the device's default order.

        `carry` is the way to carry the plan: "manual" runs the planned collectives, "constraints" leaves them to the
        partitioner with the constraints that `autoshard.carry` chose, "specs" has shardings of arguments and results only.
        By default it is the way with the fastest program of those that `autoshard.carry` compiled, else "manual".
        """
        from autoshard.emitting import sharding
        from autoshard.emitting.jitted import jit_plan
        from autoshard.emitting.meshes import on_mesh

        mesh = mesh or sharding.current_mesh(self)
        return jit_plan(on_mesh(self, mesh, axes), fn, mesh, formats, carry)

    def formats(self, mesh: Mesh | None = None, axes: AxisNames | None = None) -> tuple[tuple[Any, ...], Any]:
        """The arguments' and the results' `jax.experimental.layout.Format`s: shardings, and orders of dimensions in memory.

        The layout of a format is None if the array has the device's default order, and on devices of another kind than the
        plan's chips. `mesh` and `axes` as for `jit`.
        """
        from autoshard.emitting import sharding
        from autoshard.emitting.formats import formats

        return formats(self, mesh or sharding.current_mesh(self), axes)

    def place(
        self,
        tree: Any,
        argument: str | int | None = None,
        *,
        mesh: Mesh | None = None,
        donate: bool = False,
        axes: AxisNames | None = None,
    ) -> Any:
        """The arrays of a tree in their shardings and formats: NumPy's, JAX's, or those of a checkpoint.

            params = plan.place(params, argument="params")
            params, cache, tokens, position = plan.place((params, cache, tokens, position))

        **Arguments:**

        - `argument`: the argument that the tree is, by its name or position, or a part of one by its path, such as
          `"params/layers/0"`; by default the tree is the tuple of all arguments.
        - `mesh`, `axes`: as for `jit`.
        - `donate`: whether the memory of arrays that are on the mesh's devices already may be reused.

        **Raises:** `PlanMismatchError` with the paths, shapes and types that differ; `ExportError` if there is no such
        argument; `TopologyError` if the mesh does not fit the plan.
        """
        from autoshard.emitting import placing, sharding

        return placing.place(self, tree, mesh or sharding.current_mesh(self), argument, donate, axes)

    def unpad(self, tree: Any, argument: str | int | None = None) -> Any:
        """The arrays of a tree without the plan's padding, as the function has them: to save a checkpoint, for instance.

            checkpointer.save(path, plan.unpad(params, argument="params"))

        **Arguments:**

        - `argument`: as for `place`. Arrays without padding are returned as they are.

        A padded dimension is gathered, because the mesh axes do not divide it without its padding.

        **Raises:** `PlanMismatchError` with the paths, shapes and types that differ; `ExportError` if there is no such
        argument.
        """
        from autoshard.emitting import placing

        return placing.unpad(self, tree, argument)

    def abstract_args(
        self, mesh: Mesh | None = None, argument: str | int | None = None, axes: AxisNames | None = None
    ) -> Any:
        """The arguments as `jax.ShapeDtypeStruct`s with shardings and formats, for Orbax to restore a checkpoint into.

            params = checkpointer.restore(path, plan.abstract_args(argument="params"))

        If the plan has orders of dimensions, Orbax restores into them with `StandardRestore(..., support_layout=True)`. For
        arrays restored without that option, use `place`. If the plan has padding, Orbax restores an unpadded checkpoint into it
        with `restore(..., strict=False)`; a warning names arrays for which that is not possible.

        **Arguments:**

        - `mesh`, `axes`: as for `jit`.
        - `argument`: one argument, by its name or position, instead of the tuple of all.

        A plan from a file has dicts in place of custom pytree nodes, as in `in_specs`.

        **Raises:** `ExportError` if there is no such argument, or for types that only JAX can make (PRNG keys);
        `TopologyError` if the mesh does not fit the plan.
        """
        from autoshard.emitting import placing, sharding

        return placing.abstract_args(self, mesh or sharding.current_mesh(self), argument, axes)

    # --- text and files -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        proof, estimate = self.proof, self.estimate
        status = proof.status if proof.status == "OPTIMAL" else f"{proof.status}, gap {percent(proof.gap)}"
        collectives = sum(each.count for each in estimate.collectives)
        return (
            f"<Plan {self.name!r} on {self.topology.name}: {time(estimate.seconds)} a step ({status}),"
            f" {collectives:g} collectives, {size(estimate.peak_bytes)} per chip; print(plan.explain())>"
        )

    def explain(self, symbolic: bool = False, width: int | None = None) -> str:
        """The plan as text: every matmul with its strategy, cost, regime and runner-up; `symbolic` adds formulas.

        The tables fit the terminal, or `width` columns.
        """
        from autoshard.explaining.explain import render

        return render(self, symbolic=symbolic, width=width or columns())

    def formulas(self) -> Formulas:
        """The cost of the plan in closed form, in named dimensions, axis sizes and rates.

            found = plan.formulas()
            found.total.seconds                                    # a SymPy expression
            found.at(found.total.seconds)                          # plan.estimate.seconds
            found.at(found.total.wire_bytes, B=128)                # with the same strategies, at another batch

        **Raises:** `MissingProgramError` for a plan from an older file, which lacks the program.
        """
        from autoshard.explaining.formula_sections import formulas

        return formulas(self)

    def regimes(self) -> Any:
        """The resource that bounds each operation and the step, as a printable `autoshard.explaining.bottlenecks.Regimes`."""
        from autoshard.explaining.bottlenecks import regimes

        return regimes(self)

    def parallelism(self) -> Parallelism:
        """The kinds of parallelism that the plan amounts to, by axis.

            str(plan.parallelism())     # "fully sharded data parallel (ZeRO-3) over x, 4 ways; tensor parallel over y, 4 ways"

        **Raises:** `MissingProgramError` for a plan from an older file, which lacks the program.
        """
        from autoshard.naming.parallelism import parallelism

        return parallelism(self.require_program(), self.topology, self.choice)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan to a JSON file atomically; `autoshard.load` reads it."""
        from autoshard.planning.files.plan_file import save

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
        """The layouts of the arguments as text in the format of another tool; also written to `path` if given.

            plan.export("rules", "partition_rules.py", argument="params")

        **Arguments:**

        - `format`: a format of `autoshard.export`, such as "specs", a pytree of `PartitionSpec`s as Python source; "rules",
          ordered pairs of a regular expression over `/`-joined paths and a `PartitionSpec`, as Python source; "flax", rules
          for logical axes as Python source; "maxtext", the same as MaxText's `custom_mesh_and_rule` YAML.
        - `argument`: one argument, by its name or position, instead of all; paths then start inside it.
        - `names`: for logical axes, the names of the arrays' dimensions: a pytree of tuples (or `PartitionSpec`s) of names, or
          a mapping of regular expressions over paths to tuples of names. By default (not for MaxText) dimensions of one
          size have one name.
        - `axes`: other names for mesh axes, such as `{"x": "data", "y": "model"}`.

        **Raises:** `ExportError` for arrays that the format cannot express; `OSError` if the file cannot be written.
        """
        from pathlib import Path

        from autoshard._util.files import write_whole
        from autoshard.export import export

        text = export(self, format, argument, names, axes)
        if path is not None:
            write_whole(Path(path), text)
        return text


def loads(text: str | bytes, where: str = "The plan") -> Plan:
    """Reads a plan from JSON text; `where` names the text in messages.

    **Raises:** `PlanMismatchError`.
    """
    from autoshard.planning.files import plan_file

    return Plan.of(plan_file.loads(text, where))


def load(path: str | PathLike[str]) -> Plan:
    """Reads a plan from a file.

    **Raises:** `PlanMismatchError`, with the reason, for anything that is not a plan of this version or an older one;
    `OSError` if there is no such file.
    """
    from autoshard.planning.files import plan_file

    return Plan.of(plan_file.load(path))
