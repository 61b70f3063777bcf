"""A base model and one that differs from it as if fine-tuned, and their tokenizer."""

import pathlib

import jax

from jaxpost import data, models, weights

TRAIN = "builtin:arithmetic?count=24&grades=1"


def save_pair(root: pathlib.Path) -> dict[str, str]:
    """Folders of `base` and `sft`, whose tokenizer knows the words of `TRAIN`."""
    texts = [
        row.columns[name]
        for row in data.load_rows(TRAIN)
        for name in ("prompt", "completion")
    ]
    tokenizer = data.train_word_tokenizer(texts)
    config = models.DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size + tokenizer.vocab_size % 2,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
        tie_embeddings=False,
    )
    base = models.build(config, jax.random.key(5))
    head = base.params["head"]["kernel"]
    # Logits that differ by about 0.8, so that rewards are well above their noise.
    tuned = head + 0.2 * jax.random.normal(jax.random.key(6), head.shape)
    for name, kernel in (("base", head), ("sft", tuned)):
        model = base.replace(params=base.params | {"head": {"kernel": kernel}})
        weights.save(model, root / name, tokenizer=tokenizer)
    return {name: str(root / name) for name in ("base", "sft")}
