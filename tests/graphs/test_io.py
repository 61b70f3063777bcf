"""Graph files in and out, and every complaint about a graph, its labels, its split."""

import itertools
import warnings

import networkx
import numpy as np
import pytest
from scipy import sparse

from jaxpost import graphs


def ring(nodes=6):
    """A ring, both directions: `[2, 2 * nodes]`."""
    one = np.arange(nodes)
    return np.stack(
        [
            np.concatenate([one, (one + 1) % nodes]),
            np.concatenate([(one + 1) % nodes, one]),
        ]
    )


def parts(**changes):
    """Arguments of `node_data` for a graph with nothing wrong."""
    masks = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    held = {
        "name": "ring",
        "features": np.arange(12, dtype=np.float32).reshape(6, 2) + 1.0,
        "edges": ring(),
        "labels": np.array([0, 1, 0, 1, 0, 1]),
        "masks": {k: np.isin(np.arange(6), v) for k, v in masks.items()},
    }
    return held | changes


def dense(graph):
    features = graph.nodes
    if isinstance(features, graphs.SparseFeatures):
        features = features.todense()
    return np.asarray(features)


def assert_same(first, second):
    np.testing.assert_array_equal(dense(first.graph), dense(second.graph))
    for name in ("senders", "receivers", "n_node", "n_edge"):
        a, b = getattr(first.graph, name), getattr(second.graph, name)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(first.labels, second.labels)
    assert (first.masks is None) == (second.masks is None)
    for part, mask in (first.masks or {}).items():
        np.testing.assert_array_equal(mask, second.masks[part])


def test_record_holds_the_container():
    data = graphs.node_data(**parts())
    assert data.node_count == 6
    assert data.classes == 2
    graph = data.graph
    assert graph.edges is None
    assert graph.nodes.dtype == np.float32
    assert graph.senders.dtype == graph.receivers.dtype == np.int32
    assert (np.diff(np.asarray(graph.receivers)) >= 0).all()
    pairs = zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)
    assert set(pairs) == {*zip(*ring().tolist(), strict=True)}


def test_npz_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    mostly_zero = (rng.random((6, 40)) < 0.05) * rng.random((6, 40))
    for features in (parts()["features"], mostly_zero):
        names = tuple("abcdef")
        data = graphs.node_data(**parts(features=features, node_names=names))
        path = graphs.save_npz(tmp_path / "ring.npz", data)
        again = graphs.load_npz(path)
        assert_same(data, again)
        assert again.name == "ring"
        assert again.node_names == names
        assert isinstance(again.graph.nodes, graphs.SparseFeatures) == (
            features is mostly_zero
        )
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        graphs.save_npz(tmp_path / "ring.npy", data)


def test_npz_without_labels_or_split(tmp_path):
    data = graphs.node_data(**parts(labels=None, masks=None))
    again = graphs.load_npz(graphs.save_npz(tmp_path / "bare.npz", data))
    assert again.labels is None
    assert again.masks is None
    assert again.classes == 0


def test_unlabelled_nodes_come_back_as_minus_one(tmp_path):
    labels = np.array([0, 1, 0, 1, -1, 1])
    masks = parts()["masks"] | {"test": np.arange(6) == 5}
    data = graphs.node_data(**parts(labels=labels, masks=masks))
    again = graphs.load_npz(graphs.save_npz(tmp_path / "some.npz", data))
    np.testing.assert_array_equal(again.labels, labels)


def test_sparse_matrices_are_read_as_they_are():
    rng = np.random.default_rng(1)
    values = (rng.random((6, 30)) < 0.06) * 1.0
    data = graphs.node_data(**parts(features=sparse.coo_matrix(values)))
    assert isinstance(data.graph.nodes, graphs.SparseFeatures)
    np.testing.assert_array_equal(dense(data.graph), values)
    full = graphs.node_data(**parts(features=sparse.csr_matrix(np.ones((6, 3)))))
    assert not isinstance(full.graph.nodes, graphs.SparseFeatures)


@pytest.mark.parametrize("width", [2, 40])
def test_rows_are_normalised(width):
    rng = np.random.default_rng(2)
    features = (rng.random((6, width)) < (0.05 if width == 40 else 1)) * 3.0
    features[2] = 0.0
    graph = graphs.row_normalize(graphs.node_data(**parts(features=features)).graph)
    sums = features.sum(axis=1, keepdims=True)
    expected = features / np.where(sums == 0, 1, sums)
    np.testing.assert_allclose(dense(graph), expected, rtol=1e-6)


