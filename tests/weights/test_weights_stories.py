"""The real stories260K weights against their published reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import assert_same_params

from jaxpost import ops, weights


@pytest.fixture(scope="module")
def stories(request):
    place = request.getfixturevalue("shared_data") / "weights" / "stories260K"
    if not place.is_dir():
        pytest.skip("real weights not found: stories260K")
    return place


@pytest.fixture(scope="module")
def reference(stories):
    return json.loads((stories / "reference.json").read_text(encoding="utf-8"))


def logits_of(model, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)[None, :]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    hidden = model.apply(model.params, tokens, positions).hidden
    return ops.logits(hidden, model.unembed(model.params))[0]


def test_token_losses_and_last_logits(stories, reference):
    model = weights.load(stories)
    logits = logits_of(model, reference["probe_ids"])
    targets = jnp.asarray(reference["probe_ids"][1:])
    nll = -ops.token_logps(logits[:-1], targets)
    np.testing.assert_allclose(nll, reference["probe_nll"], atol=1e-4)
    last = reference["last_position_logits"]
    np.testing.assert_allclose(logits[-1], last, atol=1e-3)


def test_greedy_continuation(stories, reference):
    model = weights.load(stories)
    wanted = reference["greedy_ids"]  # from the first token on
    length = len(wanted)
    tokens = jnp.zeros((1, length), jnp.int32).at[0, 0].set(wanted[0])
    positions = jnp.arange(length, dtype=jnp.int32)[None, :]

    def step(index, tokens):
        hidden = model.apply(model.params, tokens, positions).hidden
        logits = ops.logits(hidden[:, index - 1], model.unembed(model.params))
        return tokens.at[0, index].set(jnp.argmax(logits[0]).astype(jnp.int32))

    tokens = jax.jit(lambda x: jax.lax.fori_loop(1, length, step, x))(tokens)
    assert tokens[0].tolist() == wanted


def test_convert_from_llama2c_gives_the_reference_folder(stories, tmp_path):
    report = weights.convert(stories / "stories260K.bin", tmp_path / "out")
    assert report.max_logit_difference == 0.0
    assert report.parameters == 260032
    first, second = weights.load(stories), weights.load(tmp_path / "out")
    assert first.config == second.config
    assert_same_params(first.params, second.params)
    assert weights.special_ids(tmp_path / "out").eos == (2,)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "export_report.json", "config.json"} <= names


def test_convert_keeps_tokenizer_and_ids_and_narrows(stories, tmp_path):
    report = weights.convert(
        stories, tmp_path / "out", dtype="bfloat16", max_shard_bytes=200_000
    )
    assert report.dtypes == ("bfloat16",)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert weights.special_ids(tmp_path / "out")[:2] == (1, (2,))
    original = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "out/tokenizer.json").read_text(encoding="utf-8"))
    assert written["model"]["vocab"] == original["model"]["vocab"]


def test_convert_refuses_to_overwrite_its_source(stories, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((stories / file).read_bytes())
    with pytest.raises(weights.WeightsError, match="folder of the source"):
        weights.convert(tmp_path, tmp_path)
