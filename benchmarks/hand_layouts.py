"""Expert layouts for the example models.

Every array of an example is described by the letters of its dimensions (as in the examples' docstrings), every layout by
which mesh axes split these letters, in weights, in the cache, and in activations. Each layout is entered twice: as argument
specs alone, the partitioner deciding the rest, and with the activations constrained as well, where experts constrain them.
Letters that a model lacks, and axes that do not divide a dimension, are left out.

- **Megatron 1D** (Shoeybi et al. 2019, arXiv 1909.08053, §3): heads, feed-forward and vocabulary over all axes, the cache
  by heads; activations replicated.
- **Megatron 1D, batch-sharded cache** (Pope et al. 2022, arXiv 2211.05102, §3.3): the same; the cache by heads, and the batch
  over the axes that these leave.
- **WS-2D, batch-sharded cache** (Pope et al. 2022, §3.2.2 and §3.3): weights with E over x, heads, feed-forward and vocabulary
  over the others; the cache with the batch over all axes, heads over the rest; activations with E over all axes,
  gathered to x.
- **fully sharded** (Zhao et al. 2023, arXiv 2304.11277): of weights the largest dimension over all axes, to be gathered; all
  else with the batch over all axes, in prefill the tokens over the rest.
- **FSDP × tensor** (the logical axis rules of MaxText's `base.yml`, and tunix's Llama configuration for training): weights
  with E over x, to be gathered, heads, feed-forward and vocabulary over the others; batch over x everywhere, the
  residual with E over the others.
- **batch × tensor** (tunix's configuration for sampling, MaxText's for serving with `data` and `tensor` axes): the same
  without E over x; weights are replicated there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from costmodels.machine.topology import Topology

Splits = Mapping[str, tuple[str, ...]]

# The dimensions of every array of the examples, by the end of its path; the first match applies. A leading "L"
# is the stack of layers, and left out where they are unrolled.
ROLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "palm": (
        (r"embedding", "VE"),
        (r"wq", "LEHD"),
        (r"wk|wv", "LED"),
        (r"wi_gate|wi_up", "LEF"),
        (r"wo", "LHDE"),
        (r"wo_ffn", "LFE"),
        (r"layers.*scale", "LE"),
        (r"scale", "E"),
        (r"k|v", "LBSD"),
    ),
    "llama": (
        (r"embedding", "VE"),
        (r"head", "EV"),
        (r"wq", "LEHD"),
        (r"wk|wv", "LEKD"),
        (r"wo", "LHDE"),
        (r"w_gate|w_up", "LEF"),
        (r"w_down", "LFE"),
        (r"attention_norm|ffn_norm", "LE"),
        (r"norm", "E"),
        (r"k|v", "LBSKD"),
    ),
}


@dataclass(frozen=True)
class HandLayout:
    """A layout by letters: which axes split which dimension in arrays of each role.

    - `weights`: in a `data_parallel` layout only the largest dimension, for any letters.
    - `cache`: the cache, and attention as it runs over it.
    - `residual`, `normed`: activations `[..., E]` between blocks, and as the projections read them.
    - `heads`: queries, keys, values and attention results, as the projections produce and consume them.
    """

    name: str
    weights: Splits
    cache: Splits
    residual: Splits
    normed: Splits
    heads: Splits
    data_parallel: bool = False


def _all(topology: Topology) -> tuple[str, ...]:
    return tuple(axis.name for axis in topology.axes if axis.size > 1)


def _fitting(size: int, axes: Sequence[str], topology: Topology) -> tuple[str, ...]:
    """As many chips as divide a dimension: the axes with the largest product that does."""
    subsets = [subset for n in range(len(axes) + 1) for subset in combinations(axes, n)]
    sizes = topology.axis_sizes
    dividing = [subset for subset in subsets if size % prod(sizes[axis] for axis in subset) == 0]
    return max(dividing, key=lambda subset: prod(sizes[axis] for axis in subset))


def hand_layouts(topology: Topology, sizes: Mapping[str, int]) -> tuple[HandLayout, ...]:
    """The layouts of the table above for a slice and the sizes of a model's dimensions, by letter."""
    every = _all(topology)
    first, *others = every
    wide, over_others = _wide(every, topology, sizes), _wide(others, topology, sizes)
    heads_first = _rest(wide.get("K", ()), every, "B", topology, sizes)
    batch = _fitting(sizes["B"], every, topology)
    tokens = _rest(batch, every, "T", topology, sizes)
    one_d = {letter: wide[letter] for letter in wide if letter in "HK"}
    two_d = {letter: over_others[letter] for letter in over_others if letter in "HK"}
    data = {"B": batch, "T": tokens}
    rows = {"B": _fitting(sizes["B"], (first,), topology)}
    thin = {"E": _fitting(sizes["E"], others, topology)}

    def attention(batch: Sequence[str]) -> Splits:
        left = _wide([axis for axis in every if axis not in batch], topology, sizes)
        return {"B": tuple(batch), **{letter: left[letter] for letter in left if letter in "HK"}}

    return (
        HandLayout("Megatron 1D", wide, one_d, {}, {}, one_d),
        HandLayout(
            "Megatron 1D, batch-sharded cache",
            wide,
            attention(heads_first),
            {},
            {},
            one_d,
        ),
        HandLayout(
            "WS-2D, batch-sharded cache",
            {"E": (first,), **over_others},
            attention(batch),
            {"E": _fitting(sizes["E"], every, topology)},
            {"E": (first,)},
            two_d,
        ),
        HandLayout("fully sharded", wide, data, data, data, data, data_parallel=True),
        *(
            HandLayout(name, {**stored, **over_others}, rows | two_d, rows | thin, rows, rows | two_d)
            for name, stored in (("FSDP × tensor", {"E": (first,)}), ("batch × tensor", {}))
        ),
    )


