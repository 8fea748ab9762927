"""The worked tables of "How To Scale Your Model" (Austin et al., jax-ml/scaling-book), parts 3, 7, 8 and the questions there.

`ours` takes bytes from traced arrays of the model at hand, rates from the catalogue of chips, collectives from the cost
model. If it is more than `WITHIN` from the printed number, `slip` has the reason, and `book_formula` is the value of the
book's own formula with the book's own rounded inputs: either the printed number, or a correction of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from costmodels.machine.chips import chip
from costmodels.machine.collectives import seconds_on
from costmodels.machine.interconnects import Torus
from costmodels.machine.topology import Topology, parse_topology
from examples import llama

WITHIN = 0.02
CONTEXT = 8192
INFERENCE, SERVING, SHARDING = (
    f"jax-ml/scaling-book, {name}.md" for name in ("inference", "applied-inference", "sharding")
)
LLAMA_2_13B = llama.Config(layers=40, d_model=5120, d_ff=13_824, heads=40, kv_heads=40, vocab=32_000)
"""Touvron et al. 2023, "Llama 2"; as in the book's table."""
BOOK_CHIP_BYTES = 16e9
"""The book's capacity of a v5e; the catalogue has 16 GiB."""
OUTPUT_TOKENS = 512


def row(
    name: str, reference: float, ours: float, source: str, slip: str = "", book_formula: float | None = None
) -> dict[str, Any]:
    """A row of the table; with a slip only where ours is not within reach without."""
    near = abs(ours / reference - 1) <= WITHIN
    more = {} if near else {"slip": slip, "book_formula": book_formula}
    return {"row": name, "reference": reference, "ours": ours, "source": source, **more}


def shown(found: dict[str, Any]) -> bool:
    """Whether ours is what the book prints, or the book's slip is shown: its own formula gives ours, or what it prints."""
    if abs(found["ours"] / found["reference"] - 1) <= WITHIN:
        return True
    formula = found["book_formula"]
    return formula is not None and min(abs(formula / found[key] - 1) for key in ("ours", "reference")) <= WITHIN


@dataclass(frozen=True)
class Sizes:
    """A traced model: its number of parameters, and the elements that its cache has for a token."""

    parameters: float
    cache: float


@cache
def sizes(config: llama.Config) -> Sizes:
    """Of the arrays that the model's decode step takes."""
    import jax

    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(llama.abstract_params(config)))
    cached = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(llama.abstract_cache(config, 1, CONTEXT)))
    return Sizes(weights, cached / CONTEXT)


def ratios_of_chips() -> Iterator[dict[str, Any]]:
    """Part 1 and 12: the batch above which products are compute-bound."""
    for name, reference in (("v5e", 240), ("v4", 229), ("h100", 298)):
        on = chip(name)
        ours = on.matmul_flops_per_second("bfloat16") / on.hbm_bytes_per_second
        yield row(f"critical batch of a {name}, tokens", reference, ours, "jax-ml/scaling-book, roofline.md, gpus.md")


def llama_2_13b() -> Iterator[dict[str, Any]]:
    """Part 7: a decode step of Llama 2-13B on eight v5e."""
    batches = (1, 8, 16, 32, 64, 240)
    cached = (6.7, 53.6, 107.2, 214.4, 428.8, 1608)
    total = (32.7, 79.6, 133.2, 240.4, 454.8, 1634)
    step, tokens = (4.98, 12.13, 20.30, 36.65, 69.33, 249.09), (200.61, 659.30, 787.99, 873.21, 923.13, 963.53)
    few_step, few_tokens = (
        (4.17, 5.60, 7.23, 10.50, 17.04, 52.99),
        (239.94, 1429.19, 2212.48, 3047.62, 3756.62, 4529.34),
    )
    chips, rate = 8, chip("v5e").hbm_bytes_per_second
    for at, batch in enumerate(batches):
        what = f"Llama 2-13B, 8 × v5e, {CONTEXT} tokens, batch {batch}"
        kv, weights = 2 * batch * CONTEXT * sizes(LLAMA_2_13B).cache, 2 * sizes(LLAMA_2_13B).parameters
        yield row(f"{what}: cache, GB (the book says GiB)", cached[at], kv / 1e9, INFERENCE)
        yield row(f"{what}: cache and weights, GB", total[at], (kv + weights) / 1e9, INFERENCE)
        for heads, times, rates in ((40, step, tokens), (8, few_step, few_tokens)):
            config = replace(LLAMA_2_13B, kv_heads=heads)
            # The book keeps all parameters where heads share keys and values.
            moved = weights + 2 * batch * CONTEXT * sizes(config).cache
            seconds = moved / (chips * rate)
            yield row(f"{what}, {heads} heads in the cache: step, ms", times[at], seconds * 1e3, INFERENCE)
            yield row(f"{what}, {heads} heads in the cache: tokens/s", rates[at], batch / seconds, INFERENCE)


