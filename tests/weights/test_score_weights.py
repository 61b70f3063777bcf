"""Reward models as sequence classifiers in Hugging Face layout, both ways."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_families import CONFIGS, assert_same_params, build

from jaxpost import models, parallel, weights

PADDED = {"pad_token_id": 0}


def scored(name):
    model = models.add_score_head(build(CONFIGS[name]), jax.random.key(1))
    kernel = 10.0 * model.params["score"]["kernel"]
    return model.replace(params=model.params | {"score": {"kernel": kernel}})


@pytest.mark.parametrize("name", CONFIGS)
def test_each_family_returns_bit_for_bit(name, tmp_path):
    model = scored(name)
    weights.save(model, tmp_path / "out", generation_config=PADDED)
    back = weights.load(tmp_path / "out")
    assert back.config.head == "score"
    assert back.config.tie_embeddings == model.config.tie_embeddings
    assert_same_params(model.params, back.params)


def test_the_files_are_what_transformers_writes(tmp_path):
    model = scored("qwen3")
    weights.save(model, tmp_path / "out", generation_config=PADDED)
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["architectures"] == ["Qwen3ForSequenceClassification"]
    assert fields["num_labels"] == 1
    assert fields["pad_token_id"] == 0
    file = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in file
    kernel = np.asarray(model.params["score"]["kernel"])
    np.testing.assert_array_equal(file["score.weight"], kernel.T)


def test_another_librarys_config_is_understood(tmp_path):
    """transformers writes id2label only, and not of how many labels."""
    weights.save(scored("llama"), tmp_path, generation_config=PADDED)
    fields = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_labels", "problem_type"):
        del fields[key]
    fields["id2label"], fields["label2id"] = {"0": "score"}, {"score": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert weights.load(tmp_path).config.head == "score"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 3, "id2label": None},
        {"id2label": {"0": "bad", "1": "good"}},
        {"num_labels": None, "id2label": None},
    ],
)
def test_several_labels_are_refused(changes):
    config = models.add_score_head(build(CONFIGS["llama"]), jax.random.key(0)).config
    fields = weights.to_hf_config(config) | changes
    with pytest.raises(weights.WeightsError, match=r"with [23] labels .*no reward"):
        weights.from_hf_config(fields)


def test_what_cannot_be_read_back_right_is_refused(tmp_path):
    with pytest.raises(weights.WeightsError, match="pad_token_id"):
        weights.save(scored("llama"), tmp_path / "no_pad")
    assert not (tmp_path / "no_pad").exists()
    weights.save(scored("llama"), tmp_path / "out", generation_config=PADDED)
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    headless = {k: v for k, v in tensors.items() if k != "score.weight"}
    save_file(headless, file)
    with pytest.raises(weights.WeightsError, match="1 missing: score.weight"):
        weights.load(tmp_path / "out")
    save_file(tensors | {"score.weight": np.zeros((2, 20), np.float32)}, file)
    with pytest.raises(weights.WeightsError, match=r"score.weight is \[2, 20\]"):
        weights.load(tmp_path / "out")


def test_the_receipt_compares_scores(tmp_path):
    model = scored("llama")
    weights.save(model, tmp_path / "out", generation_config=PADDED)
    report = weights.verify_export(model, tmp_path / "out", with_transformers=False)
    assert report.max_logit_difference == 0.0
    assert report.max_logit > 0.01
    params = model.params | {
        "score": {"kernel": model.params["score"]["kernel"] + 0.01}
    }
    with pytest.raises(weights.WeightsError, match="differ from those of the model"):
        weights.verify_export(
            model.replace(params=params), tmp_path / "out", with_transformers=False
        )


def test_convert_keeps_the_head(tmp_path):
    model = scored("qwen2")
    weights.save(model, tmp_path / "out", generation_config=PADDED)
    weights.convert(tmp_path / "out", tmp_path / "again", dtype="float32")
    assert_same_params(model.params, weights.load(tmp_path / "again").params)


def test_it_is_placed_on_a_mesh(tmp_path):
    config = CONFIGS["llama"].replace(hidden_size=24, vocab_size=64)
    model = models.add_score_head(build(config), jax.random.key(1))
    weights.save(model, tmp_path / "out", generation_config=PADDED)
    mesh = parallel.make_mesh({"fsdp": 8})
    back = weights.load(tmp_path / "out", mesh=mesh)
    assert_same_params(model.params, back.params)
    kernel = back.params["score"]["kernel"]
    assert kernel.sharding.shard_shape((24, 1)) == (3, 1)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("onto", ["language model", "reward model"])
def test_adapters_bring_their_head_along(name, onto, tmp_path):
    base = build(CONFIGS[name])
    lora = models.LoraConfig(rank=2, targets=("q", "v"))
    model = models.add_lora(base, lora, jax.random.key(0))
    model = models.add_score_head(model, jax.random.key(1))
    weights.save_adapter(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS"
    assert fields["modules_to_save"] == ["score"]
    if onto == "reward model":
        base = models.add_score_head(base, jax.random.key(5))
    again = weights.load_adapter(base, tmp_path / "a")
    assert again.config == model.config
    assert_same_params(again.params, model.params)
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    score = tensors.pop("base_model.model.score.weight")
    assert score.shape == (1, model.config.hidden_size)
    save_file(tensors, file)
    with pytest.raises(weights.WeightsError, match=r"1 missing: .*score.weight"):
        weights.load_adapter(base, tmp_path / "a")
    save_file(tensors | {"base_model.model.score.weight": score.T}, file)
    with pytest.raises(weights.WeightsError, match=r"score.weight is \[\d+, 1\]"):
        weights.load_adapter(base, tmp_path / "a")
