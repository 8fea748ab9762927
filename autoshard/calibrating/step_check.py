"""The check of a whole step: predicted by its plan, and timed on the planned devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autoshard.pipeline import annotated_function, plan_function
from autoshard.planning.options import Options
from autoshard.workload import Workload
from costmodels.machine.topology import Topology

_REPEATS = 20
_WARM_UP = 3


@dataclass(frozen=True)
class StepCheck:
    """A planned step, predicted and measured: the shortest of several serial runs.

    `start_seconds` is the time of an empty program on the same devices.
    """

    name: str
    predicted_seconds: float
    start_seconds: float
    measured_seconds: float

    @property
    def ratio(self) -> float:
        """Predicted over measured, with the start of a program added to the prediction."""
        return (self.predicted_seconds + self.start_seconds) / self.measured_seconds


def check_step(workload: Workload, topology: Topology, progress: Callable[[str], None] = lambda _: None) -> StepCheck:
    """Plans a workload on a topology, runs it on the attached devices, and times it.

    Arguments are zeros; a donated argument is the result that took its memory in the previous step.

    **Raises:** the errors of `autoshard.search`.
    """
    options = Options(workload.donate_argnums, workload.name, progress=progress)
    target = annotated_function(workload.fn, workload.args, options)
    plan = plan_function(target, topology, options)
    mesh = plan.make_mesh()
    step = plan.jit(workload.fn, mesh)
    progress("running the step")
    shardings = jax.tree_util.tree_leaves(plan.shardings(mesh)[0])
    leaves, tree = jax.tree_util.tree_flatten(tuple(workload.args))
    zeros = [jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    flat = jax.tree_util.tree_leaves(plan.place(jax.tree_util.tree_unflatten(tree, zeros), mesh=mesh))
    shortest = _shortest(step, flat, tree, dict(target.traced.program.donated))
    empty = jax.jit(lambda x: x, out_shardings=shardings[0], in_shardings=shardings[0])
    start = min(_time_call(empty, flat[0])[0] for _ in range(_WARM_UP + _REPEATS))
    return StepCheck(plan.name, plan.estimate.seconds, start, shortest)


def _shortest(step: Any, flat: list[Any], tree: Any, donated: dict[int, int]) -> float:
    best = float("inf")
    for repeat in range(_WARM_UP + _REPEATS):
        seconds, results = _time_call(step, *jax.tree_util.tree_unflatten(tree, flat))
        found = jax.tree_util.tree_leaves(results)
        for argument, result in donated.items():
            flat[argument] = found[result]
        if repeat >= _WARM_UP:
            best = min(best, seconds)
    return best


def _time_call(run: Any, *args: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    results = jax.block_until_ready(run(*args))
    return time.perf_counter() - started, results
