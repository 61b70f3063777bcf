"""Meshes: sizes, defaults, and refusals that say what would work."""

import jax
import pytest
from jax.sharding import AxisType

from jaxpost import parallel


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, (8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "tensor": -1}, (1, 8, 1)),
    ],
)
def test_sizes(shape, sizes):
    mesh = parallel.make_mesh(shape)
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.axis_names) == set(parallel.AXES)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert list(mesh.devices.flat) == jax.devices()


def test_chosen_devices():
    devices = jax.devices()[4:]
    mesh = parallel.make_mesh({"fsdp": 4}, devices=devices)
    assert list(mesh.devices.flat) == devices


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"data": 3},
            r"needs 3 devices, but there are 8; the nearest shape that works is "
            r"\{data: 8, fsdp: 1, tensor: 1\}",
        ),
        (
            {"data": -1, "tensor": 3},
            r"a multiple of 3 devices, but there are 8; .* \{data: 4, tensor: 2, fsdp",
        ),
        ({"data": 2, "fsdp": 2}, r"needs 4 devices.* \{data: 4, fsdp: 2, tensor: 1\}"),
        ({"data": 0}, "positive size or -1, got 0"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
    ],
)
def test_refusals(shape, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(shape)


def test_the_suggested_shape_works():
    for tensor in range(1, 10):
        try:
            parallel.make_mesh({"data": -1, "tensor": tensor})
        except ValueError as error:
            written = str(error).rsplit("{", 1)[1].rstrip("}.")
            pairs = (item.split(": ") for item in written.split(", "))
            parallel.make_mesh({axis: int(size) for axis, size in pairs})
