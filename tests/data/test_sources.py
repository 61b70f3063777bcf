"""Names of sources: files, Parquet, hub, built-in data, and fingerprints."""

import re

import pytest

from jaxpost import data


def columns_of(rows):
    return [row.columns for row in rows]


def test_jsonl_by_name(write):
    path = write([{"text": "a"}, b"?"])
    report = data.BadRows()
    rows = data.read_rows(path, on_bad_row="skip", report=report)
    assert columns_of(rows) == [{"text": "a"}]
    assert report.total == 1
    assert report.rows == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "gone.jsonl: no such file; give a .jsonl"),
        ("owner/gone.jsonl", "no such file"),
        ("a/b/c", "no such file"),
    ],
)
def test_missing_files(name, message):
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        data.read_rows(name)


def test_folder_and_unknown_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder"):
        data.read_rows(tmp_path)
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(data.DataError, match=r"unknown kind of file; .*\.parquet"):
        data.read_rows(tmp_path / "rows.csv")


def test_parquet(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.parquet"
    messages = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ]
    parquet.write_table(pa.table({"messages": messages, "n": [3]}), path)
    report = data.BadRows()
    (row,) = data.read_rows(path, report=report)
    assert row.columns == {"messages": messages[0], "n": 3}
    assert report.rows == 1
    path.write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(data.DataError, match="not a readable Parquet file"):
        list(data.read_rows(path))


def test_hub_name_that_cannot_be_had(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, **settings):
        asked.append((name, settings))
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        data.DataError, match=r"owner/name: no local file .*no route.*'x'"
    ):
        data.read_rows("owner/name", split="x")
    # Never with trust_remote_code.
    assert asked == [("owner/name", {"split": "x"})]


def test_builtin_with_options():
    first = columns_of(data.read_rows("builtin:arithmetic?count=4&grades=1,2&seed=3"))
    assert [row["grade"] for row in first] == [1, 2, 1, 2]
    assert first == columns_of(
        data.read_rows("builtin:arithmetic?seed=3&grades=1,2&count=4", split="train")
    )
    test = columns_of(data.read_rows("builtin:arithmetic?count=4", split="test"))
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in test}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:arithmetik", "did you mean 'arithmetic'"),
        (
            "builtin:",
            "builtin:arithmetic, builtin:arithmetic_negatives, "
            "builtin:arithmetic_pairs, builtin:python",
        ),
        ("builtin:arithmetic?grade=1", "no option 'grade' .did you mean 'grades'"),
        ("builtin:arithmetic?count", "cannot read the options 'count'"),
        ("builtin:arithmetic?grades=9", "builtin:arithmetic.grades=9: grades must"),
        ("builtin:arithmetic?count=many", "builtin:arithmetic.count=many: "),
    ],
)
def test_builtin_errors(source, message):
    with pytest.raises(data.DataError, match=message):
        data.read_rows(source)


def test_no_rows_is_an_error():
    with pytest.raises(data.DataError, match="the source holds no rows"):
        list(data.read_rows("builtin:arithmetic?count=0"))


def test_fingerprints(write):
    path = write([{"text": "a"}])
    first = data.fingerprint(path)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert data.fingerprint(path) == first
    assert data.fingerprint(path, settings={"limit": 3}) != first
    path.write_text('{"text": "b"}\n')
    assert data.fingerprint(path) != first
    sources = ["builtin:arithmetic?count=5", "builtin:arithmetic?count=5&seed=1"]
    prints = {data.fingerprint(source) for source in sources}
    prints |= {data.fingerprint(sources[0], split="test")}
    assert len(prints) == 3
    assert data.fingerprint(sources[0]) in prints


def test_load_rows_names_columns_and_limits(write):
    lines = [{"q": str(k), "a": "b"} if k != 1 else {"q": "1"} for k in range(5)]
    report = data.BadRows()
    rows = data.load_rows(
        write(lines),
        columns={"prompt": "q", "completion": "a"},
        on_bad_row="skip",
        report=report,
        limit=2,
    )
    assert [row.number for row in rows] == [1, 3]
    assert report.counts == {"wrong_column": 1}
