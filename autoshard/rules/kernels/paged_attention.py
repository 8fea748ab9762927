"""Rules of paged attention: query heads are split with the heads of their pages, and sequences where pages are whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

from jax.extend import core as jex

from autoshard.rules.kernels.body import inner_jaxprs
from autoshard.rules.kernels.candidate import Candidate, kernel_of
from autoshard.rules.rule import Factors, Rule, inexact
from costmodels.program.program import Output

_MEGACORE = (None, "kv_head", "batch")


def paged(module: Any, closed: Any) -> Iterator[Candidate]:
    """The calls of `paged_attention` that a jaxpr may be.

    `[b,kg,d],[k,n,p,d],[k,n,p,d],[b],[b,m] -> [b,kg,d]`: `b` sequences, `k` heads of pages, each of `g` query heads, `n` pages
    of `p` tokens, `m` pages a sequence. A sequence may be on any chip that has all pages. Two cores of a chip that share the
    heads or the sequences need an even number of them, which stay whole.
    """
    mapping = kernel_of(closed).params["grid_mapping"]
    pages_per_block = mapping.scratch_avals[0].shape[1]
    for megacore, inline in product(_MEGACORE, (True, False)):
        static = functools.partial(
            module.paged_attention,
            pages_per_compute_block=pages_per_block,
            megacore_mode=megacore,
            inline_seq_dim=inline,
        )
        quantised = len(closed.in_avals) == 7
        call = functools.partial(_call_quantised, module, static) if quantised else static
        if len(closed.in_avals) in (5, 7):
            yield Candidate(call, _paged_rule(closed.in_avals, quantised, megacore))


def _call_quantised(module: Any, static: Any, q: Any, k: Any, k_scale: Any, v: Any, v_scale: Any, *tables: Any) -> Any:
    quantised = module.quantization_utils.QuantizedTensor
    return static(q, quantised(k, k_scale), quantised(v, v_scale), *tables)


def _paged_rule(avals: Any, quantised: bool, megacore: str | None) -> Rule:
    q, pages, indices = avals[0], avals[1], avals[-1]
    (sequences, heads, width), (kv_heads, count, tokens, _) = q.shape, pages.shape
    factors = Factors()
    b = factors.new(sequences, "whole" if megacore == "batch" else "parallel")
    k = factors.new(kv_heads, "whole" if megacore == "kv_head" else "parallel")
    g = factors.new(heads // kv_heads)
    d, n, p, m = (factors.new(size, "whole") for size in (width, count, tokens, indices.shape[1]))
    cache = ((k,), (n,), (p,), (d,))
    scales = [((k,), (n,), (p,), () if avals[2].shape[-1] == 1 else (d,))] if quantised else []
    query = ((b,), (k, g), (d,))
    # Per point of b k g d n p m: every query meets the m pages of its sequence, not all n.
    return Rule(
        factors.done(),
        (query, cache, *scales, cache, *scales, ((b,),), ((b,), (m,))),
        (query,),
        op_class="matmul",
        traffic=(*range(len(avals)), Output()),
        flops_per_point=4.0 / count,
    )


def ragged(module: Any, closed: Any) -> Iterator[Candidate]:
    """The calls of `ragged_paged_attention` that a jaxpr may be.

    `[t,kg,d],[n,p,kc,d],[s],[s,m],[c],[o] -> [t,kg,d]`: `t` tokens of all sequences; keys and values alternate along the
    heads (`c` is 2). Tokens stay whole: the tables say which of them belong to which sequence.
    """
    kernel = kernel_of(closed)
    mapping, compiler = kernel.params["grid_mapping"], kernel.params["compiler_params"]
    for scale in dict.fromkeys([1.0, *_numbers(kernel.params["jaxpr"])]):
        call = functools.partial(
            module.ragged_paged_attention,
            sm_scale=scale,
            num_kv_pages_per_block=mapping.scratch_avals[0].shape[1],
            num_queries_per_block=mapping.block_mappings[0].transformed_block_aval.shape[0],
            vmem_limit_bytes=compiler.vmem_limit_bytes,
        )
        yield Candidate(call, _ragged_rule(closed.in_avals))


def _ragged_rule(avals: Any) -> Rule:
    (tokens, heads, width), (count, page, combined, _) = avals[0].shape, avals[1].shape
    factors = Factors()
    k, g = factors.new(combined // 2), factors.new(2 * heads // combined)
    pair = factors.new(2, "whole")
    t, d, n, p = (factors.new(size, "whole") for size in (tokens, width, count, page))
    tables = [factors.each(aval.shape, range(len(aval.shape))) for aval in avals[2:]]
    made = factors.done()
    query = ((t,), (k, g), (d,))
    pages = avals[3].shape[1]
    return Rule(
        made,
        (query, ((n,), (p,), (k, pair), (d,)), *tables),
        (query,),
        op_class="matmul",
        traffic=(0, 1, Output()),
        flops_per_point=4.0 * tokens * heads * width * pages * page / prod(each.size for each in made),
    )


def _numbers(jaxpr: Any) -> Iterator[float]:
    """The floating-point numbers that a jaxpr multiplies by, at any depth."""
    for eqn in jaxpr.eqns:
        for atom in eqn.invars if eqn.primitive.name == "mul" else ():
            aval: Any = atom.aval
            if isinstance(atom, jex.Literal) and not aval.shape and inexact(aval):
                yield float(atom.val)
        for inner in inner_jaxprs(eqn):
            yield from _numbers(inner)
