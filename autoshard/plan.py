"""`Plan`: a plan with the methods that users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from autoshard.emitting import bind, placing, sharding
from autoshard.emitting.formats import formats as formats_of
from autoshard.emitting.jitted import Formats, jitted
from autoshard.planning import plan_file
from autoshard.planning.records import PlanRecord

if TYPE_CHECKING:
    from autoshard.explaining.formulas import Formulas
    from autoshard.naming.parallelism import Parallelism


class Plan(PlanRecord):
    """A layout of a function over a topology, with its cost and its proof; made by `autoshard.search`.

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
        return sharding.in_specs(self)

    @property
    def out_specs(self) -> Any:
        """The results' `PartitionSpec`s, shaped like the result."""
        return sharding.out_specs(self)

    def shardings(self, mesh: Mesh) -> tuple[tuple[Any, ...], Any]:
        """The arguments' and the results' `NamedSharding`s on a mesh that has the plan's axes."""
        return sharding.shardings(self, mesh)

    # --- execution -----------------------------------------------------------------------------------------------

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh with the plan's axes over `devices`, each where it stands in the torus; over all that JAX sees by default.

        A plan for host devices takes the first of them, and makes them if JAX has not started yet.

        **Raises:** `TopologyError` when there are not as many devices as the plan has chips.
        """
        return sharding.make_mesh(self, devices)

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
        return jitted(self, fn, mesh or sharding.current_mesh(self), formats)

    def formats(self, mesh: Mesh | None = None) -> tuple[tuple[Any, ...], Any]:
        """The arguments' and the results' `jax.experimental.layout.Format`s: shardings, and orders of dimensions in memory.

        The layout of a format is None where the array lies as the device lays it out by default, and on devices of another
        kind than the plan's chips.
        """
        return formats_of(self, mesh or sharding.current_mesh(self))

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
        - `donate`: whether the memory of arrays that are on the mesh's devices already may be taken.

        **Raises:** `PlanMismatchError` with the paths, shapes and types that differ; `ExportError` when there is no such
        argument; `TopologyError` if the mesh has not the plan's axes.
        """
        return placing.place(self, tree, mesh or sharding.current_mesh(self), argument, donate)

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
        return placing.abstract_args(self, mesh or sharding.current_mesh(self), argument)

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

        **Raises:** `MissingProgramError` for a plan from an older file, which does not hold the program.
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

        **Raises:** `MissingProgramError` for a plan from an older file, which does not hold the program.
        """
        from autoshard.naming.parallelism import parallelism

        return parallelism(self.require_program(), self.topology, self.choice)

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


def loads(text: str | bytes, where: str = "The plan") -> Plan:
    """Reads a plan from JSON text; `where` names the text in messages.

    **Raises:** `PlanMismatchError`.
    """
    return Plan.of(plan_file.loads(text, where))


def load(path: str | PathLike[str]) -> Plan:
    """Reads a plan from a file.

    **Raises:** `PlanMismatchError`, with the reason, for anything that is not a plan of this version or an older one;
    `OSError` when there is no such file.
    """
    return Plan.of(plan_file.load(path))