BAD_EDGES = [
    (lambda e: e.astype(float), r"edge_index: must be integers, got float64"),
    (lambda e: e.T, r"must have shape \[2, E\].*\[12, 2\]"),
    (
        lambda e: np.where(np.arange(12) == 4, [[4], [9]], e),
        r"edge_index\[1, 4\] = 9 is out of range: there are 6 nodes",
    ),
    (lambda e: np.where(np.arange(12) == 2, -1, e), r"edge_index\[0, 2\] = -1 is out"),
    (
        lambda e: np.concatenate([e, [[3], [3]]], axis=1),
        r"edge 12 is a self-loop of node 3",
    ),
    (
        lambda e: np.concatenate([e, e[:, :1]], axis=1),
        r"edges 0 and 12 are both 0 -> 1 \(1 repeated edges\)",
    ),
]


@pytest.mark.parametrize(("change", "words"), BAD_EDGES)
def test_bad_edges_are_named(change, words):
    with pytest.raises(graphs.GraphError, match=words) as caught:
        graphs.node_data(**parts(edges=change(ring())))
    assert str(caught.value).startswith("ring: ")


def test_one_node_is_no_graph():
    with pytest.raises(graphs.GraphError, match="at least 2 nodes, this has 1"):
        graphs.node_data("dot", np.ones((1, 2)), np.zeros((2, 0), int))


def test_one_way_edges_are_warned_of():
    with pytest.warns(
        graphs.GraphWarning, match=r"1 of 11 edges have no edge back.*1 -> 0"
    ):
        data = graphs.node_data(**parts(edges=ring()[:, 1:]))
    assert data.graph.senders.size == 11  # taken as it is


def test_isolated_nodes_are_warned_of():
    edges = ring(4)
    with pytest.warns(graphs.GraphWarning, match=r"2 of 6 nodes have no edge.*4, 5"):
        data = graphs.node_data(**parts(edges=edges))
    assert data.node_count == 6


