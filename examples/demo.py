"""The demo: PaLM 540B on a TPU v4 4x4x4, planned, proven, compiled and audited; then a tiny PaLM, run.

    python examples/demo.py [--out plan.json]

1. One decode step of PaLM 540B is searched, explained and saved.
2. The real TPU compiler compiles the plan ahead of time, without a TPU. The audit compares collectives and peak memory.
   Without `libtpu` a smaller plan is audited on host devices instead.
3. Prefill at two batch sizes is searched, and its strategies and costs are compared with decode's.
4. A tiny PaLM runs on eight host devices with and without its plan, and the results are compared.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import argparse
import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import autoshard
from examples import palm

TOPOLOGY = "v4:4x4x4"
TINY_TOPOLOGY = "cpu:2x2x2"


def main() -> int:
    parser = argparse.ArgumentParser(description="PaLM 540B laid out, audited, and a tiny one run.")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="where the plan goes")
    out = parser.parse_args().out
    started = time.monotonic()

    heading(f"1. PaLM 540B, one decode step (batch 64, 2048 tokens of cache) on {TOPOLOGY}")
    decode = palm.decode(size="540b", batch=64, context=2048)
    plan = searched(decode, TOPOLOGY)
    print(plan.explain())
    plan.save(out)
    print(f"written to {out}")

    heading("2. The compiled program beside the plan")
    faithful = audited(plan, decode)

    heading("3. Prefill beside decode")
    compare(plan)

    heading(f"4. A tiny PaLM on {TINY_TOPOLOGY}: planned and unplanned results")
    equal = run_tiny()
    print(f"\n{time.monotonic() - started:.0f} s in all")
    return 0 if faithful and equal else 1


def heading(text: str) -> None:
    """Prints a heading at once, since the next part may take seconds."""
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


def searched(workload: autoshard.Workload, topology: str) -> autoshard.Plan:
    """The plan of a workload; prints the search time."""
    started = time.monotonic()
    plan = autoshard.search(
        workload.fn, *workload.args, topology=topology, donate_argnums=workload.donate_argnums, name=workload.name
    )
    print(
        f"searched in {time.monotonic() - started:.1f} s, trace to plan: {plan.proof.status}, gap {plan.proof.gap:g}\n"
    )
    return plan


def audited(plan: autoshard.Plan, workload: autoshard.Workload) -> bool:
    """Compiles the plan for TPUs and prints the audit; for host devices without libtpu."""
    target = "tpu"
    if importlib.util.find_spec("libtpu") is None:
        print(
            "libtpu is not installed (pip install 'autoshard[tpu]'): a tiny PaLM is audited on host devices instead.\n"
        )
        workload = palm.decode(size="tiny", batch=8, context=16)
        plan, target = searched(workload, TINY_TOPOLOGY), "host"
    audit = autoshard.audit(plan, workload.fn, *workload.args, target=target)
    print(audit)
    return audit.ok


def compare(decode: autoshard.Plan) -> None:
    """Searches prefill at two batch sizes, and prints each weight's strategy and the communicated bytes beside decode's."""
    plans = {"decode, batch 64": decode}
    for batch in (1, 64):
        workload = palm.prefill(size="540b", batch=batch, length=2048)
        print(f"prefill, batch {batch} × 2048 tokens: ", end="")
        plans[f"prefill, batch {batch}"] = searched(workload, TOPOLOGY)
    for name, plan in plans.items():
        print(f"{name}: {plan.estimate.seconds * 1e3:,.1f} ms, {plan.estimate.peak_bytes / 2**30:.1f} GiB per chip")
        for op in plan.operations:
            if op.matmul:
                print(f"    {short(op):27s} {op.strategy:50s} {op.seconds * 1e3:10.2f} ms, {op.regime}-bound")
                if op.runner_up:
                    print(f"    {'':27s} instead {op.runner_up}")
        for line in reasons(plan):
            print(f"    {line}")
        print()


def short(op) -> str:
    """The weight of a matmul, or its source line."""
    return op.name.split(" ", 1)[1].split(" (")[0] if "params" in op.name else op.source


def reasons(plan: autoshard.Plan) -> list[str]:
    """The bytes of weights and of activations, and the plan's cost to communicate them: they decide between WS and WG."""
    weights = sum(a.bytes_per_chip for a in plan.arguments if a.path.startswith("params"))
    moved = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for each in plan.estimate.collectives:
        is_weight = each.where.startswith("params")
        moved[is_weight][0] += each.bytes * each.count
        moved[is_weight][1] += each.seconds
    lines = [f"weights at rest: {weights / 2**30:.1f} GiB per chip"]
    for is_weight, what in ((True, "weights"), (False, "activations")):
        size, seconds = moved[is_weight]
        lines.append(f"{what} moved: {size / 2**30:,.2f} GiB of payload per chip and step, {seconds * 1e3:,.1f} ms")
    if moved[True][1] > moved[False][1]:
        lines.append("so: there are more activations than weights, and gathering the weights is the smaller move")
    else:
        lines.append("so: the activations are the smaller move, and the weights stay where they are")
    return lines


def run_tiny() -> bool:
    """Runs decode and prefill of a tiny PaLM with and without a plan, and compares the results."""
    equal = True
    for workload in (palm.decode(size="tiny", batch=8, context=16), palm.prefill(size="tiny", batch=8, length=16)):
        plan = autoshard.search(workload.fn, *workload.args, topology=TINY_TOPOLOGY)
        args = arrays(workload.args)
        plain = jax.jit(workload.fn)(*args)
        planned = plan.jit(workload.fn)(*args)
        worst = max(
            float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))))
            for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(planned), strict=True)
        )
        size = max(float(jnp.max(jnp.abs(a.astype(jnp.float32)))) for a in jax.tree.leaves(plain))
        split = sum(1 for leaf in jax.tree.leaves(planned) if not leaf.sharding.is_fully_replicated)
        print(
            f"{plan.name}: {split} of {len(jax.tree.leaves(planned))} results are split over the devices;"
            f" the largest difference is {worst:.2g} in values up to {size:.2g} (bfloat16)"
        )
        equal = equal and worst <= 0.05 * size
    return equal


def arrays(shapes):
    """Small random arrays of these shapes."""
    draws = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(draws.integers(0, 8, leaf.shape), leaf.dtype)
        return jnp.asarray(draws.standard_normal(leaf.shape) * 0.2, leaf.dtype)

    return jax.tree.map(draw, shapes)


if __name__ == "__main__":
    sys.exit(main())
