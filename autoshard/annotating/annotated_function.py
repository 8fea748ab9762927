"""The annotation of a traced function: HBM traffic, dimension names, pins, and the fingerprint after the pins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

from autoshard.annotating.dimension_names import Names, name_dimensions
from autoshard.annotating.fingerprint import fingerprint
from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.annotating.masks import pad_traced
from autoshard.annotating.padding import Padding, paddings_by_value
from autoshard.annotating.pins import Pin, pin_program
from autoshard.rules.pin import Pins
from autoshard.tracing.traced_function import TracedFunction
from costmodels.dimensions import Dimensions
from costmodels.machine.topology import Topology
from costmodels.program.program import Program


@dataclass(frozen=True)
class AnnotatedFunction(TracedFunction):
    """A traced function whose program is ready for the search.

    **Attributes:**

    - `naming`: the sizes of the program by name, found when first asked for: most padded programs are only searched.
    - `names`, `shapes`: the user's names of dimensions, and symbolic shapes of the flat arguments, as for `annotate`.
    - `pinned`: the pins in the program.
    - `padding`: the padded dimensions of the program.
    - `chained`: the same function with its chains of grouped matmuls as one operation each, if it has some.
    """

    naming: Callable[[], Dimensions]
    names: Names | None = None
    shapes: tuple[Sequence[Any], ...] = ()
    pinned: tuple[Pin, ...] = ()
    padding: tuple[Padding, ...] = ()
    chained: AnnotatedFunction | None = None

    @property
    def program(self) -> Program:
        """The annotated program."""
        return self.traced.program

    @property
    def dimensions(self) -> Dimensions:
        """The sizes of the program by name."""
        return self.naming()

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the program with its pins."""
        return fingerprint(self.program)

    def padded(self, padding: Sequence[Padding]) -> AnnotatedFunction:
        """The same function, without pins, with longer dimensions."""
        if not padding:
            return self
        traced = pad_traced(self.traced, padding)
        program = traced.program
        names = self._padded_names(paddings_by_value(program, padding)) if self.names or self.shapes else {}
        naming = cache(partial(name_dimensions, program, traced.argument_values, traced.paths, names))
        return replace(self, traced=traced, naming=naming, padding=tuple(padding), chained=None)

    def _padded_names(self, paddings: Mapping[int, Sequence[Padding]]) -> Names:
        """The names of the arguments' dimensions, in which padded ones have names of their own, such as `F_1024`."""
        found = {}
        for path, value in zip(self.traced.paths, self.traced.argument_values, strict=True):
            words = [word if word.isidentifier() else "_" for word in self.dimensions.shapes[value]]
            for each in paddings.get(value, ()):
                words[each.dim] = "_" if words[each.dim] == "_" else f"{words[each.dim]}_{each.padded}"
            found[path] = " ".join(words)
        return {path: words for path, words in found.items() if words}

    def with_program(self, program: Program, **changes: Any) -> AnnotatedFunction:
        """The same function with another program."""
        return replace(self, traced=replace(self.traced, program=program), **changes)


def annotate(
    function: TracedFunction, dims: Names | None = None, shapes: Sequence[Sequence[Any]] = ()
) -> AnnotatedFunction:
    """Annotates a traced function with its HBM traffic and the names of its dimensions.

    **Arguments:**

    - `dims`: names of dimensions, by argument path or by size.
    - `shapes`: the shapes of the flat arguments as the user gave them, with symbolic dimensions.

    **Raises:** `AutoshardError` for names that fit no dimension.
    """
    traced = annotate_traffic(function.traced)
    dimensions = name_dimensions(traced.program, traced.argument_values, traced.paths, dims, tuple(shapes))
    return AnnotatedFunction(
        **vars(replace(function, traced=traced)),
        naming=lambda: dimensions,
        names=dims,
        shapes=tuple(shapes),
    )


def annotate_pins(function: AnnotatedFunction, topology: Topology, pins: Pins | None) -> AnnotatedFunction:
    """Resolves the pins of a function, and those given for its arguments, on a topology.

    **Raises:** `PinError` for pins that cannot hold.
    """
    program, pinned = pin_program(function.program, function.traced.paths, topology, pins)
    return function.with_program(program, pinned=pinned)
