"""Which changes are tried when a run does not fit, on a made-up memory model."""

import dataclasses
import math

import pytest

from jaxpost import parallel
from jaxpost.recipes import _remedies
from jaxpost.recipes.sft import SFTConfig

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class FakeForecast:
    mesh: dict
    memory: parallel.Memory

    @property
    def devices(self):
        return math.prod(self.mesh.values())


class FakeCompiler:
    """Parameters of `size` bytes, and so much for each row of a device."""

    def __init__(self, size, row_bytes, remat_share=1.0):
        self.size, self.row_bytes, self.share = size, row_bytes, remat_share
        self.compiled = []

    def exact(self, configs):
        return [self.memory(config, with_rows=False) for config in configs]

    def compile(self, config, devices):
        mesh = {a: getattr(config.mesh, a) for a in parallel.AXES}
        assert math.prod(mesh.values()) == devices
        rows = config.train.batch_size // config.train.accumulate
        assert rows % (mesh["data"] * mesh["fsdp"]) == 0
        self.compiled.append(config)
        return FakeForecast(mesh, self.memory(config)), ()

    def memory(self, config, with_rows=True):
        mesh = config.mesh
        share = self.size // (mesh.fsdp * mesh.tensor)
        narrow = config.optimizer.mu_dtype is not None
        rows = config.train.batch_size // config.train.accumulate
        rows = rows // (mesh.data * mesh.fsdp) * self.row_bytes
        rows *= self.share if config.model.remat == "full" else 1.0
        return parallel.Memory(
            parameters=share,
            gradients=share,
            moments=2 * share - narrow * share // 2,
            frozen=0,
            other=0,
            batch=0,
            temporaries=round(rows) if with_rows else 0,
        )


def remedies(fake, limit, **mesh):
    sizes = dict.fromkeys(parallel.AXES, 1) | mesh
    config = SFTConfig()
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **sizes),
        train=dataclasses.replace(config.train, batch_size=16),
    )
    forecast, _ = fake.compile(config, math.prod(sizes.values()))
    assert forecast.memory.needed > limit  # or there is nothing to look for
    return _remedies.find_remedies(config, forecast, limit, fake.exact, fake.compile)


def test_every_single_change_that_fits_is_named_and_no_other():
    fake = FakeCompiler(8 * MIB, 16 * MIB, remat_share=1.0)
    # 16 MiB of state and four rows of 16: 80. More fsdp gives 72, narrower moments 78,
    # recomputing nothing at all; what fits is 65 and the margin.
    found = remedies(fake, 75 * MIB, data=2, fsdp=2)
    assert [(remedy.flags, remedy.total) for remedy in found] == [
        ("--train.accumulate 4", 32 * MIB),
        ("--train.accumulate 2", 48 * MIB),
    ]
    assert any(config.model.remat == "full" for config in fake.compiled)


def test_changes_that_help_only_together_are_joined_without_needless_ones():
    fake = FakeCompiler(40 * MIB, 10 * MIB, remat_share=0.5)
    (found,) = remedies(fake, 75 * MIB, data=4, fsdp=1)
    assert found.total * 1.15 <= 75 * MIB
    assert " --" in found.flags  # more than one


def test_more_devices_when_the_state_alone_is_too_large():
    fake = FakeCompiler(64 * MIB, 1 * MIB)
    (found,) = remedies(fake, 20 * MIB)
    # 256 MiB of state: 16 parts and one row each, 17 MiB and the margin.
    assert found.flags == "--devices 16 --mesh.data 1 --mesh.fsdp 16 --mesh.tensor 1"
    assert found.total == 17 * MIB
    assert len(fake.compiled) == 2  # the run itself, and one that was worth a try


def test_more_devices_than_rows_take_tensor_parallelism():
    fake = FakeCompiler(128 * MIB, 1 * MIB)
    (found,) = remedies(fake, 20 * MIB)
    assert found.flags == "--devices 32 --mesh.data 1 --mesh.fsdp 16 --mesh.tensor 2"


def test_nothing_is_named_if_nothing_helps():
    fake = FakeCompiler(4 * MIB, 100 * MIB)
    assert remedies(fake, 50 * MIB) == ()


@pytest.mark.parametrize("tensor", [3, 5])
def test_a_mesh_that_cannot_be_doubled_is_left(tensor):
    config = dataclasses.replace(
        SFTConfig(), mesh=dataclasses.replace(SFTConfig().mesh, tensor=tensor)
    )
    assert _remedies._arrange(config, 16) is None
