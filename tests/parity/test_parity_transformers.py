"""The same weights in jaxpost and in transformers (torch on CPU, float32, eager).

Each case is a random tiny model made by transformers, saved by it, and read by
`weights.load`: so names, layouts, configuration and arithmetic are compared together.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops, weights

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
with warnings.catch_warnings():
    # Deprecations inside transformers' own modules are not ours to fix.
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 61,
    "hidden_size": 28,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 10, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3],
    "long_factor": [1.7, 4.0],
}
CASES = {
    "llama2": {"model_type": "llama"},
    "llama_wide_heads": {"model_type": "llama", **WIDE},
    "llama_tied_biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "llama31_rope": {
        "model_type": "llama",
        **WIDE,
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
    },
    "llama_linear_rope": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "mistral_window": {"model_type": "mistral", "sliding_window": 6, **WIDE},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen2_yarn": {
        "model_type": "qwen2",
        **WIDE,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1e4,
        },
    },
    "qwen3": {"model_type": "qwen3", **WIDE},
    "phi3": {"model_type": "phi3", "sliding_window": 6},
    "phi3_longrope_short": {
        "model_type": "phi3",
        "rope_scaling": LONG,
        "original_max_position_embeddings": 64,
    },
    "phi3_longrope_long": {
        "model_type": "phi3",
        "rope_scaling": LONG,
        "original_max_position_embeddings": 12,
    },
    "gemma2": {
        "model_type": "gemma2",
        **WIDE,
        "sliding_window": 6,
        "query_pre_attn_scalar": 13,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
}
LENGTH = 19  # longer than the windows
PADS = 5
# Each case compiles for a few milliseconds of work; this halves the compile time.
QUICK = {"xla_backend_optimization_level": 0}


class Case:
    """One family in both libraries."""

    def __init__(self, name: str, folder):
        fields = {**SIZES, **CASES[name]}
        if fields["model_type"] == "qwen3":
            fields["attention_bias"] = True
        torch.manual_seed(0)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.theirs = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                # Larger than any initialisation, so that windows, caps and rotary
                # settings show in the logits; norms and biases are random too.
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        self.theirs.save_pretrained(folder)
        self.ours = weights.load(folder)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def tokens_of(batch: int, length: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).integers(3, 61, (batch, length))
    return draw.astype(np.int32)


def our_logits(model, params, tokens, segments=None):
    if segments is None:
        segments = np.ones_like(tokens)
    positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
    hidden = model.apply(params, tokens, positions, segments).hidden
    return ops.logits(hidden, model.unembed(params))


def their_logits(model, tokens, mask=None):
    tokens = torch.from_numpy(tokens.astype(np.int64))
    if mask is None:
        return model(tokens, use_cache=False).logits
    mask = torch.from_numpy(mask.astype(np.int64))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(
        tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits


def test_logits(case):
    tokens = tokens_of(2, LENGTH)
    with torch.no_grad():
        expected = their_logits(case.theirs, tokens).numpy()
    found = our_logits(case.ours, case.ours.params, tokens)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(case, side):
    tokens = tokens_of(2, LENGTH)
    mask = np.ones_like(tokens)
    mask[1, slice(None, PADS) if side == "left" else slice(-PADS, None)] = 0
    with torch.no_grad():
        expected = their_logits(case.theirs, tokens, mask).numpy()
    found = np.asarray(our_logits(case.ours, case.ours.params, tokens, mask))
    kept = mask.astype(bool)
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-4, rtol=0)


def test_loss_gradients(case):
    tokens = tokens_of(2, LENGTH, seed=1)
    case.theirs.zero_grad()
    logits = their_logits(case.theirs, tokens)
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), targets.reshape(-1)
    )
    loss.backward()

    def our_loss(params):
        scores = our_logits(case.ours, params, tokens)[:, :-1]
        return -jnp.mean(ops.token_logps(scores, jnp.asarray(tokens[:, 1:])))

    gradient_of = jax.jit(jax.value_and_grad(our_loss), compiler_options=QUICK)
    value, grads = gradient_of(case.ours.params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    found = dict(weights.hf_tensors(case.ours.config, grads))
    expected = {
        name: parameter.grad.numpy()
        for name, parameter in case.theirs.named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the tensor's largest entry: single entries may cancel to nothing,
        # and a key bias has no gradient at all (softmax ignores what all keys share).
        scale = max(np.abs(gradient).max(), 1e-3)
        difference = np.abs(found[name] - gradient).max()
        assert difference <= 1e-4 * scale, f"{name}: {difference} of {scale}"


def test_round_trip_through_our_files(case, tmp_path):
    params = jax.tree.map(lambda x: x * 1.01, case.ours.params)
    model = case.ours.replace(params=params)
    weights.save(model, tmp_path / "out", max_shard_bytes=20_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    tokens = tokens_of(2, LENGTH, seed=2)
    with torch.no_grad():
        expected = their_logits(theirs.eval(), tokens).numpy()
    found = our_logits(model, params, tokens)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=0)


def test_verify_export_asks_transformers(tmp_path):
    case = Case("gemma2", tmp_path / "theirs")
    weights.save(case.ours, tmp_path / "ours")
    report = weights.verify_export(case.ours, tmp_path / "ours")
    assert report.transformers_used
    assert report.transformers_max_logit_difference is not None
    assert report.transformers_max_logit_difference <= 1e-4
    assert report.versions["transformers"] == transformers.__version__


def test_stories_agree_through_convert(shared_data, tmp_path):
    source = shared_data / "weights" / "stories260K" / "stories260K.bin"
    if not source.is_file():
        pytest.skip("real weights not found: stories260K.bin")
    report = weights.convert(source, tmp_path / "out")
    assert report.transformers_used
    assert report.transformers_max_logit_difference is not None
    assert report.transformers_max_logit_difference <= 1e-4
