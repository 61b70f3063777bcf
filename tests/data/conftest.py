"""Small tokenizers made on the spot, of the kinds that differ at borders."""

import gzip
import json
import pathlib

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxpost import data

CORPUS = [
    "Question: what is 2 + 2? Answer: the answer is 4.",
    "hello there, how are you? I am fine, thank you.",
    "system user assistant\nHello world\nBye now\n",
]


@pytest.fixture(scope="session")
def word_tokenizer():
    """Words to ids, split at blanks: a=1, b=2, ... f=6; `</s>` 0 ends."""
    words = {"</s>": 0, **{word: k for k, word in enumerate("abcdef", start=1)}}
    backend = Tokenizer(models.WordLevel({**words, "<unk>": 7}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    return data.make_tokenizer(backend, {"eos_token_id": 0})


@pytest.fixture(scope="session")
def byte_tokenizer():
    """GPT-2's kind: bytes, blanks at the front of words, ChatML tokens, no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return data.make_tokenizer(
        backend,
        {"eos_token_id": 2, "pad_token_id": 0},
        chat_template="chatml",
    )


@pytest.fixture(scope="session")
def bos_tokenizer():
    """Llama's kind: a blank before every text, BOS put by the tokenizer itself."""
    alphabet = sorted(set("".join(CORPUS)) - {" "} | {"\u2581", "\n"})
    pieces = ["<unk>", "<s>", "</s>", *alphabet, "\u2581t", "\u2581th", "\u2581the"]
    backend = Tokenizer(
        models.BPE(
            {piece: k for k, piece in enumerate(pieces)},
            [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")],
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")]
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return data.make_tokenizer(backend, ids, chat_template="plain")


@pytest.fixture
def row():
    """Makes a row of the columns given."""
    return lambda **columns: data.Row(columns, "rows.jsonl", 3)


@pytest.fixture
def write(tmp_path):
    """Writes lines (objects, text or bytes) to a file, gzipped if so named."""

    def write(lines, name="rows.jsonl") -> pathlib.Path:
        path = tmp_path / name
        parts = []
        for line in lines:
            if not isinstance(line, str | bytes):
                line = json.dumps(line)
            parts.append(line.encode() if isinstance(line, str) else line)
        body = b"".join(part + b"\n" for part in parts)
        path.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
        return path

    return write
