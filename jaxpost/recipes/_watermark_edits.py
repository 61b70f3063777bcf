"""What somebody may do to marked code before a detector sees it."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxpost import data, prompts

RATES = (0.1, 0.3)
KINDS: tuple[prompts.TokenEdit, ...] = ("substitute", "delete", "insert")


class Edited(NamedTuple):
    """An answer after an edit: its text, or None where the edit needs Python."""

    name: str
    texts: list[str | None]


def edits(
    tokenizer: data.Tokenizer,
    tasks: Sequence[prompts.CodeTask],
    answers: Sequence[str],
    *,
    seed: int,
) -> list[Edited]:
    """Every edit of every answer; chance goes by the seed and the answer's place."""
    pool = sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids)
    found = [Edited("none", list(answers))]
    for kind in KINDS:
        for rate in RATES:
            texts: list[str | None] = []
            for place, text in enumerate(answers):
                ids = prompts.edit_items(
                    tokenizer.encode(text),
                    kind=kind,
                    rate=rate,
                    pool=pool,
                    rng=random.Random(f"{seed} {kind} {rate} {place}"),
                )
                texts.append(tokenizer.decode(ids))
            found.append(Edited(f"{kind} {rate:.0%}", texts))
    for name, edit in (
        ("rename variables", prompts.rename_variables),
        ("drop comments", prompts.drop_comments),
    ):
        changed = [
            _edit(edit, task, text) for task, text in zip(tasks, answers, strict=True)
        ]
        found.append(Edited(name, changed))
    return found


def _edit(edit: Callable[..., str], task: prompts.CodeTask, text: str) -> str | None:
    start = len(task.source(""))
    try:
        return edit(task.source(text), start=start)[start:]
    except (SyntaxError, ValueError, RecursionError):
        return None
