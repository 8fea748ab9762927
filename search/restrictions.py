"""Problems restricted to some reshards, such as those that a partitioner makes of argument shardings alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from search.formulation.all_pairs import FORBIDDEN
from search.formulation.collective_steps import StepGraph
from search.formulation.layouts import Layout
from search.formulation.problem import Edge, Problem

Reshards = Literal["all", "sums and slices", "sums"]
"""The reshards that a plan may have.

- "all": every reshard.
- "sums": all-reduces of the partial sums of one operation, before any other operation reads them.
- "sums and slices": also local slices of a replicated dimension, which send nothing.
"""


def restrict_reshards(problem: Problem, reshards: Reshards) -> Problem:
    """The problem with every other reshard forbidden.

    Then each value has one layout from its producer to its last use, but for sums and slices. A partitioner that
    propagates shardings from arguments to results finds no reason to gather, to scatter or to permute.

    **Raises:** `ValueError` for other `reshards`.
    """
    if reshards not in get_args(Reshards):
        raise ValueError(f"reshards must be one of {', '.join(get_args(Reshards))}, got {reshards!r}.")
    if reshards == "all":
        return problem
    return _Restriction(problem, reshards == "sums and slices").restricted()


class _Restriction:
    """The allowed pairs of layouts, found once per table."""

    def __init__(self, problem: Problem, slices: bool) -> None:
        self.problem, self.slices = problem, slices
        self.known: dict[int, np.ndarray] = {}
        self.matrices: dict[tuple[int, ...], np.ndarray] = {}

    def restricted(self) -> Problem:
        nodes = list(self.problem.nodes)
        for edge in self.problem.loops:
            if edge.table is not None:
                allowed = self.allowed(edge)[edge.rows, edge.columns]
                node = nodes[edge.a]
                nodes[edge.a] = replace(node, cost=np.where(allowed, node.cost, FORBIDDEN))
        return replace(self.problem, nodes=tuple(nodes), edges=tuple(map(self.edge, self.problem.edges)))

    def edge(self, edge: Edge) -> Edge:
        if edge.table is None:
            return edge
        key = (id(edge.matrix), id(edge.table.graph), *map(id, edge.layouts or ()))
        if key not in self.matrices:
            self.matrices[key] = np.where(self.allowed(edge), edge.matrix, FORBIDDEN)
        return replace(edge, matrix=self.matrices[key])

    def allowed(self, edge: Edge) -> np.ndarray:
        """The allowed pairs of an edge's rows and columns."""
        assert edge.table is not None
        graph = edge.table.graph
        if id(graph) not in self.known:
            self.known[id(graph)] = allowed_pairs(graph, self.slices)
        found = self.known[id(graph)]
        return found if edge.layouts is None else found[np.ix_(*edge.layouts)]


def allowed_pairs(graph: StepGraph, slices: bool) -> np.ndarray:
    """`[layouts, layouts]`: whether a reshard only sums all that is partial and, with `slices`, slices the sum."""
    summed = np.array([graph.index[Layout(layout.dims)] for layout in graph.layouts], dtype=np.intp)
    reached = np.eye(len(graph.layouts), dtype=bool)
    if slices:
        is_slice = np.array([step.kind == "slice" for step in graph.steps], dtype=bool)
        source, target = graph.source[is_slice], graph.target[is_slice]
        while True:
            before = np.count_nonzero(reached)
            for one, other in zip(source, target, strict=True):
                reached[:, other] |= reached[:, one]
            if np.count_nonzero(reached) == before:
                break
    whole = np.array([not layout.partial for layout in graph.layouts], dtype=bool)
    return reached[summed] & whole[None, :]
