"""What the columns of a row mean: TRL's conventions, and the ways to arrive at them.

Renames columns, unfolds the Alpaca and ShareGPT layouts, checks types, and names the
kind of row. Knows no tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxpost.data._records import Row
from jaxpost.data._sources import nearest

Kind = Literal[
    "text",
    "messages",
    "prompt_completion",
    "prompt",
    "preference",
    "implicit_preference",
    "unpaired",
]
Format = Literal["trl", "alpaca", "sharegpt"]
TEXT_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool", "developer")

_KINDS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("preference", ("prompt", "chosen", "rejected")),
    ("implicit_preference", ("chosen", "rejected")),
    ("unpaired", ("prompt", "completion", "label")),
    ("prompt_completion", ("prompt", "completion")),
    ("messages", ("messages",)),
    ("text", ("text",)),
    ("prompt", ("prompt",)),
)
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def normalize_row(
    row: Row,
    *,
    columns: Mapping[str, str] | None = None,
    format: Format = "trl",
    prompt_suffix: str = "",
) -> Row:
    """The row under TRL's column names, with the types of its text columns checked.

    Args:
        row: as read.
        columns: TRL's name to the source's, such as
            `{"prompt": "question", "completion": "answer"}`; the other way round is
            understood too. Columns not named keep their names.
        format: `"trl"` as is; `"alpaca"` makes `prompt` and `completion` of
            `instruction`, `input` and `output`; `"sharegpt"` makes `messages` (or, with
            `chosen` and `rejected`, a preference) of `conversations`.
        prompt_suffix: put behind a `prompt` that is a string, such as a line break
            between question and answer.

    Returns:
        A new row; extra columns are kept.

    Raises:
        BadRow: reasons `wrong_column`, `wrong_type`.
        ValueError: the setting `columns` or `format` makes no sense.
    """
    values = dict(row.columns)
    if columns:
        values = _rename(row, values, columns)
    if format == "alpaca":
        values = _from_alpaca(row, values)
    elif format == "sharegpt":
        values = _from_sharegpt(row, values)
    elif format != "trl":
        known = ("trl", "alpaca", "sharegpt")
        raise ValueError(
            f"format must be one of {', '.join(known)}, got {format!r}"
            f"{nearest(str(format), known)}."
        )
    if prompt_suffix and isinstance(values.get("prompt"), str):
        values["prompt"] += prompt_suffix
    result = dataclasses.replace(row, columns=values)
    for name in TEXT_COLUMNS:
        if name in values:
            _check_text(result, name)
    if "label" in values and "completion" in values:
        _check_label(result)
    return result


def row_kind(row: Row) -> Kind:
    """Which of TRL's kinds of row this is, by the columns it has.

    Raises:
        BadRow: reason `wrong_column`: no kind fits; the message names what is there and
            what is nearest.
    """
    for kind, needed in _KINDS:
        if all(row.columns.get(name) is not None for name in needed):
            # A bare `label` beside text (classes, say) is an extra column.
            if kind == "unpaired" and not isinstance(row.columns["label"], bool):
                continue
            return kind
    raise row.bad(
        "wrong_column",
        f"has the columns {_names(row.columns)}, which is no known kind of row"
        f"{_nearest_columns(row)}",
        "name them text, messages, prompt + completion, or chosen + rejected, or map "
        "them with `columns`",
    )


def _nearest_columns(row: Row) -> str:
    for name in row.columns:
        if name not in TEXT_COLUMNS and (hint := nearest(name, TEXT_COLUMNS)):
            return f"; {name!r}{hint}"
    present = [name for name in TEXT_COLUMNS if name in row.columns]
    partner = {"completion": "prompt", "chosen": "rejected", "rejected": "chosen"}
    for name in present:
        if name in partner:
            return f"; {name!r} needs {partner[name]!r} beside it"
    return ""


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(repr, columns))) or "none"


def _rename(
    row: Row, values: dict[str, Any], columns: Mapping[str, str]
) -> dict[str, Any]:
    to_trl: dict[str, str] = {}
    for left, right in columns.items():
        if left in (*TEXT_COLUMNS, "label"):
            to_trl[right] = left
        elif right in (*TEXT_COLUMNS, "label"):
            to_trl[left] = right
        else:
            raise ValueError(
                f"columns: neither {left!r} nor {right!r} is one of "
                f"{', '.join((*TEXT_COLUMNS, 'label'))}."
            )
    for name in to_trl:
        if name not in values:
            raise row.bad(
                "wrong_column",
                f"has no column {name!r}{nearest(name, values)}, only {_names(values)}",
                "correct the setting `columns`",
            )
    return {
        to_trl.get(name, name): value
        for name, value in values.items()
        if name in to_trl or name not in to_trl.values()
    }


def _from_alpaca(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    for name in ("instruction", "output"):
        _need(row, values, name, "alpaca")
    for name in ("instruction", "input", "output"):
        if not isinstance(values.get(name) or "", str):
            raise _type_error(row, name, values[name], "a string")
    prompt = values.pop("instruction")
    extra = values.pop("input", None)
    values["prompt"] = f"{prompt}\n\n{extra}" if extra else prompt
    values["completion"] = values.pop("output")
    # Instruction data are conversations: the chat template frames them.
    values["prompt"] = [{"role": "user", "content": values["prompt"]}]
    values["completion"] = [{"role": "assistant", "content": values["completion"]}]
    return values


def _from_sharegpt(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    _need(row, values, "conversations", "sharegpt")
    turns = values.pop("conversations")
    if not isinstance(turns, list):
        raise _type_error(row, "conversations", turns, "a list of {from, value}")
    messages = [_sharegpt_turn(row, "conversations", turn) for turn in turns]
    if isinstance(values.get("system"), str) and values["system"]:
        messages.insert(0, {"role": "system", "content": values.pop("system")})
    if "chosen" not in values:
        values["messages"] = messages
        return values
    values["prompt"] = messages
    for name in ("chosen", "rejected"):
        _need(row, values, name, "sharegpt")
        values[name] = [_sharegpt_turn(row, name, values[name])]
    return values


def _sharegpt_turn(row: Row, name: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise _type_error(row, name, turn, "{from, value}")
    role = _SHAREGPT_ROLES.get(turn["from"])
    if role is None:
        raise row.bad(
            "wrong_type",
            f"{name!r} has the speaker {turn['from']!r}",
            f"use one of {', '.join(_SHAREGPT_ROLES)}",
        )
    return {"role": role, "content": turn["value"]}


def _need(row: Row, values: Mapping[str, Any], name: str, format: str) -> None:
    if name not in values:
        raise row.bad(
            "wrong_column",
            f"has no column {name!r}{nearest(name, values)}, only {_names(values)}",
            f"the format {format!r} needs it; choose another `format`",
        )


def _check_text(row: Row, name: str) -> None:
    value = row.columns[name]
    if value is None:
        return
    if isinstance(value, str) and name != "messages":
        return
    if name == "text" or not isinstance(value, list):
        wanted = "a string" if name == "text" else "a list of {role, content}"
        if name not in ("text", "messages"):
            wanted = "a string or a list of {role, content}"
        raise _type_error(row, name, value, wanted)
    for index, message in enumerate(value):
        check_message(row, f"{name}[{index}]", message)
    if not value:
        raise row.bad(
            "wrong_type", f"{name!r} is an empty list", "remove the row, or fill it"
        )


def check_message(row: Row, where: str, message: Any) -> None:
    """Refuses what is no `{role, content}`; `where` names it."""
    if not isinstance(message, dict) or "role" not in message:
        raise _type_error(row, where, message, "{role, content}")
    if message["role"] not in ROLES:
        raise row.bad(
            "wrong_type",
            f"{where!r} has the role {message['role']!r}"
            f"{nearest(str(message['role']), ROLES)}",
            f"use one of {', '.join(ROLES)}",
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise _type_error(row, f"{where}.content", content, "a string")


def _check_label(row: Row) -> None:
    label = row.columns["label"]
    if isinstance(label, str) and label.lower() in ("true", "false", "0", "1"):
        raise _type_error(row, "label", label, "true or false")


def _type_error(row: Row, name: str, value: Any, wanted: str):
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return row.bad(
        "wrong_type",
        f"{name!r} is {type(value).__name__} {shown} where {wanted} is expected",
        "correct the row, or map another column with `columns`",
    )


def split_preference(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected answer of a preference row.

    Where there is no `prompt`, it is what both answers begin with: the messages they
    share; or, of strings, the text up to the last common `Assistant:` (the layout of
    hh-rlhf), else the common characters, less a blank at the end (as TRL does).

    Raises:
        BadRow: reasons `wrong_column`, `wrong_type`, `equal_pair`.
    """
    kind = row_kind(row)
    if kind not in ("preference", "implicit_preference"):
        raise row.bad(
            "wrong_column",
            f"has no pair of answers, only {_names(row.columns)}",
            "give chosen and rejected, or map them with `columns`",
        )
    chosen, rejected = row.columns["chosen"], row.columns["rejected"]
    if chosen == rejected:
        raise row.bad(
            "equal_pair", "chosen and rejected are the same", "remove the row"
        )
    if kind == "preference":
        return _without_prompt(row.columns["prompt"], chosen, rejected)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.bad(
            "wrong_type",
            "one of chosen and rejected is a string, the other a list of messages",
            "write both the same way",
        )
    same = next(
        (k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, str):
        mark = "\n\nAssistant:"
        place = chosen.rfind(mark, 0, same)
        if place >= 0:
            same = place + len(mark)
        elif same and chosen[same - 1] == " ":
            same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def _without_prompt(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Drops the prompt's messages where the answers repeat them (UltraFeedback)."""
    opening = prompt
    if isinstance(prompt, str):
        opening = [{"role": "user", "content": prompt}]
    count = len(opening)
    repeats = all(
        isinstance(answer, list) and len(answer) > count and answer[:count] == opening
        for answer in (chosen, rejected)
    )
    if repeats:
        return opening, chosen[count:], rejected[count:]
    return prompt, chosen, rejected
