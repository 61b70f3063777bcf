"""Planetoid's pickles: written as Python 2 wrote them, read through the allow-list."""

import collections
import os
import pickle

import numpy as np
import pytest
from scipy import sparse

from jaxpost import graphs

KNOWN, TEST, WIDTH = 8, 4, 5


def python2(value):
    """Protocol 2 names modules as Python 2 did."""
    return pickle.dumps(value, 2)


def old_csr(matrix):
    """Bytes of a CSR matrix as Python 2 with protocol 2 wrote it: NEWOBJ, BUILD."""
    state = {
        "_shape": matrix.shape,
        "maxprint": 50,
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
    }
    body = python2(state)[2:-1]  # without PROTO and STOP
    return b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n)\x81" + body + b"b."


@pytest.fixture
def folder(tmp_path):
    """Twelve nodes of two classes; node 10 of the test range is left out."""
    rng = np.random.default_rng(0)
    rows = (rng.random((KNOWN + TEST, WIDTH)) < 0.4).astype(np.float32)
    classes = np.arange(KNOWN + TEST) % 2
    one_hot = np.eye(2, dtype=np.int32)[classes]
    neighbours = collections.defaultdict(list)
    for node in range(KNOWN + TEST + 1):
        if node == 10:
            continue
        for other in (node + 1, node - 1, node):  # a self-loop each
            if 0 <= other <= KNOWN + TEST and other != 10:
                neighbours[node].append(other)
    neighbours[0].append(1)  # a repeated edge
    order = [11, 8, 12, 9]  # as test.index has them, 10 is missing
    files = {
        "x": old_csr(sparse.csr_matrix(rows[:4])),
        "allx": old_csr(sparse.csr_matrix(rows[:KNOWN])),
        "tx": old_csr(sparse.csr_matrix(rows[KNOWN:])),
        "y": python2(one_hot[:4]),
        "ally": python2(one_hot[:KNOWN]),
        "ty": python2(one_hot[KNOWN:]),
        "graph": python2(neighbours),
        "test.index": "\n".join(map(str, order)).encode(),
    }
    for part, content in files.items():
        (tmp_path / f"ind.toy.{part}").write_bytes(content)
    return tmp_path, rows, classes, order


@pytest.mark.filterwarnings("ignore::jaxpost.graphs.GraphWarning")
def test_files_become_one_graph(folder):
    path, rows, classes, order = folder
    data = graphs.load_planetoid(path)
    assert data.name == "toy"
    assert data.node_count == KNOWN + TEST + 1
    features = data.graph.nodes
    if isinstance(features, graphs.SparseFeatures):
        features = features.todense()
    features = np.asarray(features)
    np.testing.assert_array_equal(features[:KNOWN], rows[:KNOWN])
    np.testing.assert_array_equal(features[order], rows[KNOWN:])
    assert not features[10].any()
    assert data.labels[10] == -1
    np.testing.assert_array_equal(data.labels[order], classes[KNOWN:])
    assert np.nonzero(data.masks["train"])[0].tolist() == [0, 1, 2, 3]
    assert np.nonzero(data.masks["validation"])[0].tolist() == [4, 5, 6, 7]
    assert np.nonzero(data.masks["test"])[0].tolist() == [8, 9, 11, 12]
    ends = [np.asarray(x).tolist() for x in (data.graph.senders, data.graph.receivers)]
    pairs = set(zip(*ends, strict=True))
    assert len(pairs) == len(ends[0])  # none repeated
    assert all(a != b and (b, a) in pairs for a, b in pairs)
    assert len(pairs) == 2 * (9 + 1)


def test_isolated_nodes_are_warned_of(folder):
    with pytest.warns(graphs.GraphWarning, match="1 of 13 nodes have no edge.*node 10"):
        graphs.load_planetoid(folder[0], "toy")


def test_protocol_of_python_3_is_read_too(tmp_path):
    value = collections.defaultdict(list, {0: [1], 1: [0]})
    (tmp_path / "graph").write_bytes(pickle.dumps(value, 4))
    assert graphs.load_pickle(tmp_path / "graph") == value
    array = np.arange(6.0).reshape(2, 3)
    for protocol in (0, 2, 4):
        (tmp_path / "array").write_bytes(pickle.dumps(array, protocol))
        np.testing.assert_array_equal(graphs.load_pickle(tmp_path / "array"), array)


