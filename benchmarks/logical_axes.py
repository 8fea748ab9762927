"""Logical axis rules of public JAX code: which mesh axes split the named dimensions of weights, activations and caches.

A program names the dimensions of every argument (`Named`) and of activations where its authors constrain them
(`constrain`). A `RuleSet` maps these names to the data or the tensor axes of a mesh. As in Flax, an axis that an earlier
dimension of the same array has taken is left out, as are axes that do not divide the dimension.

- **MaxText** (`configs/base.yml`, `configs/inference.yml`, `logical_axis_rules`): the residual stream split by its
  features over tensor; weights by heads, feed-forward and vocabulary over tensor, by `embed` over fsdp.
- **tunix** (`models/llama3/model.py`, `ShardingConfig`): for sampling, weights whole along fsdp and the residual stream
  whole along tensor; for training, both split.
- **jax-llm-examples** (`llama3/llama3_jax/model.py`, `ShardingRules`): batch over x, heads and feed-forward over the others,
  the embedding table and the residual stream whole.

Each is restated from its public configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from costmodels.machine.topology import Topology

_pinned: Callable[[Any, str], Any] = lambda array, names: array  # noqa: E731


@dataclass(frozen=True)
class Named:
    """An abstract argument and the names of its dimensions, separated by spaces; "-" has no rule."""

    shape: tuple[int, ...]
    names: str
    dtype: Any = jnp.bfloat16


@dataclass(frozen=True)
class RuleSet:
    """Rules and their mesh.

    - `name`: the public code, and how its mesh is used.
    - `data_axes`: how many axes of the torus, the first ones, are data or fsdp (None: all); the others are tensor.
    - `data`, `tensor`: the names split over each.
    """

    name: str
    data_axes: int | None
    data: frozenset[str]
    tensor: frozenset[str]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_HEADS = "act_heads act_kv_heads cache_heads act_mlp act_vocab mlp vocab q_heads kv_heads"
_TUNIX = _words(f"{_HEADS} vocab_in norm")
_MAXTEXT = _TUNIX | {"act_embed"}
_BATCH = _words("batch cache_batch")
SERVING = (
    RuleSet("MaxText rules, tensor", 0, frozenset(), _MAXTEXT),
    RuleSet("tunix rules, tensor", 0, frozenset(), _TUNIX),
    RuleSet("tunix rules for sampling, fsdp × tensor", 1, _BATCH, _TUNIX),
    RuleSet("jax-llm-examples rules", 1, _BATCH, _words(_HEADS)),
)
TRAINING = (
    RuleSet("MaxText rules, fsdp", None, _BATCH | {"embed"}, frozenset()),
    RuleSet("MaxText rules, fsdp × tensor", 1, _BATCH | {"embed"}, _MAXTEXT),
)


def factored(topology: Topology) -> list[list[tuple[str, int]]]:
    """The axes of a mesh for rules: every axis of the torus by its prime factors, with their sizes.

    So eight heads are split over eight of sixteen chips on 4×4, as with the meshes that the rules' authors shape by hand.
    """
    found = []
    for axis in topology.axes:
        primes, left = [], axis.size
        for prime in range(2, axis.size + 1):
            while left % prime == 0:
                primes.append(prime)
                left //= prime
        found += [[(f"{axis.name}{i}", prime) for i, prime in enumerate(primes)]] * bool(primes)
    return found


def mesh_for(mesh: Mesh, topology: Topology) -> Mesh:
    """The same devices in the same order, with the axes of `factored`."""
    axes = [axis for factors in factored(topology) for axis in factors]
    return Mesh(mesh.devices.reshape([size for _, size in axes]), [name for name, _ in axes])


def spec_of(rules: RuleSet, names: str, shape: tuple[int, ...], topology: Topology) -> PartitionSpec:
    """The spec of an array whose dimensions have these names, on the mesh of `mesh_for`."""
    every = factored(topology)
    cut = len(every) if rules.data_axes is None else rules.data_axes
    data, tensor = (dict(axis for factors in part for axis in factors) for part in (every[:cut], every[cut:]))
    taken: set[str] = set()
    entries = []
    for name, size in zip(names.split(), shape, strict=True):
        wanted = (data if name in rules.data else {}) | (tensor if name in rules.tensor else {})
        axes = _dividing(size, {axis: chips for axis, chips in wanted.items() if axis not in taken})
        taken.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def _dividing(size: int, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes with the largest product that divides a dimension."""
    subsets = [each for n in range(len(axes) + 1) for each in combinations(axes, n)]
    fitting = [each for each in subsets if size % prod(axes[axis] for axis in each) == 0]
    return max(fitting, key=lambda each: prod(axes[axis] for axis in each))


def abstract(tree: Any) -> Any:
    """The arguments of a tree of `Named`, as shapes and dtypes."""
    return jax.tree_util.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def specs(tree: Any, rules: RuleSet, topology: Topology) -> Any:
    """The specs of a tree of `Named`."""
    return jax.tree_util.tree_map(lambda leaf: spec_of(rules, leaf.names, leaf.shape, topology), tree)


def constrain(array: Any, names: str) -> Any:
    """An activation, constrained by the rules in force; itself where there are none."""
    return _pinned(array, names)


@contextmanager
def in_force(rules: RuleSet, mesh: Any, topology: Topology) -> Iterator[None]:
    """While a program is traced: its activations constrained by these rules, on the mesh of `mesh_for`."""
    global _pinned
    before = _pinned

    def pin(array: Any, names: str) -> Any:
        spec = spec_of(rules, names, array.shape, topology)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    _pinned = pin
    try:
        yield
    finally:
        _pinned = before
