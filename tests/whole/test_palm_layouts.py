"""PaLM 540B at its published size on a TPU v4 4x4x4: what the search must find, and what memory must refuse."""

from __future__ import annotations

import pytest

from autoshard.tracing import Traced
from costmodels.machine import Topology, parse_topology
from examples import palm
from search import Limits, NoPlan, Solution, Strategy, search
from tests.support.tracing import trace


@pytest.fixture(scope="module")
def slice_() -> Topology:
    return parse_topology("v4:4x4x4")


@pytest.fixture(scope="module")
def decode() -> Traced:
    workload = palm.decode(size="540b", batch=64, context=2048)
    return trace(workload.fn, *workload.args, donate_argnums=workload.donate_argnums)


@pytest.fixture(scope="module")
def decoded(decode, slice_) -> Solution:
    return search(decode.program, slice_)


def caches(traced: Traced) -> list[int]:
    """The sources of the KV cache, `[L, B, S, D]` each."""
    return [i for i in traced.program.arguments if traced.program.operations[i].name.startswith("cache")]


def test_decode_is_proven_best(decoded):
    assert (decoded.proof.status, decoded.proof.gap) == ("OPTIMAL", 0.0)
    assert decoded.check.faults == ()
    assert decoded.check.seconds == pytest.approx(decoded.proof.objective_seconds, rel=1e-9)


def test_the_cache_is_split_by_batch(decode, decoded):
    """Multiquery attention has no head to split the cache by: the batch takes all 64 chips."""
    for i in caches(decode):
        layers, batch, length, head = decoded.choice.strategies[i].splits
        assert (layers, length, head) == ((), (), ()) and len(batch) == 3


def test_head_sharded_attention_does_not_fit(decode, slice_):
    """Split by heads, every chip holds the whole multiquery cache, and memory refuses it although nothing is reserved."""
    held = set(caches(decode))

    def by_heads(operation: int, strategy: Strategy) -> bool:
        return operation not in held or not strategy.axes

    with pytest.raises(NoPlan) as refused:
        search(decode.program, slice_, Limits(reserve_bytes=0.0), allow=by_heads)
    assert refused.value.proven
    assert refused.value.least_bytes > slice_.chip.usable_hbm_bytes


@pytest.mark.long
def test_prefill_moves_weights_at_the_larger_batch(slice_):
    """At 2048 tokens weights stay; at 64 x 2048 gathering them is cheaper than moving the activations."""

    def gathered(batch: int) -> bool:
        workload = palm.prefill(size="540b", batch=batch, length=2048)
        found = search(trace(workload.fn, *workload.args).program, slice_)
        assert (found.proof.status, found.check.faults) == ("OPTIMAL", ())
        return any(_gathers_weights(found))

    assert not gathered(1)
    assert gathered(64)


def _gathers_weights(found: Solution):
    from search.answer.assignment import collectives

    program = found.problem.program
    for step in collectives(program, found.problem.topology, found.choice):
        yield step.kind == "all-gather" and "['w" in program.source_name(step.value) and step.count > 1
