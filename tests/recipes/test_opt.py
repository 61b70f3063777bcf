"""`jaxpost opt`: solves, files, continuation, figures, and what it refuses."""

import json

import jax.numpy as jnp
import pytest

from jaxpost import cli
from jaxpost.recipes import _json_lines, _opt_board
from jaxpost.recipes.opt import OptConfig, run_opt


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A separable little set of two classes in LIBSVM's format."""
    path = tmp_path_factory.mktemp("data") / "tiny.txt"
    lines = []
    for i in range(24):
        values = [(i * (j + 3) % 7 - 3) / 3 for j in range(16)]
        items = " ".join(f"{j + 1}:{v:.4g}" for j, v in enumerate(values) if v)
        lines.append(f"{1 + (sum(values[:4]) > 0)} {items}")
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder, *words):
    """Through the command line, as a user has it."""
    folder = str(folder)
    assert cli.main(["opt", *words, "--run-root", folder, "--progress", "plain"]) == 0


@pytest.fixture(scope="module")
def compared(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = ["--suite", "logistic", "--data", str(rows), "--seeds", "2"]
    words += ["--method", "exact", "--method", "minres", "--repeats", "1"]
    run(folder, *words)
    return folder / "opt-logistic", words


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_suite_leaves_results_summary_and_figures(compared):
    folder, _ = compared
    lines = read(folder / "results.jsonl")
    assert [line["id"] for line in lines] == [
        f"tiny/{method}/{seed}" for seed in (0, 1) for method in ("exact", "minres")
    ]
    for line in lines:
        if line["status"] == "infeasible":
            assert "contradict each other" in line["explained"]
            continue
        assert line["status"] == "converged"
        assert line["n"] == 16
        assert line["m"] == 11
        assert line["kkt_residual"] <= 1e-4
        assert line["kkt_history"][-1] == line["kkt_residual"]
        assert len(line["kkt_history"]) == line["iterations"] + 1
        assert 0.0 < line["feasibility"] <= 1.0
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    ran = [line for line in lines if line["method"] == "exact" and "n" in line]
    assert summary["methods"]["exact"]["solved"] == len(ran) > 0
    for name in ("profiles.svg", "convergence.svg"):
        assert "<svg" in (folder / name).read_text("utf-8")
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    assert environment["seeds"] == {"first": 0}


def test_results_are_continued_not_solved_again(compared, capsys):
    folder, words = compared
    path = folder / "results.jsonl"
    before = path.read_text("utf-8")
    whole = before.splitlines(keepends=True)
    path.write_text("".join(whole[:-1]) + whole[-1][:20])  # killed while writing
    run(folder.parent, *words)
    assert "already has 3 of 4 solves" in capsys.readouterr().out
    after = path.read_text("utf-8").splitlines(keepends=True)
    assert after[:-1] == whole[:-1]
    assert json.loads(after[-1])["id"] == json.loads(whole[-1])["id"]


def test_results_of_other_settings_are_refused(compared, capsys):
    folder, words = compared
    words = ["opt", *words, "--run-root", str(folder.parent), "--tolerance", "1e-6"]
    assert cli.main(words) == 2
    assert "was solved by exact with other settings" in capsys.readouterr().err


def test_one_problem_at_two_sizes(tmp_path, capsys):
    run(tmp_path, "--problem", "pde", "--grid", "2", "--grid", "3", "--repeats", "1")
    lines = read(tmp_path / "opt-pde" / "results.jsonl")
    assert [line["problem"] for line in lines] == ["PDE-2", "PDE-3"]
    assert [line["iterations"] for line in lines] == [1, 1]
    assert lines[1]["objective"] == pytest.approx(9.644442051812, rel=1e-10)
    assert jnp.result_type(float) == jnp.float32  # 64-bit mode only meanwhile
    assert "exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --problem NAME"),
        (["--problem", "HS6", "--suite", "cutest"], "give either --problem NAME"),
        (["--suite", "logistic"], "--suite logistic and --data FILE"),
        (["--problem", "pde", "--data", "x"], "--suite logistic and --data FILE"),
        (["--problem", "HS6", "--grid", "3"], "--grid is for --problem pde"),
        (["--problem", "pde", "--method", "newton"], "method must be one of exact"),
        (["--problem", "pde", "--seeds", "0"], "seeds must be at least 1"),
        (["--problem", "pde", "--tolerance", "-1"], "tolerance must be positive"),
        (["--problem", "pde", "--matrix-free"], "matrix_free needs method in"),
        (["--problem", "pde", "--grid", "70"], "--matrix-free --method minres"),
        (["--problem", "pde", "--grid", "0"], "grid must be at least 1 point"),
        (["--suite", "logistic", "--data", "none.txt"], "no such file"),
    ],
)
def test_bad_words_end_with_status_2(words, message, tmp_path, capsys):
    try:
        status = cli.main(["opt", *words, "--run-root", str(tmp_path)])
    except SystemExit as stop:  # settings that contradict each other: the parser ends
        status = stop.code
    assert status == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown
    assert "Traceback" not in shown


