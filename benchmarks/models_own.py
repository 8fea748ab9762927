"""The models of `examples/`, in plain JAX, at their published sizes and tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from autoshard import Workload
from examples import gpt_oss, llama, mixtral, mla, t5, training


def _sized(make: Callable[..., Workload], size: str, sizes: dict[str, Any], tiny: bool = False) -> Workload:
    """The workload at its published size, or a tiny one of the same structure."""
    if not tiny:
        return make(size=size, **sizes)
    small = {name: {"batch": 8, "length": 16, "context": 16}.get(name, value) for name, value in sizes.items()}
    return make(size="tiny", **small)


def cases() -> dict[tuple[str, str], Callable[..., Workload]]:
    """(model, phase) to its builder."""
    found: dict[tuple[str, str], Callable[..., Workload]] = {}

    def add(name: str, phase: str, make: Callable[..., Workload], size: str, **sizes: Any) -> None:
        found[name, phase] = partial(_sized, make, size, sizes)

    for size in ("8b", "70b", "405b"):
        add(f"llama 3 {size} unrolled", "prefill", llama.prefill, size, batch=16, length=1024, unrolled=True)
        add(f"llama 3 {size} unrolled", "decode", llama.decode, size, batch=64, context=2048, unrolled=True)
    add("llama 3 8b stacked", "decode", llama.decode, "8b", batch=64, context=2048)
    add("mixtral 8x7b", "prefill", mixtral.prefill, "8x7b", batch=16, length=1024)
    add("mixtral 8x7b", "decode", mixtral.decode, "8x7b", batch=64, context=2048)
    add("gpt-oss 20b", "prefill", gpt_oss.prefill, "20b", batch=8, length=1024)
    add("gpt-oss 20b", "decode", gpt_oss.decode, "20b", batch=64, context=2048)
    add("deepseek-v2 lite", "prefill", mla.prefill, "lite", batch=16, length=1024)
    add("deepseek-v2 lite", "decode", mla.decode, "lite", batch=64, context=2048)
    add("t5 v1.1 xxl", "forward", t5.forward, "xxl", batch=16, length=512)
    add("llama 3 8b stacked", "train", training.train, "8b", batch=64, length=1024)
    add("llama 3 8b unrolled", "train", training.train, "8b", batch=64, length=1024, unrolled=True)
    add("llama 3 8b stacked", "train, 4 parts", training.train, "8b", batch=64, length=1024, accumulate=4)
    return found
