"""Prompts to be answered by the model that is trained, with what judges the answers.

Knows no answer: rollouts make them. The columns of a row stay with its prompt, for the
rewards that ask for them by name.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpost.data._encode import Example, OnTooLong, encode_prompt, example_id
from jaxpost.data._errors import BadRows, OnBadRow
from jaxpost.data._load import load_encoded
from jaxpost.data._packing import TokenRow
from jaxpost.data._pairs import split_id
from jaxpost.data._records import Row
from jaxpost.data._tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Fields:
        id: the same for the same columns.
        tokens: what the model is to go on from, int32 `[P]`.
        columns: of the row, the prompt's own among them.
    """

    id: int
    tokens: np.ndarray
    columns: dict[str, Any]

    @property
    def texts(self) -> tuple[Example]:
        """The prompt as a text of which nothing is trained on."""
        return (Example(self.tokens, np.zeros(len(self.tokens), bool)),)


def load_prompts(
    path_or_name: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_too_long: OnTooLong = "refuse",
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    **reading: Any,
) -> list[Prompt]:
    """All prompts of a source, of rows of any kind that has one; answers are not read.

    Args:
        path_or_name: as in `load_rows`; so are `on_bad_row`, `report` and `reading`.
        tokenizer: the tokenizer.
        max_length: most tokens of a prompt.
        on_too_long: `refuse`: a longer prompt makes its row a bad one; a prompt that is
            cut would ask something else, so `truncate` is refused.

    Raises:
        BadRow, DataError, FileNotFoundError: as `load_examples`.
        ValueError: `on_too_long` is not `refuse`.
    """
    if on_too_long != "refuse":
        raise ValueError(
            f"on_too_long is {on_too_long!r}, but a prompt cut short asks something "
            "else: leave it at refuse (and on_bad_row at skip, to go on without)."
        )

    def encode(row: Row) -> Prompt:
        tokens = encode_prompt(row, tokenizer)
        if not tokens:
            raise row.bad(
                "empty_prompt",
                "the prompt has no tokens to continue",
                "remove the row, or use a tokenizer that begins texts with a token",
            )
        if max_length is not None and len(tokens) > max_length:
            raise row.bad(
                "too_long",
                f"the prompt has {len(tokens)} tokens, more than max_length "
                f"{max_length}",
                "shorten the prompt, raise data.max_length, or skip the row with "
                "data.on_bad_row skip",
            )
        columns = dict(row.columns)
        return Prompt(example_id(columns), np.asarray(tokens, np.int32), columns)

    return load_encoded(
        path_or_name, encode, on_bad_row=on_bad_row, report=report, **reading
    )


def number_prompts(
    prompts: Sequence[Prompt], lengths: Any = None, *, pad_id: int = 0
) -> list[TokenRow]:
    """Rows that stand for prompts in `Batches`: `number`, its place, int32 `[]`, and
    `example_id`, uint32 `[2]`. `lengths` and `pad_id` are not read."""
    del lengths, pad_id
    return [
        {"number": np.asarray(number, np.int32), "example_id": split_id(prompt.id)}
        for number, prompt in enumerate(prompts)
    ]