def write_rows(path, width, scale=1):
    """Two rows; of 11 features, ten constraints leave a line too far from zero."""
    items = " ".join(f"{j + 1}:{scale}" for j in range(width))
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"1 {items}\n2 1:1\n")
    return str(path)


def test_draws_without_a_feasible_point_are_recorded(tmp_path, capsys):
    path = write_rows(tmp_path / "close.txt", 11)
    run(tmp_path, "--suite", "logistic", "--data", path, "--method", "exact")
    (line,) = read(tmp_path / "opt-logistic" / "results.jsonl")
    assert line["status"] == "infeasible"
    assert "contradict each other" in line["explained"]
    environment = (tmp_path / "opt-logistic" / "environment.json").read_text("utf-8")
    assert json.loads(environment)["data"] == {"close": line["data"]}


def test_data_of_too_few_features_ends_with_status_2(tmp_path, capsys):
    path = write_rows(tmp_path / "narrow.txt", 10)
    words = ["opt", "--suite", "logistic", "--data", path, "--run-root", str(tmp_path)]
    assert cli.main([*words, "--progress", "plain"]) == 2
    message = "narrow: num_linear must be at least 1 and below the 10 features"
    assert message in capsys.readouterr().err
    assert read(tmp_path / "opt-logistic" / "results.jsonl") == []


def test_results_are_those_of_a_file_not_of_its_name(tmp_path, capsys):
    one = write_rows(tmp_path / "a" / "same.txt", 11)
    two = write_rows(tmp_path / "b" / "same", 11, scale=2)
    words = ["--suite", "logistic", "--method", "exact", "--run-root", str(tmp_path)]
    words = ["opt", *words, "--progress", "plain"]
    assert cli.main([*words, "--data", one]) == 0
    assert cli.main([*words, "--data", one]) == 0
    assert "already has 1 of 1 solves" in capsys.readouterr().out
    assert cli.main([*words, "--data", two]) == 2
    assert "solved on another file named same" in capsys.readouterr().err
    assert cli.main([*words, "--data", one, "--data", two]) == 2
    assert "would both be same in the results" in capsys.readouterr().err


def test_foreign_files_are_refused(tmp_path):
    for text, message in (("nonsense\n", ":1 is not JSON"), ("{}\n", "not a line of")):
        path = tmp_path / "other.jsonl"
        path.write_text(text)
        config = OptConfig(
            problem="pde", run_root=str(tmp_path), out=str(path), progress="none"
        )
        with pytest.raises(ValueError, match=message):
            run_opt(config)


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert list(_json_lines.read(path)) == []
    path.write_text('{"a": 1}\n[2]\n{"b"')
    assert list(_json_lines.read(path)) == [(1, {"a": 1}), (2, [2])]
    assert path.read_text() == '{"a": 1}\n[2]\n'


def test_the_live_table_shows_methods_and_the_last_solves(capsys):
    solved = {
        "problem": "HS6",
        "method": "exact",
        "status": "converged",
        "iterations": 9,
        "objective_evaluations": 25,
        "gradient_evaluations": 25,
        "inner_steps": 0,
        "kkt_residual": 4.6e-11,
        "objective": None,
        "solve_s": 0.002,
        "compile_s": 1.5,
    }
    none = {
        "problem": "x",
        "method": "published-gaussian",
        "status": "infeasible",
        "explained": "!",
    }
    earlier = [solved | {"problem": "HS7"}]
    methods = ("exact", "published-gaussian")
    board = _opt_board.make_board("rich", methods, 3, earlier)
    for line in (solved, none):
        board.begin(line["problem"], line["method"])
        board.add(line)
    board.close()
    shown = capsys.readouterr().out
    for part in ("exact", "2/2", "HS6", "KKT 4.6e-11", "f -", "2 ms", "infeasible"):
        assert part in shown
    assert "3/3" in shown
