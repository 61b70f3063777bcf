"""TRL's columns: kinds, renaming, Alpaca and ShareGPT, and their errors."""

import pytest

from jaxpost import data

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"messages": [ASK, SAY]}, "messages"),
        ({"prompt": "a"}, "prompt"),
        ({"prompt": "a", "completion": "b", "answer": 3}, "prompt_completion"),
        ({"prompt": [ASK], "completion": [SAY]}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"prompt": "a", "completion": "b", "label": 3}, "prompt_completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [ASK, SAY], "rejected": [ASK, ASK]}, "implicit_preference"),
        ({"text": "a", "prompt": None, "completion": None}, "text"),
    ],
)
def test_kinds(row, columns, kind):
    assert data.row_kind(data.normalize_row(row(**columns))) == kind


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"txt": "a"},
            r"row 3: has the columns 'txt'.*'txt' \(did you mean 'text'\?\)",
        ),
        ({"completion": "a"}, "'completion' needs 'prompt' beside it"),
        ({"chosen": "a"}, "'chosen' needs 'rejected'"),
        ({}, "has the columns none"),
    ],
)
def test_wrong_columns(row, columns, message):
    with pytest.raises(data.BadRow, match=message) as raised:
        data.row_kind(data.normalize_row(row(**columns)))
    assert raised.value.reason == "wrong_column"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": 3}, "'text' is int 3 where a string is expected"),
        ({"text": [ASK]}, "'text' is list .* where a string"),
        ({"prompt": {"a": 1}}, "'prompt' is dict .* string or a list of {role, conte"),
        ({"messages": "hi"}, "'messages' is str 'hi' where a list of {role, content}"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": ["hi"]}, r"'messages\[0\]' is str 'hi' where {role, content}"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "did you mean 'user'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content' is NoneType None"),
        (
            {"messages": [ASK, {"role": "assistant", "content": 4}]},
            r"\[1\].content' is",
        ),
        ({"prompt": "a", "completion": "b", "label": "true"}, "'label' is str 'true'"),
        ({"text": list(range(99))}, r"\[0, 1, 2.*\.\.\. where"),
    ],
)
def test_wrong_types(row, columns, message):
    with pytest.raises(data.BadRow, match=message) as raised:
        data.normalize_row(row(**columns))
    assert raised.value.reason == "wrong_type"


def test_tool_calls_need_no_content(row):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert data.normalize_row(row(messages=[ASK, call])).columns["messages"][1] == call


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "question", "completion": "answer"},
        {"question": "prompt", "answer": "completion"},
    ],
)
def test_columns_are_renamed_either_way_round(row, columns):
    result = data.normalize_row(row(question="q", answer="a", id=7), columns=columns)
    assert result.columns == {"prompt": "q", "completion": "a", "id": 7}


def test_renaming_replaces_what_had_the_name(row):
    result = data.normalize_row(row(prompt="old", q="new"), columns={"prompt": "q"})
    assert result.columns == {"prompt": "new"}


def test_renaming_errors(row):
    with pytest.raises(
        data.BadRow, match=r"no column 'quest' .did you mean 'question'"
    ):
        data.normalize_row(row(question="q"), columns={"prompt": "quest"})
    with pytest.raises(ValueError, match="neither 'x' nor 'y' is one of text"):
        data.normalize_row(row(x="q"), columns={"x": "y"})


def test_alpaca(row):
    made = data.normalize_row(
        row(instruction="add", input="2 2", output="4"), format="alpaca"
    )
    assert made.columns == {
        "prompt": [{"role": "user", "content": "add\n\n2 2"}],
        "completion": [{"role": "assistant", "content": "4"}],
    }
    made = data.normalize_row(
        row(instruction="a", input="", output="b"), format="alpaca"
    )
    assert made.columns["prompt"][0]["content"] == "a"
    with pytest.raises(data.BadRow, match=r"no column 'output'.*'outputs'.*'alpaca'"):
        data.normalize_row(row(instruction="a", outputs="b"), format="alpaca")
    with pytest.raises(data.BadRow, match="'input' is int 3"):
        data.normalize_row(row(instruction="a", input=3, output="b"), format="alpaca")


def test_sharegpt(row):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    made = data.normalize_row(row(conversations=turns, system="S"), format="sharegpt")
    system = {"role": "system", "content": "S"}
    assert made.columns == {"messages": [system, ASK, SAY]}
    no = {"from": "gpt", "value": "no"}
    made = data.normalize_row(
        row(conversations=turns[:1], chosen=turns[1], rejected=no), format="sharegpt"
    )
    assert made.columns["prompt"] == [ASK]
    assert made.columns["chosen"] == [SAY]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"conversation": []}, "no column 'conversations'.*did you mean"),
        (
            {"conversations": "a"},
            "'conversations' is str 'a' where a list of {from, va",
        ),
        ({"conversations": [{"role": "a"}]}, "where {from, value} is expected"),
        ({"conversations": [{"from": "cat", "value": ""}]}, "the speaker 'cat'"),
        ({"conversations": [], "chosen": {"from": "gpt", "value": "a"}}, "'rejected'"),
    ],
)
def test_sharegpt_errors(row, columns, message):
    with pytest.raises(data.BadRow, match=message):
        data.normalize_row(row(**columns), format="sharegpt")


def test_unknown_format(row):
    with pytest.raises(ValueError, match=r"format must be .*did you mean 'alpaca'"):
        data.normalize_row(row(text="a"), format="alpacca")


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", "a", "b")),
        (
            {"chosen": "the cat sat", "rejected": "the cat ran"},
            ("the cat", " sat", " ran"),
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: yes",
                "rejected": "\n\nHuman: q\n\nAssistant: yellow",
            },
            ("\n\nHuman: q\n\nAssistant:", " yes", " yellow"),
        ),
        ({"chosen": [ASK, SAY], "rejected": [ASK, ASK]}, ([ASK], [SAY], [ASK])),
        (
            {"prompt": "hi", "chosen": [ASK, SAY], "rejected": [ASK, ASK]},
            ([ASK], [SAY], [ASK]),
        ),
    ],
)
def test_preferences_are_split(row, columns, parts):
    assert data.split_preference(row(**columns)) == parts


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": "a"}, "wrong_column"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equal_pair"),
        ({"chosen": "a", "rejected": [ASK]}, "wrong_type"),
    ],
)
def test_preference_errors(row, columns, reason):
    with pytest.raises(data.BadRow, match="row 3") as raised:
        data.split_preference(row(**columns))
    assert raised.value.reason == reason


def test_prompt_suffix(row):
    made = data.normalize_row(row(prompt="q", completion="a"), prompt_suffix="\n")
    assert made.columns["prompt"] == "q\n"
    made = data.normalize_row(row(prompt=[ASK], completion=[SAY]), prompt_suffix="\n")
    assert made.columns["prompt"] == [ASK]
