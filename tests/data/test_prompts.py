"""Prompts without answers: tokens as trained with, columns kept, problems named."""

import json

import numpy as np
import pytest

from jaxpost import data


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_word_tokenizer(["how many pears are there now 1 2 3"])


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_stay_with_the_prompt(tmp_path, tokenizer):
    rows = [
        {"prompt": "how many pears", "answer": 3, "level": "easy"},
        {"prompt": "how many", "completion": " now", "answer": 1},
    ]
    found = data.load_prompts(write(tmp_path, *rows), tokenizer)
    assert [prompt.columns for prompt in found] == rows
    for prompt, row in zip(found, rows, strict=True):
        text = data.Row(row, "x", 1)
        assert prompt.tokens.tolist() == data.encode_prompt(text, tokenizer)
        assert not prompt.texts[0].loss_mask.any()
    assert found[0].id != found[1].id
    numbered = data.number_prompts(found)
    assert [int(row["number"]) for row in numbered] == [0, 1]
    ids = data.join_ids(np.stack([row["example_id"] for row in numbered]))
    assert ids.tolist() == [prompt.id for prompt in found]


def test_a_prompt_that_is_too_long_is_named(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "how many pears are there now"})
    with pytest.raises(data.BadRow, match=r"row 1.*tokens, more than max_length 3"):
        data.load_prompts(path, tokenizer, max_length=3)


def test_a_prompt_is_never_cut(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "how many"})
    with pytest.raises(ValueError, match="asks something else"):
        data.load_prompts(path, tokenizer, on_too_long="truncate")
