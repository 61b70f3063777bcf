"""What a config's `mesh` and `processes` may say, and where arrays then lie."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpost.recipes import _setup
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._sections import MeshSection, ProcessesSection


def test_one_device_is_no_mesh():
    layout = _setup.open_layout(MeshSection(devices=1), 3)
    assert layout.mesh is None
    assert layout.batch_parts == 1
    assert layout.batch_share == (0, 1)
    batch = {"x": np.zeros((3, 2))}
    assert layout.place_batch(batch)["x"] is batch["x"]


def test_batch_is_split_over_data_and_fsdp():
    layout = _setup.open_layout(MeshSection(fsdp=2, tensor=2), 8)
    assert dict(layout.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert layout.batch_parts == 4
    placed = layout.place_batch({"x": np.zeros((8, 2), np.float32)})["x"]
    assert placed.sharding.shard_shape(placed.shape) == (2, 2)


def test_rules_are_overridden():
    section = MeshSection(fsdp=4, rules={"embed": "data+fsdp", "vocab": "none"})
    layout = _setup.open_layout(section, 8)
    assert layout.rules == {"embed": ("data", "fsdp"), "vocab": ()}
    assert layout.batch_parts == 8


@pytest.mark.parametrize(
    ("section", "rows", "words"),
    [
        (MeshSection(fsdp=3), 8, r"needs a multiple of 3 devices, but there are 8"),
        (MeshSection(data=4, fsdp=4), 8, r"needs 16 devices.*nearest shape"),
        (MeshSection(devices=9), 8, r"mesh.devices is 9, but there are 8"),
        (MeshSection(), 12, r"12 rows.*divide over the 8 devices.*8 rows"),
        (MeshSection(), 4, r"nearest that works is 8 rows"),
        (MeshSection(rules={"embd": "fsdp"}), 8, r"logical axis 'embd'"),
        (MeshSection(rules={"embed": "fsdq"}), 8, r"mesh axis 'fsdq'"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(section, rows, words):
    with pytest.raises(ValueError, match=words):
        _setup.open_layout(section, rows)


def test_processes_need_an_address():
    with pytest.raises(ConfigError, match="coordinator is not given"):
        _setup.join_processes(ProcessesSection(count=2))
    with pytest.raises(ConfigError, match="not both"):
        _setup.join_processes(ProcessesSection(coordinator="a:1", auto=True))
    _setup.join_processes(ProcessesSection())
    assert jax.process_count() == 1


def test_a_batch_spec_covers_rows_only():
    layout = _setup.open_layout(MeshSection(), 8)
    placed = layout.place_batch({"x": np.zeros((8, 5), np.int32)})["x"]
    assert placed.sharding.spec == P(("data", "fsdp"))