def _wide(axes: Sequence[str], topology: Topology, sizes: Mapping[str, int]) -> Splits:
    """Heads, feed-forward and vocabulary over these axes; query heads in the order of the key and value heads they share."""
    found = {letter: _fitting(sizes[letter], axes, topology) for letter in "HKFV" if letter in sizes}
    keys = found.get("K", ())
    found["H"] = (*(axis for axis in keys if axis in found["H"]), *(axis for axis in found["H"] if axis not in keys))
    return found


def _rest(
    taken: Sequence[str], axes: Sequence[str], letter: str, topology: Topology, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """The axes that others leave, over a dimension that the model may lack."""
    return _fitting(sizes[letter], [axis for axis in axes if axis not in taken], topology) if letter in sizes else ()


def sizes_of(model: str, args: Sequence[Any]) -> dict[str, int]:
    """The size of every dimension of a workload's arguments, by letter."""
    return {letter: n for word, leaf in _described(model, args) for letter, n in zip(word, leaf.shape, strict=True)}


def argument_specs(layout: HandLayout, model: str, args: Sequence[Any], topology: Topology) -> tuple[Any, ...]:
    """The `PartitionSpec`s of a workload's arguments, shaped like them.

    **Arguments:**

    - `model`: "palm" or "llama", whose table of roles describes the arrays.
    - `args`: (params, cache, tokens, position) of a decode step, or (params, tokens) of prefill.
    """
    specs = [spec(word, _splits(layout, word, leaf, topology)) for word, leaf in _described(model, args)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tuple(args)), specs)


def spec(word: str, splits: Splits) -> PartitionSpec:
    """The spec of an array whose dimensions have these letters."""
    return PartitionSpec(*(splits.get(letter) or None for letter in word))


def _splits(layout: HandLayout, word: str, leaf: Any, topology: Topology) -> Splits:
    if word in ("B", "BT"):
        return layout.residual
    if "B" in word:
        return layout.cache
    return _largest(word, leaf, topology) if layout.data_parallel else layout.weights


@contextmanager
def constrained(layout: HandLayout, module: Any, mesh: Any) -> Iterator[None]:
    """While a model is traced: its activations constrained where experts constrain them.

    The functions of the example that produce or consume activations are wrapped: every result is first pinned as its own
    matmuls produce it, and then as the next use needs it. The model itself is unchanged.
    """

    def pin(array: Any, word: str, splits: Splits) -> Any:
        word = word.replace("T", "") if array.ndim < len(word) else word
        fitting = {
            letter: axes
            for letter, n in zip(word, array.shape, strict=True)
            if (axes := splits.get(letter, ())) and n % prod(mesh.shape[a] for a in axes) == 0
        }
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(word, fitting)))

    def rms_norm(x: Any, scale: Any) -> Any:
        return pin(plain["rms_norm"](pin(x, "BTE", layout.residual), scale), "BTE", layout.normed)

    def queries_keys_values(*args: Any) -> Any:
        q, k, v = plain["queries_keys_values"](*args)
        key_word = "BTKD" if k.ndim == q.ndim else "BTD"
        return (
            pin(q, "BTHD", layout.heads),
            pin(pin(k, key_word, layout.heads), key_word, layout.cache),
            pin(pin(v, key_word, layout.heads), key_word, layout.cache),
        )

    def attend(q: Any, k: Any, v: Any, visible: Any) -> Any:
        attended = plain["attend"](pin(q, "BTHD", layout.cache), k, v, visible)
        return pin(pin(attended, "BTHD", layout.cache), "BTHD", layout.heads)

    def block(name: str) -> Callable[..., Any]:
        return lambda *args: pin(plain[name](*args), "BTE", layout.residual)

    wrapped: dict[str, Callable[..., Any]] = {
        "rms_norm": rms_norm,
        "queries_keys_values": queries_keys_values,
        "attend": attend,
        **{name: block(name) for name in ("block_output", "feed_forward") if hasattr(module, name)},
    }
    plain = {name: getattr(module, name) for name in wrapped}
    try:
        for name, function in wrapped.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in plain.items():
            setattr(module, name, function)


def _described(model: str, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Every array of the arguments, with its letters."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        yield _letters(model, jax.tree_util.keystr(path, simple=True, separator="/"), leaf), leaf


def _letters(model: str, path: str, leaf: Any) -> str:
    """The letters of an array's dimensions: tokens are `B` or `BT`, the position has none."""
    if path[0] != "0" and "/" not in path:
        return "BT"[: len(leaf.shape)]
    for pattern, word in ROLES[model]:
        if re.fullmatch(rf".*\b({pattern})", path):
            return word[1:] if word[0] == "L" and len(leaf.shape) == len(word) - 1 else word
    raise ValueError(f"{path} of {model} has no role in the table; add its letters to ROLES.")


def _largest(word: str, leaf: Any, topology: Topology) -> Splits:
    """The largest dimension but the stack of layers over all axes, or over those that divide it."""
    candidates = [(size, letter) for letter, size in zip(word, leaf.shape, strict=True) if letter != "L"]
    if not candidates:
        return {}
    size, letter = max(candidates)
    return {letter: _fitting(size, _all(topology), topology)}
