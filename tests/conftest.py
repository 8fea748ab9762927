"""Every test sees eight CPU devices, strict dtypes and, where it is installed, the TPU compiler."""

import importlib.util
import os

# Before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu must not look for a TPU on the network
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nor abort because another process compiles too
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it: tables would be as narrow as its terminal

import jax
import pytest
from hypothesis import HealthCheck, settings

from autoshard._util import elapsed

elapsed.SILENT_SECONDS = 1e9  # a busy machine must not add lines to what tests compare

pytest.register_assert_rewrite("tests.support")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples on every machine, but for the profile `all`, which looks for new ones.
lasting = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
same = settings(lasting, derandomize=True, database=None, print_blob=True)
settings.register_profile("few", same, max_examples=20)
settings.register_profile("all", lasting, max_examples=100)
settings.register_profile("ci", same, max_examples=50)
settings.load_profile("few")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("tpu") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed (pip install 'autoshard[tpu]')")
