"""The clnr recipe from its commands, toy size: train, resume, embed, probe, convert."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxpost import cli, graphs, recipes, training
from jaxpost.recipes import clnr
from jaxpost.recipes import graph as tools

CONFIGS = pathlib.Path(__file__).parents[2] / "configs/clnr"
FLAGS = (
    *("--dataset", "builtin", "--seeds", "2", "--encoder.widths", "8"),
    *("--objective.batch", "64", "--train.epochs", "4", "--train.log-every", "2"),
    *("--train.save-every", "2", "--probe.epochs", "20"),
)


def train(root, name, *flags):
    words = ["graph", "train", *FLAGS, "--run-root", str(root), "--name", name, *flags]
    return cli.main(words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two seeds."""
    root = tmp_path_factory.mktemp("runs")
    assert train(root, "whole", "--embed.plot", "pca") == 0
    return root / "whole"


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_run_folder_is_whole(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("config.yaml", "environment.json", "metrics.jsonl", "checkpoints"),
        *("results.json", "clnr.md", "embeddings.npz", "embeddings.svg"),
    }
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines)
    # Near what cosines of zero would give: 126 negatives and the positive.
    assert all(0.5 * np.log(127) < line["loss"] < 2 * np.log(127) for line in lines)
    results = json.loads((finished / "results.json").read_text("utf-8"))
    for name in ("clean", "optimistic", "last", "validation", "alignment"):
        assert len(results[name]) == 2
    assert results["accuracy"] == results["clean"]
    assert all(0.0 < x < 1.0 for x in results["clean"])
    assert results["clean"][0] != results["clean"][1]  # seeds differ
    assert (finished / "clnr.md").read_text("utf-8").count("| 2 |") == 6
    environment = json.loads((finished / "environment.json").read_text("utf-8"))
    assert len(environment["data"]["builtin"]) == 16


def test_a_second_run_does_not_overwrite(finished, capsys):
    assert train(finished.parent, "whole") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resumed_run_equals_uninterrupted(finished, tmp_path, monkeypatch):
    """Killed after the checkpoint of step 2, and again before it wrote anything."""
    log = training.RunFolder.log_metrics

    def killed(self, line):
        if line["step"] == 3:
            raise KeyboardInterrupt
        log(self, line)

    monkeypatch.setattr(training.RunFolder, "log_metrics", killed)
    assert train(tmp_path, "cut") == 130
    monkeypatch.setattr(training.RunFolder, "log_metrics", log)
    assert train(tmp_path, "cut", "--resume") == 0
    assert metrics(tmp_path / "cut") == metrics(finished)
    assert (tmp_path / "cut/results.json").read_bytes() == (
        finished / "results.json"
    ).read_bytes()


@pytest.mark.slow
def test_seeds_do_not_depend_on_how_many(finished, tmp_path):
    found = clnr.run(
        recipes.with_flags(
            clnr.CLNRConfig(),
            [*FLAGS, "--seeds", "1", "--run-root", str(tmp_path)],
            prog="test",
        )
    )
    with np.load(finished / "embeddings.npz") as held:
        np.testing.assert_allclose(found.embeddings, held["embeddings"], rtol=1e-4)
        np.testing.assert_array_equal(held["nodes"], np.arange(300))
        assert str(held["dataset"]) == "builtin"


def test_encoders_of_a_seed_stand_side_by_side(finished, tmp_path):
    """One seed of two encoders has the parameters of two seeds of one."""
    assert train(tmp_path, "wide", "--seeds", "1", "--encoders", "2") == 0
    assert len(json.loads((tmp_path / "wide/results.json").read_text())["clean"]) == 1
    with np.load(tmp_path / "wide/embeddings.npz") as held:
        wide = held["embeddings"]
    assert wide.shape == (300, 16)
    for index, columns in enumerate((wide[:, :8], wide[:, 8:])):
        out = tmp_path / f"{index}.npz"
        words = ["graph", "embed", str(finished), "--index", str(index)]
        assert cli.main([*words, "--out", str(out)]) == 0
        with np.load(out) as held:
            np.testing.assert_allclose(held["embeddings"], columns, rtol=1e-5)
    out = tmp_path / "whole.npz"
    assert cli.main(["graph", "embed", str(tmp_path / "wide"), "--out", str(out)]) == 0
    with np.load(out) as held:
        np.testing.assert_allclose(held["embeddings"], wide, rtol=1e-5)


