"""The word tokenizer: whole words, single digits, nothing unknown, text comes back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data import load_tokenizer
from jaxpost.data._arithmetic import arithmetic_rows
from jaxpost.data._train_tokenizer import train_word_tokenizer


@pytest.fixture(scope="module")
def texts():
    rows = arithmetic_rows("train", count=400)
    return [row["prompt"] + row["completion"] for row in rows]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_word_tokenizer(texts, vocab_size=800)


def test_words_are_tokens_and_digits_stand_alone(tokenizer):
    ids = tokenizer.encode("Mia has 23 + 4 = 27 apples.\n#### 27")
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces == [
        *("Mia", " has", " 2", "3", " +", " 4", " =", " 2", "7", " apples", ".", "\n"),
        *("####", " 2", "7"),
    ]
    vocabulary = tokenizer.backend.get_vocab()
    assert not [word for word in vocabulary if sum(c.isdigit() for c in word) > 1]


def test_problems_come_back_exactly(tokenizer):
    for row in arithmetic_rows("test", count=200, seed=4):
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_exactly(text):
    tokenizer = _plain()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _plain():
    return train_word_tokenizer(["one two two"], vocab_size=300)


def test_prompt_and_completion_meet_at_a_token_boundary(tokenizer):
    row = next(arithmetic_rows("train", count=1))
    apart = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["completion"])
    assert apart == tokenizer.encode(row["prompt"] + row["completion"])


def test_saved_and_loaded_again(tokenizer, tmp_path, texts):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(texts[0]) == tokenizer.encode(texts[0])
    assert (loaded.bos_id, loaded.eos_ids, loaded.pad_id) == (0, (1,), 2)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.fingerprint() == tokenizer.fingerprint()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<eos>"


def test_commonest_words_first_and_no_more_than_asked():
    tokenizer = train_word_tokenizer(["a bb bb bb cc cc dd"], vocab_size=261)
    assert tokenizer.vocab_size == 261
    assert len(tokenizer.encode(" bb cc")) == 2
    assert len(tokenizer.encode(" dd")) == 3
    assert train_word_tokenizer(["a bb bb"], vocab_size=5000).vocab_size == 260


def test_same_texts_same_tokenizer(texts):
    first, second = (train_word_tokenizer(texts, vocab_size=500) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        train_word_tokenizer(["a"], vocab_size=100)
    with pytest.raises(ValueError, match="three distinct"):
        train_word_tokenizer(["a"], specials=("<s>", "<s>", "<pad>"))
