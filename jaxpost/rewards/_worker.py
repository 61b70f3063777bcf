"""Calling one reward function, here or in a process of its own.

Run as a script, this file is that process: it reads batches from a pipe and writes what
the function returned, until the pipe is closed or it is killed. It knows the standard
library only, so that a reward's process loads no more than the reward does.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class RewardError(ValueError):
    """Rewards that cannot be used; the message names the reward and what to do."""

    is_refusal = True  # a class of another process is another class


class Batch(NamedTuple):
    """Answers to be judged.

    Fields:
        prompts, completions: of each answer, text or messages.
        completion_ids: its tokens.
        columns: what the rows say besides, by name, one value per answer.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]


def load_function(name: str) -> Callable[..., Any]:
    """The function at `package.module:function`, found from the current folder too.

    Raises:
        RewardError: there is no such module or function; says where was looked.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, one that it needs is not
        raise RewardError(
            f"reward {name!r}: there is no module {error.name!r} in the current folder "
            f"({os.getcwd()}), on PYTHONPATH or installed."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RewardError(
                f"reward {name!r}: {found.__name__} has no {part!r}; it has "
                f"{', '.join(n for n in vars(found) if not n.startswith('_'))}."
            )
        found = getattr(found, part)
    if not callable(found):
        raise RewardError(f"reward {name!r} is no function but {type(found).__name__}.")
    return found


def make_function(name: str, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """A built-in reward with its settings, or a user's with these as arguments."""
    if ":" not in name:
        from jaxpost import rewards

        return rewards.by_name(name, **settings)
    function = load_function(name)

    def with_settings(**arguments: Any) -> Any:
        return function(**arguments, **settings)

    if not settings:
        return function
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in settings if key not in parameters]
    if unknown and not takes_any:
        raise RewardError(
            f"reward {name!r} takes no setting {unknown[0]!r}; it takes "
            f"{', '.join(parameters)}."
        )
    rest = [p for key, p in parameters.items() if key not in settings]
    with_settings.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
    return with_settings


def call_function(function: Callable[..., Any], batch: Batch) -> Any:
    """What `function` says of a batch; of a coroutine function, once it is done.

    It is given those of TRL's arguments that it takes, by name: `prompts`,
    `completions`, `completion_ids` and each column.

    Raises:
        RewardError: it needs a column that the rows lack.
    """
    arguments = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
    }
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # not of Python's making
        parameters = None
    if parameters is not None:
        needed = {
            key
            for key, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        for key in sorted(needed - arguments.keys()):
            raise missing_column(key, batch.columns)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {k: v for k, v in arguments.items() if k in parameters}
    result = function(**arguments)
    if inspect.isawaitable(result):
        import asyncio

        async def finished() -> Any:
            return await result

        return asyncio.run(finished())
    return result


def missing_column(name: str, columns: Mapping[str, Any]) -> RewardError:
    """The error of a reward that needs a column which the rows do not have."""
    return RewardError(
        f"it needs a column {name!r} and the rows have "
        f"{', '.join(map(repr, sorted(columns))) or 'none'}: name another in its "
        "settings, rename one with data.columns, or use other data."
    )


def describe_error(error: BaseException) -> str:
    """One line: the type, the message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = "".join(traceback.format_exception_only(error)).strip()
    return f"{text}{place}"


def main(descriptor: int) -> None:
    """Serves the pipe whose descriptor is given, until it is closed."""
    from multiprocessing.connection import Connection

    pipe = Connection(descriptor)
    path, name, settings = pipe.recv()
    sys.path[:] = path
    try:
        function = make_function(name, settings)
    except Exception as error:  # whatever the user's module raises
        pipe.send(("refused", _told(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            batch = Batch(*pipe.recv())
        except EOFError:
            return
        try:
            reply = ("result", call_function(function, batch))
        except Exception as error:  # whatever the user's function raises
            refused = getattr(error, "is_refusal", False)
            reply = ("refused" if refused else "error", _told(error))
        try:
            pipe.send(reply)
        except Exception as error:  # what it returned cannot be pickled
            text = f"what it returned cannot be sent: {describe_error(error)}"
            pipe.send(("error", text))


def _told(error: Exception) -> str:
    return str(error) if getattr(error, "is_refusal", False) else describe_error(error)


if __name__ == "__main__":
    main(int(sys.argv[1]))