def llama_3_70b() -> Iterator[dict[str, Any]]:
    """Part 8: the cost of serving Llama 3-70B on v5e."""
    model, v5e = sizes(llama.SIZES["70b"]), chip("v5e")
    rate = v5e.hbm_bytes_per_second
    yield row("Llama 3-70B: cache of a token in int8, KiB", 160, model.cache / 1024, SERVING)
    kv = 32 * CONTEXT * model.cache
    full = model.parameters + kv
    what = f"Llama 3-70B, int8, batch 32, {CONTEXT} tokens"
    yield row(f"{what}: weights and cache, GB", 112, full / 1e9, SERVING)
    yield row(f"{what}: v5e that hold them", 7, full / BOOK_CHIP_BYTES, SERVING)
    for slice_, chips, reference in (("4x2", 8, 17), ("4x4", 16, 8.5)):
        yield row(f"{what}, {slice_}: step, ms", reference, 1e3 * full / (chips * rate), SERVING)
    yield row(f"{what}, 4x2: tokens/s", 1882, 32 * 8 * rate / full, SERVING)
    yield row(f"{what}, 4x2: tokens/s a chip", 235, 32 * rate / full, SERVING)
    book_step = BOOK_CHIP_BYTES / 8.2e11
    step = BOOK_CHIP_BYTES / rate
    yield row("v5e, all of its HBM read: ms", 19, step * 1e3, SERVING, "16 / 0.82 = 19.5, cut to 19", book_step * 1e3)
    for printed in _SLICES:
        yield from _slice(printed, model, step)
    torus = v5e.interconnect
    assert isinstance(torus, Torus)
    bidirectional = 2 * torus.link_bytes_per_second
    alpha = v5e.matmul_flops_per_second("bfloat16") / bidirectional
    d_ff = llama.SIZES["70b"].d_ff
    slip = "2,550 is the v5p's FLOP/s over its link's bytes/s; the v5e's is 2,189 (and 22.5 is cut to 22)"
    yield row("Llama 3-70B: chips until communication-bound", 22, 2 * d_ff / alpha, SERVING, slip, 2 * d_ff // 2550)
    prefill = 2 * model.parameters * CONTEXT / (16 * v5e.matmul_flops_per_second("bfloat16") * 0.4)
    yield row("Llama 3-70B, 16 v5e at 40 % MFU: prefill of 8192 tokens, s", 0.91, prefill, SERVING)
    yield from _one_matmul(v5e.matmul_flops_per_second("bfloat16"), rate, bidirectional)


@dataclass(frozen=True)
class Slice:
    """The book's numbers for the smallest slice for one type: `left` GB for the cache, `held` sequences, queries per second
    and chip on it and on twice as many chips. `why` and `formula` explain `held`."""

    dtype: str
    width: float
    chips: int
    weights: float
    kv: float
    least: float
    left: float
    held: float
    queries: float
    doubled: float
    why: str = ""
    formula: float | None = None


_BOOK_KV = 162e3 * CONTEXT
_SLICES = (
    Slice("bf16", 2, 16, 140, 324, 8.75, 116, 43, 0.27, 0.51),
    Slice("int8", 1, 8, 70, 162, 4.38, 68, 52, 0.66, 1.03, "from 68 GB left, which are 58", 68e9 / _BOOK_KV),
    Slice(
        "int4",
        0.5,
        4,
        45,
        81,
        2.81,
        19,
        67,
        1.72,
        2.06,
        "45 GB of weights divided, not what is left",
        45e9 / (_BOOK_KV / 2),
    ),
)


def _slice(book: Slice, model: Sizes, step: float) -> Iterator[dict[str, Any]]:
    name = f"Llama 3-70B in {book.dtype} on {book.chips} v5e"
    weights, kv = book.width * model.parameters, book.width * model.cache
    held_by = {n: n * BOOK_CHIP_BYTES - weights for n in (book.chips, 2 * book.chips)}
    sequences = {n: left / (kv * CONTEXT) for n, left in held_by.items()}
    own = 70e9 * book.width
    yield row(
        f"{name}: weights, GB", book.weights, weights / 1e9, SERVING, "70e9 half bytes are 35 GB, not 45", own / 1e9
    )
    yield row(f"{name}: cache of a token, kB", book.kv, kv / 1e3, SERVING)
    slip = "70e9 half bytes on chips of 16 GB are 2.19 chips; 45 GB are 2.81"
    yield row(
        f"{name}: chips that hold the weights",
        book.least,
        weights / BOOK_CHIP_BYTES,
        SERVING,
        slip,
        own / BOOK_CHIP_BYTES,
    )
    left = book.chips * 16 - own / 1e9
    slip = f"{book.chips} × 16 - {own / 1e9:.0f} = {left:.0f}"
    yield row(f"{name}: left for the cache, GB", book.left, held_by[book.chips] / 1e9, SERVING, slip, left)
    yield row(f"{name}: sequences of 8192", book.held, sequences[book.chips], SERVING, book.why, book.formula)
    queries = {n: held / (step * OUTPUT_TOKENS * n) for n, held in sequences.items()}
    printed = book.held / (0.019 * OUTPUT_TOKENS * book.chips)
    slip = f"from {book.held:.0f} sequences and 19 ms"
    yield row(f"{name}: queries/s a chip", book.queries, queries[book.chips], SERVING, slip, printed)
    slip = "from a batch of 161; 32 × 16 - 140 GB hold 140 sequences of 324 kB × 8192, and so do the others"
    twice = 161 / (0.019 * OUTPUT_TOKENS * 2 * book.chips)
    yield row(f"{name}, twice the chips: queries/s a chip", book.doubled, queries[2 * book.chips], SERVING, slip, twice)


def _one_matmul(flops: float, hbm: float, link: float) -> Iterator[dict[str, Any]]:
    config, batch, chips, wide = llama.SIZES["70b"], 64, 32, 2
    weights, sent = config.d_model * config.d_ff, 2 * batch * config.d_model * wide
    what, cut = "Llama 3-70B, batch 64 on 4x8, one product by d_ff", "cut to whole microseconds"
    ici, math_ = sent / (2 * link) * 1e6, 2 * batch * weights / (chips * flops) * 1e6
    yield row(f"{what}: ICI, µs", 11, ici, f"{SERVING}, of 2025-02", cut, ici)
    yield row(f"{what}: HBM, µs", 18, wide * weights / (chips * hbm) * 1e6, f"{SERVING}, of 2025-02")
    yield row(f"{what}: FLOPs, µs", 4, math_, f"{SERVING}, of 2025-02", cut, math_)


def questions() -> Iterator[dict[str, Any]]:
    """Worked questions of parts 1 and 7."""
    v5e, v4 = chip("v5e"), chip("v4")
    bytes_, flops = 16 * v5e.hbm_bytes_per_second, 16 * v5e.matmul_flops_per_second("bfloat16")
    for batch, reference in ((4, 2.5), (256, 21)):
        cached = batch * CONTEXT * 100e3 / bytes_
        seconds = cached + max(2 * batch * 30e9 / flops, 30e9 / bytes_)
        yield row(
            f"30 B parameters in int8, 100 kB a token, v5e:4x4, batch {batch}: step, ms",
            reference,
            seconds * 1e3,
            INFERENCE,
        )
    load = 400e9 / (32 * v4.hbm_bytes_per_second)
    yield row(
        "200 B parameters in bf16 on 32 v4: read once, ms",
        10,
        load * 1e3,
        "jax-ml/scaling-book, tpus.md",
        "10.4 rounded",
        load * 1e3,
    )
    # 1D over three axes sends 4 BD / (3 W), 2D at its best √128 BD / (√N W), where F = 4 D.
    equal = 128 * (3 / 4) ** 2
    slip = "32 (F/D) (3/4)² at F = 4 D is 72"
    yield row(
        "chips from which 2D sends less than 1D over three axes", 81, equal, f"{INFERENCE}, question 7", slip, equal
    )


def collectives() -> Iterator[dict[str, Any]]:
    """Part 3: gathers on a v5e 8x4 and a v4 4x4x4. The book drops (N-1)/N, and takes the longer of wire and hops."""
    v5e, v4 = parse_topology("v5e:8x4"), parse_topology("v4:4x4x4")
    large, small, block = 2 * 2048 * 8192, 2 * 256 * 256, 2 * 1024 * 4096
    ring = replace(v5e, axes=tuple(replace(axis, wraparound=True) for axis in v5e.axes))
    dropped = "the book drops (N-1)/N, 3/4 here, and the latency of hops and launch"
    link = 2 * v5e.axis("y").bytes_per_second
    yield row(
        "v5e:8x4, all-gather of bf16[2048,8192] over 4 in a ring, µs",
        377,
        _us(ring, "y", large),
        SHARDING,
        dropped,
        large / link * 1e6,
    )
    yield row("v5e:8x4, all-gather of bf16[2048,8192] over 4 in a line, µs", 560, _us(v5e, "y", large), SHARDING)
    hops = "three hops of 1 µs alone; ours adds the wire and a launch (8 µs were measured)"
    yield row(
        "v5e:8x4, all-gather of bf16[256,256] over 4, µs",
        3,
        _us(v5e, "y", small),
        SHARDING,
        hops,
        3e6 * v5e.axis("y").hop_seconds,
    )
    each = 2 * v4.axis("x").bytes_per_second
    yield row(
        "v4:4x4x4, AG_X of bf16[1024,4096] in 4 pieces along y, µs",
        23,
        _us(v4, "x", block / 4),
        SHARDING,
        dropped,
        block / 4 / each * 1e6,
    )
    yield row(
        "v4:4x4x4, AG_XY of bf16[1024,4096], µs", 46, _us(v4, "xy", block), SHARDING, dropped, block / (2 * each) * 1e6
    )
    yield row(
        "v4:4x4x4, AR_Z of bf16[1024,4096], µs",
        190,
        _us(v4, "z", block, "all-reduce"),
        SHARDING,
        dropped,
        2 * block / each * 1e6,
    )
    sent = 16.8e6 / (2 * v5e.axis("y").bytes_per_second) * 1e6
    yield row("v5e:4x4, 16.8 MB from corner to corner by two links, µs", 188, sent, "jax-ml/scaling-book, tpus.md")


def _us(topology: Topology, axes: str, bytes_: float, kind: str = "all-gather") -> float:
    return float(seconds_on(topology, kind, axes, bytes_)) * 1e6


def rows() -> list[dict[str, Any]]:
    """All tables and questions."""
    parts = (ratios_of_chips, llama_2_13b, llama_3_70b, questions, collectives)
    return [found for part in parts for found in part()]


def main() -> None:
    from benchmarks.published import run

    run(["book"])


if __name__ == "__main__":
    main()