def test_embed_and_probe(finished, tmp_path, capsys):
    out, plot = tmp_path / "e.npz", tmp_path / "e.svg"
    words = ["graph", "embed", str(finished), "--out", str(out), "--plot", str(plot)]
    assert cli.main([*words, "--projection", "pca"]) == 0
    with np.load(out) as one, np.load(finished / "embeddings.npz") as two:
        np.testing.assert_allclose(
            one["embeddings"], two["embeddings"], rtol=1e-5, atol=1e-6
        )
    assert plot.read_bytes().startswith(b"<?xml")
    capsys.readouterr()
    for protocol, name in (("linear", "clean"), ("clusters", "nmi")):
        words = ["graph", "probe", str(out), "--protocol", protocol, "--repeats", "2"]
        assert cli.main([*words, "--epochs", "20"]) == 0
        assert name in capsys.readouterr().out


def test_probe_of_a_graph_that_needs_repair(tmp_path, capsys):
    data = graphs.builtin()
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    graphs.save_npz(good, data)
    with np.load(good) as held:
        arrays = dict(held)
    arrays["edge_index"] = np.pad(arrays["edge_index"], ((0, 0), (1, 0)))  # a loop
    np.savez(bad, **arrays)
    with pytest.raises(graphs.GraphError, match="self-loop"):
        graphs.load_npz(bad)
    rows = np.random.default_rng(0).normal(size=(300, 4))
    out = tmp_path / "e.npz"
    words = ["graph", "probe", str(out), "--protocol", "clusters", "--repeats", "1"]
    shown = []
    for path in (good, bad):
        tools._report.save_embeddings(out, rows, data, dataset=str(path))
        assert cli.main(words) == 0
        shown.append(capsys.readouterr().out)
    assert "nmi" in shown[0]
    assert shown[0] == shown[1]


def test_embeddings_find_their_nodes(tmp_path):
    """A file in another order, and one of other nodes."""
    data = graphs.builtin()
    rows = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    order = np.random.default_rng(1).permutation(300)
    path = tmp_path / "mixed.npz"
    np.savez(path, embeddings=rows[order], nodes=order, dataset="builtin")
    file = tools._report.load_embeddings(path)
    np.testing.assert_array_equal(tools._report.in_order_of(file, data), rows)
    np.savez(path, embeddings=rows[:9], nodes=order[:9], dataset="builtin")
    with pytest.raises(
        ValueError, match=r"9 embeddings .* 300 nodes: node \d+ has none"
    ):
        tools.probe(tools.ProbeArgs(str(path)))
    np.savez(path, rows=rows)
    with pytest.raises(ValueError, match="holds no embeddings"):
        tools.probe(tools.ProbeArgs(str(path)))
    with pytest.raises(FileNotFoundError, match="no such file"):
        tools.probe(tools.ProbeArgs(str(tmp_path / "absent.npz")))


def test_convert_writes_what_train_reads(tmp_path, capsys):
    (tmp_path / "edges.txt").write_text("a b\nb c\nc d\nd a\n")
    lines = [f"{n},{x},{x % 2},train" for x, n in enumerate("abcd")]
    (tmp_path / "nodes.csv").write_text("\n".join(["id,x,label,split", *lines]))
    words = ["graph", "convert", str(tmp_path / "edges.txt"), str(tmp_path / "g.npz")]
    assert cli.main(words) == 2
    assert "--nodes CSV" in capsys.readouterr().err
    words += ["--nodes", str(tmp_path / "nodes.csv"), "--repair"]
    assert cli.main(words) == 2
    assert "validation part is empty" in capsys.readouterr().err
    text = (tmp_path / "nodes.csv").read_text()
    (tmp_path / "nodes.csv").write_text(
        text.replace(",split", ",s").replace("train", "1")
    )
    assert cli.main(words) == 0
    assert "4 nodes, 8 edges (both directions), 2 features, 2 classes" in (
        capsys.readouterr().out
    )
    assert graphs.load_npz(tmp_path / "g.npz").node_names == tuple("abcd")