def test_oldest_form_of_a_matrix_is_read(tmp_path):
    """Protocol 0 and 1 rebuild objects through `copy_reg._reconstructor`."""
    matrix = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    new = old_csr(matrix)
    start = new.index(b")\x81") + 2
    head = b"\x80\x02ccopy_reg\n_reconstructor\ncscipy.sparse.csr\ncsr_matrix\n"
    (tmp_path / "m").write_bytes(head + b"c__builtin__\nobject\nN\x87R" + new[start:])
    found = graphs.load_pickle(tmp_path / "m")
    np.testing.assert_array_equal(found.toarray(), np.eye(3))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def hostile_pickles(canary):
    touch = f"touch {canary}"
    return {
        "posix.system|nt.system": pickle.dumps(Hostile(os.system, touch)),
        "builtins.eval": pickle.dumps(Hostile(eval, f"open({str(canary)!r}, 'w')")),
        "__builtin__.eval": pickle.dumps(Hostile(eval, "1"), 2),
        "builtins.getattr": pickle.dumps(Hostile(getattr, "", "join")),
        "numpy.load": b"cnumpy\nload\n(V" + str(canary).encode() + b"\ntR.",
        # Names with dots walk through attributes in protocol 4.
        "collections.abc.sys.modules": b"\x80\x04\x8c\x0fcollections.abc\x8c\x0b"
        b"sys.modules\x93.",
        "os.system": b"cos\nsystem\n(V" + touch.encode() + b"\ntR.",
    }


@pytest.mark.parametrize("number", range(7))
def test_hostile_pickles_are_refused_by_name(tmp_path, number):
    canary = tmp_path / "canary"
    name, content = list(hostile_pickles(canary).items())[number]
    (tmp_path / "ind.bad.graph").write_bytes(content)
    with pytest.raises(graphs.GraphError, match=f"asks for ({name}), which is refused"):
        graphs.load_pickle(tmp_path / "ind.bad.graph")
    assert not canary.exists()


def test_allowed_names_do_no_more_than_they_must(tmp_path):
    """What is let through cannot be turned against its purpose."""
    cases = {
        "may build plain arrays only": b"cnumpy.core.multiarray\n_reconstruct\n"
        b"(c__builtin__\nlist\n(tS'b'\ntR.",
        "may build sparse matrices only": b"ccopy_reg\n_reconstructor\n"
        b"(c__builtin__\nlist\nc__builtin__\nobject\nNtR.",
        "encode to 'rot13' is refused": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        "constructor arguments is refused": b"cscipy.sparse.csr\ncsr_matrix\n(I5\ntR.",
        "persistent ids": b"Pname\n.",
        "is no pickle": b"not a pickle",
    }
    for words, content in cases.items():
        (tmp_path / "p").write_bytes(content)
        with pytest.raises(graphs.GraphError, match=words):
            graphs.load_pickle(tmp_path / "p")


def test_a_matrix_that_is_none_is_refused(tmp_path):
    matrix = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    matrix.indices = np.array([0, 1, 99], np.int32)
    (tmp_path / "m").write_bytes(old_csr(matrix))
    with pytest.raises(graphs.GraphError, match="holds no valid CSR matrix"):
        graphs.load_pickle(tmp_path / "m")


def test_missing_or_mismatched_files(folder, tmp_path):
    path = folder[0]
    with pytest.raises(FileNotFoundError, match=r"expected the files ind\.NAME\.x"):
        graphs.load_planetoid(tmp_path / "nowhere")
    (path / "ind.toy.test.index").write_text("9\n8\n")
    with pytest.raises(graphs.GraphError, match="test.index names 2 nodes from 8"):
        graphs.load_planetoid(path)
    (path / "ind.toy.ty").write_bytes(python2([1, 2]))
    with pytest.raises(graphs.GraphError, match=r"ind\.toy\.ty: expected one-hot rows"):
        graphs.load_planetoid(path)
    (path / "ind.toy.ty").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ind\.toy\.ty"):
        graphs.load_planetoid(path)
