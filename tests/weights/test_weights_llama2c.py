"""llama2.c files: layout, rotary reordering, and damage."""

import struct

import numpy as np
import pytest

from jaxpost import weights

WIDTH, INNER, LAYERS, HEADS, KV, VOCAB, CONTEXT = 8, 12, 2, 2, 1, 11, 6


def write(path, vocab, *, values=None, cut=None):
    keys = KV * WIDTH // HEADS
    per_layer = 2 * WIDTH + 2 * WIDTH * (WIDTH + keys) + 3 * WIDTH * INNER
    count = VOCAB * WIDTH + LAYERS * per_layer + WIDTH
    count += CONTEXT * WIDTH // HEADS + (VOCAB * WIDTH if vocab < 0 else 0)
    if values is None:  # all different, and of a size whose logits can be compared
        values = (np.arange(count) / count - 0.5).astype("<f4")
    header = struct.pack("<7i", WIDTH, INNER, LAYERS, HEADS, KV, vocab, CONTEXT)
    path.write_bytes((header + values.tobytes())[:cut])
    return values


@pytest.mark.parametrize("tied", [True, False])
def test_rows_land_where_they_belong(tied, tmp_path):
    values = write(tmp_path / "model.bin", VOCAB if tied else -VOCAB)
    report = weights.convert(tmp_path / "model.bin", tmp_path / "out")
    assert report.transformers_used in (True, False)
    model = weights.load(tmp_path / "out")
    assert model.config.tie_embeddings is tied
    embedding = values[: VOCAB * WIDTH].reshape(VOCAB, WIDTH)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], embedding)
    if not tied:
        head = values[-VOCAB * WIDTH :].reshape(VOCAB, WIDTH).T
        np.testing.assert_array_equal(model.params["head"]["kernel"], head)
    start = VOCAB * WIDTH + LAYERS * WIDTH
    stacked = values[start : start + LAYERS * WIDTH * WIDTH]
    theirs = stacked.reshape(LAYERS, HEADS, 2, 2, WIDTH)  # pair, member of the pair
    ours = theirs.swapaxes(2, 3).reshape(LAYERS, HEADS, 4, WIDTH)
    query = np.moveaxis(
        np.asarray(model.params["layers"]["attention"]["q"]["kernel"]), 1, 3
    )
    np.testing.assert_array_equal(query, ours)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "does not begin with a llama2.c header"),
        (b"PK\x03\x04" + b"\0" * 100, "pickled `.bin`"),
        (struct.pack("<8I", 0x616B3432, *[1] * 7), "version 1 or newer"),
        (struct.pack("<7i", 8, 12, 2, 3, 1, 11, 6), "contradict each other"),
    ],
)
def test_other_files_are_refused(content, match, tmp_path):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=match):
        weights.convert(tmp_path / "model.bin", tmp_path / "out")


def test_truncated_file(tmp_path):
    write(tmp_path / "model.bin", VOCAB, cut=-4)
    with pytest.raises(weights.WeightsError, match="truncated"):
        weights.convert(tmp_path / "model.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
