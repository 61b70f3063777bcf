"""A checkpoint that is not as it was written is found out, named, and passed over."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import training

STATE = {"w": np.arange(4000, dtype=np.float32)}


def flip_a_bit(folder):
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-7])


def remove(folder):
    largest(folder).unlink()


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def largest(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


@pytest.fixture
def folder(tmp_path):
    with training.Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": STATE["w"] + step})
    return tmp_path


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip_a_bit, "another checksum"),
        (truncate, r"has \d+ bytes, not \d+"),
        (remove, "is missing"),
        (empty_the_manifest, "manifest.json cannot be read"),
    ],
)
def test_the_one_before_is_used(folder, harm, words, caplog):
    harm(folder / "step_00000003")
    with (
        caplog.at_level(logging.WARNING, "jaxpost"),
        training.Checkpoints(folder) as checkpoints,
    ):
        with pytest.raises(training.CheckpointError, match=words):
            checkpoints.restore(STATE, step=3)
        restored = checkpoints.restore(STATE)
        assert restored.step == 2
        np.testing.assert_array_equal(restored.state["w"], STATE["w"] + 2)
        assert checkpoints.steps() == [1, 2]
    assert (folder / "damaged_00000003").is_dir()
    assert "step_00000003 is damaged and left out" in caplog.text


def test_all_damaged_is_an_error(folder):
    for step in (1, 2, 3):
        flip_a_bit(folder / f"step_{step:08d}")
    with (
        training.Checkpoints(folder) as checkpoints,
        pytest.raises(training.CheckpointError, match="step_00000003: it is damaged"),
    ):
        checkpoints.restore(STATE)


def test_killed_before_the_manifest_is_still_complete(folder):
    (folder / "step_00000003" / "manifest.json").unlink()
    with training.Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(STATE).step == 3


def test_keep_every(tmp_path):
    with training.Checkpoints(tmp_path, keep_last=1, keep_every=3) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, {"a": jnp.float32(step)})
    with training.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3, 6, 8]
    with pytest.raises(ValueError, match="keep_every must be at least 1"):
        training.Checkpoints(tmp_path, keep_every=0)
