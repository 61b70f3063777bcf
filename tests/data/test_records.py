"""The JSONL reader: every way a line can be bad, and bounded memory."""

import gzip
import json
import time
import tracemalloc

import pytest

from jaxpost import data

GOOD = {"text": "a"}
BAD_LINES = {
    "not_json": (b'{"text": "a"', r"row 2: not valid JSON .*one JSON object per line"),
    "nan": (b'{"text": "a", "x": NaN}', "row 2: not valid JSON .NaN is not"),
    "digits": (b'{"x": ' + b"1" * 5000 + b"}", "row 2: not valid JSON .Exceeds"),
    "deep": (b'{"x": ' + b"[" * 10**5, "row 2: not valid JSON"),
    "not_object": (b'["a"]', "row 2: a JSON array where an object is expected"),
    "null": (b"null", "row 2: a JSON null where"),
    "duplicate_key": (b'{"text": "a", "text": "b"}', "row 2: the key 'text' occurs tw"),
    "not_utf8": (b'{"text": "\xe9"}', r"row 2: byte 0xe9 at offset 10 .*latin1"),
    "byte_order_mark": (b'\xef\xbb\xbf{"text": "a"}', "row 2: .*byte order mark"),
    "bad_unicode": (b'{"text": "\\ud800"}', "row 2: column 'text' holds half of a"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("file", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_bad_line_stops_or_is_skipped(write, name, file):
    line, message = BAD_LINES[name]
    path = write([GOOD, line, GOOD], file)
    with pytest.raises(data.BadRow, match=message) as raised:
        list(data.read_jsonl(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    report = data.BadRows()
    rows = list(data.read_jsonl(path, on_bad_row="skip", report=report))
    assert [row.number for row in rows] == [1, 3]
    assert report.counts == {raised.value.reason: 1}
    assert report.rows == 3
    assert report.lines == [str(raised.value)]


def test_report_counts_on_but_keeps_few_lines(write):
    heard = []
    report = data.BadRows(keep=2, emit=heard.append)
    path = write([GOOD, *[b"?"] * 5, b"[]"])
    list(data.read_jsonl(path, on_bad_row="skip", report=report))
    assert report.total == 6
    assert heard == report.lines
    assert len(heard) == 2
    assert report.metrics() == {
        "data/bad_rows": 6.0,
        "data/bad_rows/not_json": 5.0,
        "data/bad_rows/not_object": 1.0,
    }
    assert report.summary() == "7 rows read, 6 skipped (5 not_json, 1 not_object)"
    assert data.BadRows(rows=2).summary() == "2 rows read, none skipped"


def test_utf16_is_named(write):
    path = write([json.dumps(GOOD).encode("utf-16")])
    with pytest.raises(data.BadRow, match="iconv -f utf-16 -t utf-8"):
        list(data.read_jsonl(path))


def test_good_files(write):
    lines = [
        b'{"text": "\xc3\xa9", "n": 1}\r',
        b"",
        b"  ",
        b'{"text": "\\ud83d\\ude00"}',
    ]
    rows = list(data.read_jsonl(write(lines)))
    assert [row.columns for row in rows] == [{"text": "é", "n": 1}, {"text": "😀"}]
    assert [row.number for row in rows] == [1, 4]
    unended = write([])
    unended.write_bytes(b'{"text": "a"}')
    assert len(list(data.read_jsonl(unended))) == 1


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("lines", [[], [b"", b" "]])
def test_an_empty_file_is_an_error(write, file, lines):
    with pytest.raises(data.DataError, match="the file holds no rows"):
        list(data.read_jsonl(write(lines, file)))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        list(data.read_jsonl(tmp_path / "gone.jsonl"))
    with pytest.raises(FileNotFoundError, match="a folder"):
        list(data.read_jsonl(tmp_path))


def test_damaged_gzip_stops_whatever_the_setting(write, tmp_path):
    path = write([{"text": str(k) * 50} for k in range(500)], "rows.jsonl.gz")
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 2])
    with pytest.raises(data.DataError, match=r"after row \d+: the gzip stream is cut"):
        list(data.read_jsonl(path, on_bad_row="skip"))
    path.write_bytes(body[:-6] + b"xxxxxx")
    with pytest.raises(data.DataError, match="cut off or damaged"):
        list(data.read_jsonl(path, on_bad_row="skip"))
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(data.DataError, match=r"named \.gz but not a gzip file"):
        list(data.read_jsonl(plain))


def test_gzip_is_told_by_content(write):
    path = write([GOOD], "rows.jsonl.gz")
    path = path.rename(path.with_name("rows.jsonl"))
    assert len(list(data.read_jsonl(path))) == 1


def test_line_limit_is_exact(write):
    line = json.dumps({"text": "a" * 100}).encode()
    path = write([line, GOOD])
    rows = list(data.read_jsonl(path, line_limit_bytes=len(line)))
    assert len(rows) == 2
    report = data.BadRows()
    rows = list(
        data.read_jsonl(
            path, line_limit_bytes=len(line) - 1, on_bad_row="skip", report=report
        )
    )
    assert [row.number for row in rows] == [2]
    assert report.counts == {"line_too_long": 1}


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_gigabyte_line_is_never_in_memory(tmp_path, on_bad_row):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.seek(2**30)  # a hole: takes no room on the disk
        file.write(b'\n{"text": "after"}\n')
    tracemalloc.start()
    try:
        if on_bad_row == "stop":
            with pytest.raises(data.BadRow, match=r"row 1: the line is longer than 16"):
                list(data.read_jsonl(path))
        else:
            rows = list(data.read_jsonl(path, on_bad_row="skip"))
            assert [row.columns for row in rows] == [{"text": "after"}]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 80 * 2**20


def test_a_gigabyte_line_in_a_small_gzip_stops_early(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    block = gzip.compress(bytes(2**20))
    path.write_bytes(block * 1024)
    started = time.monotonic()
    with pytest.raises(data.BadRow, match="row 1: the line is longer"):
        list(data.read_jsonl(path))
    # Decompressing it all takes seconds; stopping at the limit, hundredths.
    assert time.monotonic() - started < 5


def test_unknown_setting_is_refused(write):
    with pytest.raises(ValueError, match="on_bad_row must be 'stop' or 'skip'"):
        list(data.read_jsonl(write([GOOD]), on_bad_row="ignore"))
