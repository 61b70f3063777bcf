"""The command line: help, nearest names, exit statuses; one real run of each verb."""

import subprocess
import sys

import pytest

from jaxpost import cli


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_names_every_verb(arguments, capsys):
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for verb in ("train", "generate", "convert", "data check", "report", "demo"):
        assert f"  {verb} " in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "Did you mean 'jaxpost train'"),
        (["data", "chekc"], "Did you mean 'jaxpost data check'"),
        (["graph", "trian"], "Did you mean 'jaxpost graph train'"),
        (["qqq"], "See 'jaxpost --help'"),
        (["train"], "needs a config file first"),
        (["train", "configs/sft/storys.yaml"], "no such config file"),
    ],
)
def test_wrong_words_end_with_status_2_and_one_line(
    arguments, expected, capsys, monkeypatch
):
    monkeypatch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_each_verb_has_complete_help(verb, monkeypatch, capsys):
    monkeypatch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: jaxpost" in shown
    documented = {
        "train": "--optimizer.learning-rate",
        "plan": "--chip",
        "verify-resume": "--kills",
        "data check": "--data.train",
        "graph train": "--objective.temperature",
        "graph embed": "--projection",
        "graph probe": "--protocol",
        "graph convert": "--repair",
        "generate": "--max-new-tokens",
        "negatives": "--max-redraws",
        "score": "--reference-free",
        "opt": "--suite",
        "watermark generate": "--delta",
        "watermark detect": "--z-threshold",
        "watermark calibrate": "--false-positive-rate",
        "watermark eval": "--unsafe-sandbox",
        "convert": "--max-shard-bytes",
        "report": "--out",
        "demo": "--seed",
    }
    assert documented[verb] in shown


def test_a_wrong_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "a", "b", "--max-shard-byte", "3"])
    assert stop.value.code == 2
    assert "--max-shard-bytes" in capsys.readouterr().err


def test_computing_verbs_restart_with_huge_pages():
    """glibc reads the setting at process start, so it must arrive by `exec`."""
    code = (
        "import os, sys; from jaxpost import cli\n"
        "cli.VERBS['demo'] = cli.Verb("
        "lambda rest: print(os.environ['GLIBC_TUNABLES'], *rest), computes=True)\n"
        "sys.argv[1:] = ['demo', '--seed', '3']\n"
        "cli.main()\n"
    )
    if sys.platform != "linux":
        pytest.skip("glibc tunables exist on Linux only")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin", "GLIBC_TUNABLES": "glibc.malloc.check=0"},
    )
    assert done.stdout.split() == [
        "glibc.malloc.check=0:glibc.malloc.hugetlb=1",
        "--seed",
        "3",
    ]
