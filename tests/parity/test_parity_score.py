"""Reward models here and as transformers' sequence classifiers (torch, float32)."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import models, ops, weights

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
with warnings.catch_warnings():
    # Deprecations inside transformers' own modules are not ours to fix.
    warnings.simplefilter("ignore")
    from transformers import AutoConfig, AutoModelForSequenceClassification

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_labels": 1,
}
CASES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 10},
    "phi3": {},
    "gemma2": {"head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 13},
}
LENGTHS = (19, 14, 18, 1)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A random classifier of transformers, and what we read of its files."""
    assert set(CASES) == set(weights.FAMILIES)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **CASES[request.param])
    theirs = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, weights.load(folder)


def batch(side="right"):
    """Tokens and mask; the last real token of one row is the end token."""
    draw = np.random.default_rng(0).integers(3, 61, (len(LENGTHS), max(LENGTHS)))
    tokens, mask = np.zeros_like(draw), np.zeros_like(draw)
    for row, length in enumerate(LENGTHS):
        start = 0 if side == "right" else max(LENGTHS) - length
        tokens[row, start : start + length] = draw[row, :length]
        mask[row, start : start + length] = 1
    tokens[0, -1] = 2
    return tokens.astype(np.int32), mask.astype(np.int32)


def our_scores(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
    hidden = model.apply(model.params, tokens, positions, mask).hidden
    return models.scores(
        model.params, ops.last_token(hidden, jnp.asarray(mask.astype(bool)))
    )


def their_scores(model, tokens, mask):
    mask = torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        logits = model(
            torch.from_numpy(tokens.astype(np.int64)),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    assert logits.shape == (len(tokens), 1)
    return logits[:, 0].numpy()


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_of_their_checkpoint(pair, side):
    theirs, ours = pair
    assert ours.config.head == "score"
    tokens, mask = batch(side)
    expected = their_scores(theirs, tokens, mask)
    assert np.ptp(expected) > 0.1
    found = our_scores(ours, tokens, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_scores_of_our_export(pair, tmp_path):
    _, ours = pair
    ours = ours.replace(params=jax.tree.map(lambda x: 1.01 * x, ours.params))
    weights.save(ours, tmp_path / "out", generation_config={"pad_token_id": 0})
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    tokens, mask = batch()
    expected = their_scores(theirs.eval(), tokens, mask)
    found = our_scores(ours, tokens, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    report = weights.verify_export(ours, tmp_path / "out", with_transformers=True)
    assert report.transformers_max_logit_difference is not None
    assert report.transformers_max_logit_difference <= 1e-4


def test_peft_reads_the_adapter_and_its_head(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `parity`")
    config = AutoConfig.for_model("llama", **SIZES)
    base = AutoModelForSequenceClassification.from_config(config)
    base.save_pretrained(tmp_path / "base")
    model = models.add_lora(
        weights.load(tmp_path / "base"), models.LoraConfig(rank=2), jax.random.key(0)
    )
    trained, frozen = models.split_trained(model.params)
    draw = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), x.dtype), trained
    )
    model = model.replace(params=ops.join_trees(frozen, trained))
    weights.save_adapter(model, tmp_path / "a", base_name=str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        str(tmp_path / "a"), num_labels=1
    ).eval()
    tokens, mask = batch()
    expected = their_scores(theirs, tokens, mask)
    found = our_scores(model, tokens, mask)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "b")
    back = weights.load_adapter(weights.load(tmp_path / "base"), tmp_path / "b")
    np.testing.assert_allclose(our_scores(back, tokens, mask), found, atol=1e-5)