def test_random_splits_differ_by_seed():
    config = clnr.CLNRConfig(seeds=2, data=clnr.GraphDataSection(split="random"))
    masks = clnr.masks_of(config, clnr.load(config))
    assert [mask.shape for mask in masks] == [(2, 300)] * 3
    assert (masks[0][0] != masks[0][1]).any()
    assert (sum(mask.astype(int) for mask in masks) == 1).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--objective.batch", "500"), "batch 500 exceeds 300 nodes"),
        (("--dataset", "nowhere"), "expected the file nowhere.npz"),
        (("--view1.edge-drop", "1.0"), r"edge_drop must lie in \[0, 1\)"),
        (("--train.learning-rate", "0"), "learning_rate must be positive"),
        (("--train.save-every", "3"), "multiple of log_every"),
        (("--embed.smooth-restart", "2"), "smooth_restart in"),
        (("--seeds", "0"), "seeds must be at least 1"),
        (("--encoders", "0"), "encoders must be at least 1"),
    ],
)
def test_errors_say_what_to_do(tmp_path, capsys, flags, words):
    import re

    try:
        status = train(tmp_path, "bad", *flags)
    except SystemExit as error:  # tyro's own, for a value that a section refuses
        status = error.code
    assert status == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(words, text), text


@pytest.mark.slow
def test_probe_by_graces_protocol(finished, capsys):
    path = str(finished / "embeddings.npz")
    assert cli.main(["graph", "probe", path, "--protocol", "grace"]) == 0
    assert "micro_f1" in capsys.readouterr().out


@pytest.mark.slow
def test_training_makes_classes_easier_to_read(tmp_path):
    """A probe of embeddings after 40 epochs against one after a single epoch."""
    found = []
    for epochs in ("1", "40"):
        flags = ["--train.epochs", epochs, "--encoder.widths", "32", "32"]
        flags += ["--objective.batch", "None", "--probe.epochs", "300"]
        words = [
            *FLAGS,
            "--seeds",
            "4",
            "--train.save-every",
            "0",
            *flags,
            "--run-root",
            str(tmp_path),
        ]
        config = recipes.with_flags(
            clnr.CLNRConfig(name=epochs), [*words, "--train.log-every", "20"], prog="t"
        )
        found.append(np.asarray(clnr.run(config).probe.clean))
    assert found[1].mean() > found[0].mean() + 0.05


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_and_seed(tmp_path, capsys):
    flags = ("--train.learning-rate", "1e38", "--objective.kind", "nclnr")
    assert train(tmp_path, "bad", *flags) == 2
    assert "of seed 0: lower train.learning_rate" in capsys.readouterr().err


@pytest.mark.slow
def test_constant_columns_are_named(tmp_path, capsys):
    """Features of zeros and no edge: every node is the same."""
    rows, edges = (
        np.zeros((8, 3), np.float32),
        np.stack([np.arange(8), np.arange(8) ^ 1]),
    )
    path = graphs.save_npz(tmp_path / "flat.npz", graphs.node_data("flat", rows, edges))
    flags = ("--dataset", str(path), "--objective.batch", "4")
    assert train(tmp_path, "flat", *flags) == 0
    out = capsys.readouterr().out
    assert "8 embedding columns of seed 0 are the same for all nodes (0, 1, 2" in out
    assert "objective.eps" in out


def test_embed_needs_a_run_and_a_seed(finished, tmp_path, capsys):
    assert cli.main(["graph", "embed", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["graph", "embed", str(finished), "--index", "2"]) == 2
    assert "index must lie in 0..1" in capsys.readouterr().err


def test_graph_has_verbs(capsys):
    assert cli.main(["graph", "trian"]) == 2
    assert "Did you mean 'jaxpost graph train'?" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_can_be_read_and_built(path):
    config = recipes.load_config(str(path), prog="test")
    assert isinstance(config, clnr.CLNRConfig)
    method, tx = config.method(), config.train.optimizer()
    state = jax.eval_shape(
        lambda key: graphs.init_state(method, tx, 50, key=key), jax.random.key(0)
    )
    assert state.params["encoder"]
    assert config.name == path.stem
    text = path.read_text("utf-8")
    assert f"jaxpost graph train configs/clnr/{path.name}" in text
