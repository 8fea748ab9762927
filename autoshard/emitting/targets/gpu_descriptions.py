"""Descriptions of GPUs with which XLA:GPU compiles for a chip that is not attached.

The compiler takes a `GpuTargetConfigProto` in text form. Rates and sizes of memory come from the chip catalogue. The
properties of the architecture come from the CUDA C++ programming guide ("technical specifications per compute
capability") and NVIDIA's architecture whitepapers (multiprocessors, L2 cache).
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodels.machine.chips import Chip

# The compiler needs a cuDNN version to choose kernels; an audit only reads collectives and memory.
_DNN = "dnn_version_info { major: 9 minor: 10 }"


@dataclass(frozen=True)
class Architecture:
    """A GPU's multiprocessors ("cores" to the compiler)."""

    name: str
    compute_capability: tuple[int, int]
    accelerated: bool
    multiprocessors: int
    fp32_units: int
    shared_memory_bytes: int
    shared_memory_bytes_per_block: int
    l2_bytes: int


ARCHITECTURES = {
    "a100": Architecture("NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 164 * 2**10, 163 * 2**10, 40 * 2**20),
    "h100": Architecture("NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 228 * 2**10, 227 * 2**10, 50 * 2**20),
    "h200": Architecture("NVIDIA H200", (9, 0), True, 132, 128, 228 * 2**10, 227 * 2**10, 50 * 2**20),
    "b200": Architecture("NVIDIA B200", (10, 0), True, 148, 128, 228 * 2**10, 227 * 2**10, 126 * 2**20),
}
"""Architectures by name in the chip catalogue."""


def target_config(chip: Chip) -> str:
    """The `GpuTargetConfigProto` of a chip of `ARCHITECTURES`, as text."""
    of = ARCHITECTURES[chip.name]
    major, minor = of.compute_capability
    features = "feature_extension: ACCELERATED_FEATURES" if of.accelerated else ""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": of.shared_memory_bytes,
        "shared_memory_per_block_optin": of.shared_memory_bytes_per_block,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "core_count": of.multiprocessors,
        "fpus_per_core": of.fp32_units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.hbm_bytes_per_second),
        "device_memory_size": int(chip.hbm_bytes),
        "l2_cache_size": of.l2_bytes,
        "clock_rate_ghz": (chip.clock_hertz or 1e9) / 1e9,
    }
    info = " ".join(f"{name}: {value}" for name, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} {features} }}"
    return f'gpu_device_info {{ {info} {capability} }} platform_name: "CUDA" {_DNN} device_description_str: "{of.name}"'