def test_repair_mends_what_was_refused():
    edges = np.concatenate([ring()[:, 3:], [[3, 2], [3, 3]], ring()[:, 5:6]], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = graphs.node_data(**parts(edges=edges, repair=True))
    assert_same(mended, graphs.node_data(**parts()))


def spoiled_masks(**rows):
    return parts()["masks"] | {
        part: np.isin(np.arange(6), found) for part, found in rows.items()
    }


BAD_PARTS = [
    ({"features": np.ones((6, 2), int)}, r"features: must be floats, got int64"),
    ({"features": np.ones(6)}, r"features: must be \[N, F\]"),
    (
        {"features": np.where(np.arange(12).reshape(6, 2) == 7, np.inf, 1.0)},
        r"features\[3, 1\] = inf is not finite",
    ),
    ({"labels": np.eye(6)[:, :2]}, r"labels: must be one class.*argmax"),
    ({"labels": np.arange(5)}, r"labels: must have shape \[6\], got \[5\]"),
    ({"labels": np.linspace(0, 1, 6)}, r"labels: must be integers"),
    ({"labels": np.array([0, 1, 0, 1, -2, 1])}, r"labels\[4\] = -2 is no class"),
    ({"labels": np.full(6, -1), "masks": None}, r"no node has a label"),
    ({"labels": np.array([0, 1, 0, 1, -1, 1])}, r"1 nodes of the test part have no"),
    ({"labels": np.array([0, 0, 0, 1, 0, 1])}, r"class 1 is missing from the train"),
    ({"labels": None}, r"has a split but no labels"),
    ({"masks": spoiled_masks(test=[1, 5])}, r"train and test overlap in 1.*node 1"),
    ({"masks": spoiled_masks(validation=[])}, r"validation part is empty"),
    (
        {"masks": parts()["masks"] | {"test": np.arange(6)}},
        r"test mask must be bool \[6\], got int64",
    ),
]


@pytest.mark.parametrize(("changes", "words"), BAD_PARTS)
def test_bad_parts_are_named(changes, words):
    with pytest.raises(graphs.GraphError, match=words):
        graphs.node_data(**parts(**changes))


def rewrite(path, **changes):
    with np.load(path) as held:
        arrays = dict(held) | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


BAD_FILES = [
    ({"edge_index": None}, r"lacks edge_index; it has feat_data"),
    ({"feat_shape": np.array([6])}, r"feat_shape must be two integers"),
    ({"feat_indices": np.full(12, 5)}, r"features are no valid CSR"),
    ({"feat_data": np.ones(12, int)}, r"feat_data must be floats"),
    ({"test_idx": None}, r"has a split of train, validation only"),
    ({"test_idx": np.array([4, 9])}, r"test_idx\[1\] = 9 is out of range"),
    ({"test_idx": np.array([4, 4])}, r"test_idx: node 4 is listed twice"),
    ({"test_idx": np.array([4.0])}, r"test_idx: must be a list of node numbers"),
    ({"has_label": np.ones(5, bool)}, r"has_label must be bool \[6\]"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_FILES)
def test_bad_files_are_named(tmp_path, changes, words):
    path = graphs.save_npz(tmp_path / "ring.npz", graphs.node_data(**parts()))
    rewrite(path, **changes)
    with pytest.raises(graphs.GraphError, match=words) as caught:
        graphs.load_npz(path)
    assert str(caught.value).startswith(str(path))


def test_files_that_are_none(tmp_path):
    graphs.save_npz(tmp_path / "ring.npz", graphs.node_data(**parts()))
    with pytest.raises(FileNotFoundError, match=r"no such file\. Did you mean.*ring"):
        graphs.load_npz(tmp_path / "rung.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(graphs.GraphError, match="cannot be read as .npz"):
        graphs.load_npz(tmp_path / "text.npz")
    # An array of objects is a pickle inside: never read.
    np.savez(tmp_path / "object.npz", edge_index=np.array([{}], dtype=object))
    with pytest.raises(graphs.GraphError, match="cannot be read as .npz"):
        graphs.load_npz(tmp_path / "object.npz")


def test_builtin_is_the_same_each_time_and_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = graphs.load_dataset("builtin")
    assert data.node_count == 300
    assert data.classes == 4
    assert [int(mask.sum()) for mask in data.masks.values()] == [20, 80, 200]
    assert_same(data, graphs.builtin())
    senders, receivers = data.graph.senders, data.graph.receivers
    same = data.labels[senders] == data.labels[receivers]
    assert 0.7 < same.mean() < 0.85  # edges say something, not all


def test_a_name_that_has_no_file_says_where_to_put_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXPOST_GRAPHS", str(tmp_path / "mine"))
    words = r"citeseer\.npz in one of .*mine.*graph convert"
    with pytest.raises(FileNotFoundError, match=words):
        graphs.load_dataset("citeseer")
    (tmp_path / "mine").mkdir()
    graphs.save_npz(tmp_path / "mine" / "citeseer.npz", graphs.node_data(**parts()))
    assert graphs.load_dataset("citeseer").node_count == 6
    assert graphs.load_dataset(str(tmp_path / "mine/citeseer.npz")).node_count == 6


def test_real_cora(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = graphs.load_npz(shared_data / "graphs" / "cora.npz")
    assert data.node_count == 2708
    assert data.classes == 7
    assert data.graph.senders.size == 10556
    assert data.graph.nodes.shape == (2708, 1433)
    assert isinstance(data.graph.nodes, graphs.SparseFeatures)
    assert [int(mask.sum()) for mask in data.masks.values()] == [140, 500, 1000]


def test_random_splits_have_the_asked_sizes_and_differ():
    labels = np.arange(200) % 4
    drawn = [graphs.random_masks(labels, seed=seed) for seed in (0, 0, 1)]
    assert {k: int(m.sum()) for k, m in drawn[0].items()} == {
        "train": 20,
        "validation": 20,
        "test": 160,
    }
    assert sum(drawn[0].values()).max() == 1
    np.testing.assert_array_equal(drawn[0]["test"], drawn[1]["test"])
    assert (drawn[0]["test"] != drawn[2]["test"]).any()
    with pytest.raises(ValueError, match="leave some nodes to train on"):
        graphs.random_masks(labels, validation=0.3, test=0.7, seed=0)
    with pytest.raises(graphs.GraphError, match="missing from the train"):
        graphs.random_masks(np.arange(200), seed=0)


def write_lists(folder, edges=None, nodes=None):
    (folder / "e.txt").write_text(edges or "# friends\nann bob\nbob,cid\n\ncid\tann\n")
    (folder / "n.csv").write_text(
        nodes
        or "node,height,label,split,weight\n"
        "ann,1.5,tall,train,2\nbob,1,small,train,3\ncid,2e0,tall,validation,4\n"
        "dan,0,small,test,5\neve,1,,,6\n"
    )
    return folder / "e.txt", folder / "n.csv"


def test_edge_list_with_features(tmp_path):
    with pytest.warns(graphs.GraphWarning, match="2 of 5 nodes have no edge"):
        data = graphs.load_edge_list(*write_lists(tmp_path), repair=True)
    assert data.node_names == ("ann", "bob", "cid", "dan", "eve")
    np.testing.assert_array_equal(
        dense(data.graph), [[1.5, 2], [1, 3], [2, 4], [0, 5], [1, 6]]
    )
    np.testing.assert_array_equal(data.labels, [1, 0, 1, 0, -1])  # by the alphabet
    assert data.masks["train"].tolist() == [True, True, False, False, False]
    ends = zip(data.graph.senders.tolist(), data.graph.receivers.tolist(), strict=True)
    assert set(ends) == set(itertools.permutations(range(3), 2))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("10", "2", "-1", "0", ""), (10, 2, -1, 0, -1)),
        (("10", "2", "-1", "red", ""), (0, 1, -1, 2, -1)),
    ],
)
def test_labels_of_lists_are_integers_if_all_are(tmp_path, words, expected):
    rows = [f"{name},1,{word}" for name, word in zip("abcde", words, strict=True)]
    text = "\n".join(["node,x,label", *rows, ""])
    lists = write_lists(tmp_path, edges="a b\nb c\nc d\nd e\n", nodes=text)
    data = graphs.load_edge_list(*lists, repair=True)
    np.testing.assert_array_equal(data.labels, expected)


BAD_LISTS = [
    ({"edges": "ann bob\nann bob 3\n"}, r"e\.txt:2: expected two node names, got 3"),
    ({"edges": "ann\n"}, r"e\.txt:1: expected two node names, got 1"),
    ({"edges": "ann bob\nbob zoe\n"}, r"e\.txt:2: node 'zoe' is not in .*n\.csv"),
    ({"nodes": "name,x\nann,1\n"}, r"n\.csv:1: the header needs a column `node`"),
    ({"nodes": "node,label\nann,1\n"}, r"n\.csv:1: no feature column"),
    ({"nodes": "node,x\nann,1\nann,2\n"}, r"n\.csv:3: node 'ann' was on line 2"),
    ({"nodes": "node,x\nann,1,2\n"}, r"n\.csv:2: 3 values for 2 columns"),
    ({"nodes": "node,x\nann,tall\n"}, r"n\.csv:2: column 'x' must be a number"),
    ({"nodes": "node,x,split\nann,1,dev\n"}, r"n\.csv:2: split must be train"),
    (
        {"nodes": "node,x,label\nann,1,0\nbob,2,-2\ncid,3,1\n"},
        r"labels\[1\] = -2 is no class",
    ),
]


@pytest.mark.parametrize(("files", "words"), BAD_LISTS)
def test_bad_lists_are_named(tmp_path, files, words):
    with pytest.raises(graphs.GraphError, match=words):
        graphs.load_edge_list(*write_lists(tmp_path, **files), repair=True)


def test_missing_lists(tmp_path):
    edges, nodes = write_lists(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        graphs.load_edge_list(tmp_path / "absent", nodes)
    with pytest.raises(FileNotFoundError, match="absent"):
        graphs.load_edge_list(edges, tmp_path / "absent")


def test_networkx_both_ways():
    data = graphs.node_data(**parts())
    made = graphs.to_networkx(data)
    assert isinstance(made, networkx.DiGraph)
    again = graphs.from_networkx(made)
    assert_same(data, again)
    undirected = graphs.from_networkx(networkx.Graph(made))
    np.testing.assert_array_equal(undirected.graph.senders, data.graph.senders)


def test_networkx_errors():
    made = networkx.path_graph(3)
    with pytest.raises(graphs.GraphError, match="node 0 has no attribute 'x'"):
        graphs.from_networkx(made)
    networkx.set_node_attributes(made, {0: [1.0], 1: [1.0, 2.0], 2: [1.0]}, "x")
    with pytest.raises(graphs.GraphError, match="node 1 has 2 features, the first"):
        graphs.from_networkx(made)
    with pytest.raises(graphs.GraphError, match="multigraph"):
        graphs.from_networkx(networkx.MultiGraph())
