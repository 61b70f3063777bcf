"""Eight virtual CPU devices, a persistent compilation cache, strict JAX settings."""

import gc
import os
import pathlib

# The programs of thousands of tests stay alive: looking at all of them each 700 new
# objects costs more the longer a process runs.
gc.set_threshold(20_000, 20, 50)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Most of the time goes into compiling: least at this level, same arithmetic.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
):
    _flags = os.environ.get("XLA_FLAGS", "")
    if _flag.split("=")[0] not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} {_flag}".strip()
# Devices that wait for each other must not use up XLA's threads (one per core): see
# jaxpost.parallel.give_virtual_devices_threads.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax-tests"))
# A bound makes JAX lock the cache, which the test processes share; folders filled
# without one lack what the lock's holder looks for.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(8 * 2**30))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402 (after the environment is set)
import pytest  # noqa: E402

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """Strict dtype promotion, for tests of our own arithmetic."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real data beside the checkout, if any; tests that need it skip by name."""
    place = pathlib.Path(os.environ.get("JAXPOST_SHARED_DATA", ROOT.parent / "shared"))
    place = place if place.name == "data" else place / "data"
    if not place.is_dir():
        pytest.skip("real data not found: set JAXPOST_SHARED_DATA to its folder")
    return place
