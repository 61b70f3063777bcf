"""YAML and command-line flags into a recipe's frozen dataclass, and back.

Values are coerced by the type of their field before the command-line library sees
them (YAML 1.1 reads `1e-4` as a string); an unknown key is an error that names the
nearest known one. Knows nothing of any recipe.
"""

import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and why."""


def read_yaml(path: str | pathlib.Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is no valid YAML mapping, or repeats a key.
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        pass

    def mapping(loader: UniqueKeys, node: yaml.MappingNode) -> dict:
        seen: dict = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{path}:{line}: key {key!r} is given twice.")
            seen[key] = loader.construct_object(value_node, deep=True)
        return seen

    UniqueKeys.add_constructor("tag:yaml.org,2002:map", mapping)
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(_unreadable(path, error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}).") from error
    try:
        value = yaml.load(text, Loader=UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected `section: ...` lines, got {value!r:.60}.")
    return value


def _unreadable(path: pathlib.Path, error: OSError) -> str:
    if path.exists():
        return f"{path}: cannot be read ({error.strerror})."
    folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
    names = [str(p) for p in sorted(folder.rglob("*.yaml"))] if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), names, 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{path}: no such config file.{hint}"


def from_mapping(
    schema: type[Schema], values: Mapping[str, Any], *, where: str = "config"
) -> Schema:
    """Build `schema` from nested mappings, checking names and coercing by type.

    Args:
        schema: a dataclass whose fields are dataclasses or plain values.
        values: nested mapping as read from YAML.
        where: what to call the source in messages.

    Raises:
        ConfigError: a key is unknown, or a value does not fit its field.
    """
    return _build(schema, values, where, "")


def _build(schema: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        name = prefix.rstrip(".") or "the whole"
        raise ConfigError(f"{where}: {name} must be a section, got {values!r:.60}.")
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(_unknown_key(str(key), schema, where, prefix))
        arguments[key] = _coerce(hints[key], value, where, f"{prefix}{key}")
    missing = [
        f"{prefix}{name}"
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given.")
    try:
        return schema(**arguments)
    except ValueError as error:
        place = f"{prefix.rstrip('.')}: " if prefix else ""
        raise ConfigError(f"{where}: {place}{error}") from error


def flat_names(schema: type, prefix: str = "") -> list[str]:
    """Every leaf key of a schema in dotted form, e.g. `optimizer.learning_rate`."""
    names = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            names += flat_names(kind, f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


def _unknown_key(key: str, schema: type, where: str, prefix: str) -> str:
    siblings = [field.name for field in dataclasses.fields(schema)]
    near = difflib.get_close_matches(key, siblings, 1, 0.6)
    section = prefix.rstrip(".")
    place = f" in section {section!r}" if section else ""
    hint = (
        f"Did you mean {near[0]!r}?"
        if near
        else f"Known keys there: {', '.join(siblings)}."
    )
    return f"{where}: unknown key {key!r}{place}. {hint}"


def _coerce(kind: Any, value: Any, where: str, name: str) -> Any:
    """`value` as `kind`, or a ConfigError that names the key."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _coerce_union(inner, value, where, name)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, {} if value is None else value, where, f"{name}.")
    if origin is Literal:
        if value in inner:
            return value
        near = difflib.get_close_matches(str(value), [str(v) for v in inner], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{where}: {name} must be one of {', '.join(map(str, inner))}, "
            f"got {value!r}.{hint}"
        )
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(_coerce(k, v, where, name) for k, v in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _coerce(inner[1], v, where, name) for k, v in value.items()}
    try:
        return _scalar(kind, value)
    except (TypeError, ValueError):
        expected = getattr(kind, "__name__", None) if origin is None else str(kind)
        raise ConfigError(
            f"{where}: {name} must be {expected}, got {value!r:.60} "
            f"({type(value).__name__})."
        ) from None


def _coerce_union(inner: Sequence[Any], value: Any, where: str, name: str) -> Any:
    if value is None and type(None) in inner:
        return None
    choices = [kind for kind in inner if kind is not type(None)]
    for kind in choices[:-1]:
        try:
            return _coerce(kind, value, where, name)
        except ConfigError:
            continue
    return _coerce(choices[-1], value, where, name)


def _scalar(kind: Any, value: Any) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float | str):
        if not isinstance(value, bool):
            return float(value)
    elif kind is int and not isinstance(value, bool):
        number = float(value)
        if number.is_integer():
            return value if isinstance(value, int) else int(number)
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str and isinstance(value, str | int | float):
        return str(value)
    raise TypeError


def to_mapping(config: Any) -> dict[str, Any]:
    """The resolved config as plain nested dicts and lists, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple | list):
            return [plain(inner) for inner in value]
        return value

    return plain(dataclasses.asdict(config))


def with_flags(config: Schema, flags: Sequence[str], *, prog: str) -> Schema:
    """`config` with `--section.key value` flags applied (by tyro).

    A wrong flag ends the program with status 2 and the nearest right one, `--help`
    with the list of all.
    """
    import tyro

    result = tyro.cli(
        type(config),
        args=list(flags),
        default=config,
        prog=prog,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    return typing.cast(Schema, result)
