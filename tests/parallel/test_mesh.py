"""Meshes: sizes, defaults, and refusals that say what would work."""

import os

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
    refused = 0
    for tensor in range(1, 10):
        try:
            parallel.make_mesh({"data": -1, "tensor": tensor})
        except ValueError as error:
            written = str(error).rsplit("{", 1)[1].rstrip("}.")
            pairs = (item.split(": ") for item in written.split(", "))
            mesh = parallel.make_mesh({axis: int(size) for axis, size in pairs})
            assert mesh.size == 8
            refused += 1
    assert refused == 5  # 3, 5, 6, 7 and 9 do not divide 8


def test_too_few_threads_are_told(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    with pytest.warns(RuntimeWarning, match="8 virtual CPU devices share 2 threads"):
        parallel.make_mesh()


@pytest.mark.parametrize(
    ("flags", "given", "wanted"),
    [
        ("--xla_force_host_platform_device_count=4096", None, "16384"),
        ("--xla_force_host_platform_device_count=4096", "7", "7"),
        ("", None, None),
    ],
)
def test_threads_for_virtual_devices(flags, given, wanted, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("NPROC", raising=False)
    if given is not None:
        monkeypatch.setenv("NPROC", given)
    parallel.give_virtual_devices_threads()
    assert os.environ.get("NPROC") == wanted
