"""What the demo prints: phases with their time, the table, samples, the receipt."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpost import data, evaluation, weights

TITLES = {
    "base": "base",
    "sft": "SFT",
    "self_rewarding_ppo": "Self-Rewarding PPO",
    "grpo": "GRPO",
}
"""What the models are called."""

PLATEAU = 0.02
"""A base model is at its plateau if its last two held-out losses differ by less, as a
share of the last."""


class Show:
    """Prints to the terminal and keeps the time of each phase."""

    def __init__(self, folder: pathlib.Path):
        import rich.console

        self.console = rich.console.Console(highlight=False)
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.console.print(f"run folder: {folder}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A headline before, the elapsed time after."""
        self.console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.console.print(f"{name}: {self.seconds[name]:.1f} s", style="dim")

    def tokenizer(self, tokenizer: data.Tokenizer, row: Mapping[str, Any]) -> None:
        """Its size, and how it cuts a problem."""
        text = row["prompt"].strip()
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        self.console.print(f"{tokenizer.vocab_size} tokens; a problem in pieces:")
        self.console.print("|".join(pieces), style="cyan", markup=False)

    def plateau(self, losses: Mapping[int, float]) -> None:
        """The base model's held-out losses, and whether they still fall."""
        values = list(losses.values())
        course = " \u2192 ".join(f"{value:.3f}" for value in values)
        self.console.print(f"held-out loss of the base model: {course} nats per token")
        if len(values) < 2:
            return
        change = (values[-2] - values[-1]) / values[-1]
        verdict = "a plateau" if change < PLATEAU else "still falling"
        self.console.print(
            f"in the last sixth of its steps it fell by {100 * change:.1f}%: {verdict}"
        )

    def table(
        self,
        drawn: Mapping[str, evaluation.ExactMatch],
        greedy: Mapping[str, evaluation.ExactMatch],
        optimised: int,
    ) -> None:
        """Exact match by grade and model, the grade marked that was optimised; of the
        likeliest answers only its, and the mean."""
        import rich.table

        table = rich.table.Table(
            title="exact match on held-out problems, %, answers drawn at temperature 1"
        )
        table.add_column("grade (steps)", justify="right")
        table.add_column("problems", justify="right")
        for name in drawn:
            table.add_column(TITLES[name], justify="right")
        table.add_column("GRPO - SFT", justify="right")
        one = next(iter(drawn.values()))
        for grade in sorted(one.groups(), key=str):
            mark = " *" if grade == optimised else ""
            _add_row(
                table,
                f"{grade}{mark}",
                one.count(grade),
                {name: match.accuracy(grade) for name, match in drawn.items()},
            )
        table.rows[-1].end_section = True
        for title, found in (("mean", drawn), ("mean, greedy", greedy)):
            _add_row(
                table,
                title,
                len(one.judged),
                {name: match.mean_accuracy() for name, match in found.items()},
            )
        _add_row(
            table,
            f"{optimised} *, greedy",
            one.count(optimised),
            {name: match.accuracy(optimised) for name, match in greedy.items()},
        )
        self.console.print(table)
        self.console.print(
            "* optimised by Self-Rewarding PPO and GRPO, both from SFT, without worked "
            "answers; greedy: the likeliest token each time",
            style="dim",
        )

    def samples(
        self,
        rows: Sequence[Mapping[str, Any]],
        found: Mapping[str, evaluation.ExactMatch],
    ) -> None:
        """Three problems with all models' answers: the first of grades 2 to 4."""
        grades = [row["grade"] for row in rows]
        for grade in (2, 3, 4):
            index = grades.index(grade)
            self._say(f"\ngrade {grade}: {rows[index]['prompt'].strip()}", "bold")
            for name, match in found.items():
                item = match.judged[index]
                verdict = "right" if item.correct else f"wrong, it is {item.answer}"
                said = item.completion.strip() or "(ends at once)"
                colour = "green" if item.correct else "yellow"
                self._say(f"{TITLES[name]} ({verdict}):\n{said}", colour)

    def figure(self, path: pathlib.Path | None) -> None:
        """Where it is, or why there is none."""
        self.console.print(
            f"figure: {path}"
            if path
            else "no figure: it needs matplotlib (pip install 'jaxpost[report]')"
        )

    def receipt(self, report: weights.ExportReport, same: bool) -> None:
        """What reloading the export showed."""
        size = report.total_bytes / 1e6
        self.console.print(
            f"{report.path}: {report.parameters:,} parameters, {size:.1f} MB, in "
            "Hugging Face layout"
        )
        self.console.print(
            f"reloaded: largest logit difference {report.max_logit_difference:.1e} (of "
            f"{report.max_logit:.1f}); a completion is "
            + ("repeated word by word" if same else "NOT the same")
        )

    def end(self) -> None:
        """Elapsed by phase, and where to look."""
        import rich.table

        table = rich.table.Table(title="elapsed, s")
        table.add_column("phase")
        table.add_column("s", justify="right")
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.1f}")
        table.rows[-1].end_section = True
        table.add_row("all", f"{sum(self.seconds.values()):.1f}")
        self.console.print(table)
        self._say(
            f"look further: jaxpost report {self.folder}/sft {self.folder}/grpo\n"
            f"and: jaxpost generate {self.folder}/export --temperature 0 --prompt "
            '"Mia has 12 pears. Then she buys 5 more pears. How many pears does Mia '
            'have now?\n"',
            "dim",
        )

    def _say(self, text: str, style: str) -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)


def _add_row(table: Any, title: str, count: int, shares: Mapping[str, float]) -> None:
    gain = 100 * (shares["grpo"] - shares["sft"])
    cells = [f"{100 * share:.1f}" for share in shares.values()]
    table.add_row(title, str(count), *cells, f"{gain:+.1f}")
