"""Prints what `data.check_data` finds in the rows of a config: `jaxpost data check`."""

import dataclasses
from typing import Any

from jaxpost import data
from jaxpost.recipes import _answer_rows, _setup


def print_check(config: Any) -> int:
    """Prints tokens with mask, label and segment, and the list of problems.

    Args:
        config: a recipe's config with model and data sections.

    Returns:
        How many kinds of problem are errors, over training and held-out rows.
    """
    import rich.console

    console = rich.console.Console()
    # A bad row is for the check below to find, not for the tokenizer's training.
    lenient = dataclasses.replace(config.data, on_bad_row="skip")
    tokenizer = _setup.open_tokenizer(config.model, lenient)
    errors = 0
    for of_eval in (False, True) if config.data.eval else (False,):
        reading = _setup.reading(config.data, of_eval=of_eval)
        reading.pop("on_bad_row")  # the doctor counts all of them
        check = data.check_data(
            tokenizer=tokenizer,
            negative_columns=_negative_columns(config, of_eval=of_eval),
            **reading,
            **_setup.encoding(config.data),
        )
        console.print(data.render_check(check, tokenizer))
        errors += sum(problem.severity == "error" for problem in check.problems)
    return errors


def _negative_columns(config: Any, *, of_eval: bool) -> int | None:
    """How many negatives of each row the recipe takes; None all, 0 none."""
    if not hasattr(config, "negatives"):
        return 0
    # Held-out rows may have fewer than the epochs of training take.
    return None if of_eval else _answer_rows.columns_wanted(config)
