"""The page: what it shows, that nothing in it can run, where it is written."""

import builtins
import html.parser
import json
import re
import xml.etree.ElementTree

import pytest
from run_folders import write_run

from jaxpost import reports


class Page(html.parser.HTMLParser):
    """Visible text by element, tags seen, and attributes that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
            self.inside = True
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def write(folders, out=None) -> str:
    return reports.write_report(folders, out).read_text(encoding="utf-8")


def polylines(page: str, title: str) -> int:
    """How many curves the panel of a metric has."""
    pattern = rf"<figcaption>{re.escape(title)}</figcaption>(<svg.*?</svg>)"
    match = re.search(pattern, page, re.DOTALL)
    assert match, f"no panel {title!r}"
    root = xml.etree.ElementTree.fromstring(match.group(1))
    colors = ("#1f77b4", "#d62728")
    paths = [e for e in root.iter() if e.tag.endswith("path")]
    styles = [path.get("style", "") for path in paths if path.get("clip-path")]
    return sum(any(f"stroke: {color}" in s for color in colors) for s in styles)


def test_one_run(tmp_path):
    page = write([write_run(tmp_path / "words")])
    parsed = Page(page)
    assert parsed.tags.count("svg") == 2  # loss with eval_loss, tokens_per_s
    assert polylines(page, "loss") == 2
    assert "words (to step 5)" in page
    for cell in ("optimizer.learning_rate", "0.001", "device.kind", "1 + 1 =", " 2"):
        assert cell in parsed.cells
    assert parsed.cells[:6] == ["eval_loss", "2.5", "2", "2", "2.5", "5"]


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    parsed = Page(write([write_run(tmp_path / "run")]))
    assert "script" not in parsed.tags
    assert all(link.startswith("#") for link in parsed.links)


def test_two_runs_share_axes_and_show_what_differs(tmp_path):
    first = write_run(tmp_path / "slow")
    second = write_run(tmp_path / "fast", learning_rate=3e-3, loss=1.5)
    page = write([first, second], tmp_path / "both.html")
    assert (tmp_path / "both.html").exists()
    assert polylines(page, "loss") == 4
    apart, alike = page.split("<h2>Configuration</h2>")[1].split("<details>")[:2]
    assert Page(apart).cells == ["optimizer.learning_rate", "0.001", "0.003"]
    assert "2 keys are the same" in alike
    assert "optimizer.b1" in alike
    assert "<p>No difference.</p>" in page.split("<h2>Environment</h2>")[1]
    assert "1 (1 to 1.4)" in page  # loss of the second run: last (smallest to largest)


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    folder = write_run(
        tmp_path / "a<b>&c", samples=[{evil: evil, "n": {"x": evil}, "lone": "\ud800"}]
    )
    lines = [json.dumps({"step": step, evil: step, "$x_{$": 1.0}) for step in (6, 7)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join([*lines, "<b>broken</b>", ""]))
    (folder / "config.yaml").write_text(json.dumps({evil: {evil: evil}}))
    page = write([folder])
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert "<script" not in page
    assert evil in parsed.cells
    assert f"{evil}.{evil}" in parsed.cells


def test_broken_lines_are_named_on_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert "metrics.jsonl:8: the last line is cut off" in write([folder])


def test_values_that_are_not_finite_and_single_points(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = ['{"step": 1, "loss": NaN, "once": 1}', '{"step": 2, "loss": Infinity}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write([folder])
    assert "<figcaption>loss</figcaption>" in page
    assert "<figcaption>once</figcaption>" not in page
    assert Page(page).cells[:6] == ["loss", "nan", "inf", "nan", "nan", "2"]


def test_long_runs_stay_small(tmp_path):
    folder = write_run(
        tmp_path / "run", steps=20_000, samples=[{"n": n} for n in range(1000)]
    )
    page = write([folder])
    assert len(page) < 400_000
    assert "200 of 1000 samples" in page
    assert "999" in Page(page).cells
    assert "799" not in Page(page).cells


def test_where_it_is_written(tmp_path):
    folder = write_run(tmp_path / "run")
    assert reports.write_report([folder]) == folder / "report.html"
    assert reports.write_report([folder], tmp_path) == tmp_path / "report.html"
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(reports.ReportError, match="does not exist; make it"):
        reports.write_report([folder], tmp_path / "no" / "x.html")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'jaxpost\[report\]'"):
        reports.write_report([folder])
    assert not (folder / "report.html").exists()
