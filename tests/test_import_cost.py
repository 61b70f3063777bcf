"""What importing costs, and what it leaves unloaded. Fresh processes only."""

import json
import os
import subprocess
import sys

import pytest

ALLOWED_S = 0.1
HEAVY = (
    "flax",
    "transformers",
    "datasets",
    "orbax",
    "tokenizers",
    "grain",
    "matplotlib",
)


def run_python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


@pytest.mark.parametrize("room", ["losses", "ops", "prompts", "typing"])
def test_light_rooms_load_nothing_heavy(room):
    code = f"import sys, json, jaxpost.{room}; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in json.loads(run_python(code))}
    assert not loaded & set(HEAVY)


def test_package_import_adds_little_to_jax():
    code = (
        "import jax, time; start = time.process_time(); import jaxpost;"
        "print(time.process_time() - start)"
    )
    # The least of three: the machine may be busy with something else.
    added_s = min(float(run_python(code)) for _ in range(3))
    assert added_s <= ALLOWED_S


def test_package_import_touches_no_device():
    code = (
        "import jaxpost, jaxpost.ops, jaxpost.losses, sys;"
        "from jax._src import xla_bridge;"
        "print(len(xla_bridge._backends))"
    )
    assert run_python(code).strip() == "0"
