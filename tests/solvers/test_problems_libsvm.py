"""LIBSVM's text format: what is read, and what is refused with its line."""

import gzip

import numpy as np
import pytest

from jaxpost.solvers import problems

TEXT = """\
2 1:0.5 3:-1e1
# a comment of its own

1 2:1 # and one behind
2
"""


@pytest.fixture
def write(tmp_path):
    def one(content, name="data.txt"):
        content = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return one


@pytest.mark.parametrize("name", ["data.txt", "data.gz"])
def test_rows_are_read(write, name):
    found = problems.read_libsvm(write(TEXT, name))
    wanted = [[0.5, 0.0, -10.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(found.features, wanted)
    np.testing.assert_array_equal(found.labels, [1.0, -1.0, 1.0])
    assert found.features.dtype == found.labels.dtype == np.float64


def test_raw_labels_and_a_given_width(write):
    found = problems.read_libsvm(
        write("3 1:1\n7 1:2\n9\n"), labels="raw", num_features=4
    )
    np.testing.assert_array_equal(found.labels, [3.0, 7.0, 9.0])
    assert found.features.shape == (3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1:1\n0 1=2\n", r"data.txt:2: '1=2' is not index:value"),
        ("1 qid:3 1:2\n", r":1: 'qid:3' is not index:value"),
        ("1 0:2\n", r":1: index 0 is out of order \(indices count from 1\)"),
        ("1 2:1 2:3\n", r":1: index 2 is out of order \(it follows 2\)"),
        ("1 3:1 2:3\n", r":1: index 2 is out of order \(it follows 3\)"),
        ("1 1:x\n", r":1: value of index 1 is 'x', not a finite number"),
        ("1 1:nan\n", r":1: value of index 1 is 'nan', not a finite number"),
        ("yes 1:1\n", r":1: label is 'yes', not a finite number"),
        ("1 1:1\n0 9:1\n", r":2: index 9 exceeds 3 features"),
        (b"1 1:1\n1 1:\xff\n", r":2: is not ASCII text"),
        ("\n# nothing\n", r"data.txt: the file holds no rows"),
        ("1 1:1\n1 1:2\n", r"has 1 different labels \(1\), not two"),
        ("1\n2\n3\n", r"has 3 different labels \(1, 2, 3\), not two"),
    ],
)
def test_bad_files_are_refused(write, text, message):
    with pytest.raises(ValueError, match=message):
        problems.read_libsvm(write(text), num_features=3)


def test_other_refusals(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; give a file"):
        problems.read_libsvm(tmp_path / "none.txt")
    whole = gzip.compress(b"1 1:1\n-1 1:2\n" * 500)
    path = tmp_path / "cut.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="the gzip stream is cut off or damaged"):
        problems.read_libsvm(path)
    with pytest.raises(ValueError, match="take .* GiB as a dense array"):
        problems.read_libsvm(write("1 4000000000:1\n0 1:1\n"))
    with pytest.raises(ValueError, match="labels must be 'signs' or 'raw', got 'x'"):
        problems.read_libsvm(write(TEXT), labels="x")


@pytest.mark.parametrize(
    ("name", "shape", "positive", "stored"),
    [
        ("ionosphere_scale.gz", (351, 34), 225, 10551),
        ("mushrooms.gz", (8124, 112), 4208, 170604),
    ],
)
def test_real_data(shared_data, name, shape, positive, stored):
    found = problems.read_libsvm(shared_data / "libsvm" / name)
    assert found.features.shape == shape
    assert np.sum(found.labels == 1.0) == positive
    assert set(found.labels) == {-1.0, 1.0}
    assert np.count_nonzero(found.features) == stored
