"""What the demo prints: phases with their time, the table, samples, the receipt."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpost import data, evaluation, weights

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
        self, before: evaluation.ExactMatch, after: evaluation.ExactMatch
    ) -> None:
        """Exact match by grade, before and after."""
        import rich.table

        table = rich.table.Table(title="exact match on held-out problems, %")
        for name in ("grade (steps)", "problems", "before", "after", "gain"):
            table.add_column(name, justify="right")
        shares = [
            (f"{g}", str(after.count(g)), before.accuracy(g), after.accuracy(g))
            for g in sorted(after.groups(), key=str)
        ]
        total = (before.mean_accuracy(), after.mean_accuracy())
        for name, count, old, new in [
            *shares,
            ("mean of grades", str(len(after.judged)), *total),
        ]:
            gain = f"{100 * (new - old):+.1f}"
            table.add_row(name, count, f"{100 * old:.1f}", f"{100 * new:.1f}", gain)
        table.rows[-2].end_section = True
        self.console.print(table)

    def samples(
        self,
        rows: Sequence[Mapping[str, Any]],
        before: evaluation.ExactMatch,
        after: evaluation.ExactMatch,
    ) -> None:
        """Three problems with both models' answers: the first of grades 2 to 4."""
        grades = [row["grade"] for row in rows]
        for grade in (2, 3, 4):
            index = grades.index(grade)
            old, new = before.judged[index], after.judged[index]
            self._say(f"\ngrade {grade}: {new.prompt.strip()}", "bold")
            self._say(f"before: {old.completion.strip() or '(ends at once)'}", "red")
            verdict = "right" if new.correct else f"wrong, it is {new.answer}"
            colour = "green" if new.correct else "yellow"
            self._say(f"after ({verdict}):\n{new.completion}", colour)

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
            f"look further: jaxpost report {self.folder}/base {self.folder}/sft\n"
            f"and: jaxpost generate {self.folder}/export --temperature 0 --prompt "
            '"Mia has 12 pears. Then she buys 5 more pears. How many pears does Mia '
            'have now?\n"',
            "dim",
        )

    def _say(self, text: str, style: str) -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)
