"""A stage's settings: its config dataclass, with the defaults, then a YAML file, then the command line on top.

The command line and the jobs both come through here. What the settings mean is not known here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import fsspec
import tyro
import yaml

from mta_ray.files import replace_file
from mta_ray.object_store import open_store

ConfigT = TypeVar("ConfigT")


def load_settings(
    config_type: type[ConfigT], yaml_path: str | Path | None, overrides: Sequence[str], *, prog: str | None = None
) -> ConfigT:
    """The settings of one stage: defaults <- the YAML file <- overrides such as `--train.rank 8`.

    The checks of the dataclass itself run once, on the result: a file may be completed by overrides. What is wrong in
    the file is a ValueError; what is wrong on the command line ends the process with code 2 and tyro's message.
    """
    default = None if yaml_path is None else _from_yaml(config_type, str(yaml_path))
    if default is None:
        return tyro.cli(config_type, args=list(overrides), prog=prog)
    return tyro.cli(config_type, args=list(overrides), prog=prog, default=default)


def settings_of(config_type: type[ConfigT], raw: Mapping[str, Any], *, source: str) -> ConfigT:
    """Settings from plain values that some other program has read, checked; `source` says where they came from."""
    return cast(ConfigT, _checked(_dataclass(raw, config_type, source, key="")))


def save_settings(result: str | Path, config: Any) -> str:
    """Write the resolved settings beside a result, as `<result>.config.yaml`, and say where.

    The file given back as `--config` makes the same settings again.
    """
    path = f"{str(result).rstrip('/')}.config.yaml"
    text = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if "://" in path:
        place, _, name = path.rpartition("/")
        open_store(place).write(name, text.encode())
        return path

    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


# ---- YAML -> dataclass


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `on` and `2024-01-01` are text, `1e-4` is a number, a key stands once."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that any reader, this one or one of YAML 1.1, would take for something else."""


for _kind, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("int", r"[-+]?[0-9]+\Z", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))\Z",
        "-+.0123456789",
    ),
):
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list(_first))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"line {node.start_mark.line + 1}: key {key!r} is not text; put it in quotes")
        if keys.count(key) > 1:
            raise ValueError(f"line {node.start_mark.line + 1}: key {key!r} stands {keys.count(key)} times; keep one")
    return cast(dict[Any, Any], loader.construct_mapping(node, deep=True))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML reads 010 as octal 8


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def _from_yaml(config_type: type[ConfigT], path: str) -> ConfigT:
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            raw = yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"no settings file at {path}; check the path given to --config") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a settings file: {error}; give --config a YAML text file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}; mend that line") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return cast(ConfigT, _dataclass({} if raw is None else raw, config_type, path, key=""))


def _dataclass(raw: Any, config_type: type, file: str, key: str, base: Any = None) -> Any:
    """An instance with the values of the file and, for the rest, those of `base` or the defaults; not checked yet."""
    if not isinstance(raw, Mapping):
        raise _wrong(file, key, raw, "keys and values: " + ", ".join(_names(config_type)))
    unknown = [name for name in raw if name not in _names(config_type)]
    if unknown:
        raise ValueError(_unknown(file, key, unknown[0], list(_names(config_type))))

    hints = get_type_hints(config_type, include_extras=True)
    config: Any = object.__new__(config_type)
    for field in _fields(config_type):
        value = _default(field, base)
        if field.name in raw:
            value = _value(raw[field.name], hints[field.name], file, f"{key}.{field.name}".lstrip("."), value)
        object.__setattr__(config, field.name, value)
    return config


def _checked(config: Any) -> Any:
    """The same made by its constructor, so that its own checks run, and those of what it holds."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    values = {field.name: getattr(config, field.name) for field in _fields(type(config))}
    missing = [name for name, value in values.items() if value is tyro.MISSING]
    if missing:
        raise ValueError(f"{missing[0]} has no value; set it")
    return type(config)(**{name: _checked(value) for name, value in values.items()})


def _default(field: dataclasses.Field[Any], base: Any) -> Any:
    if dataclasses.is_dataclass(base):
        return getattr(base, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING  # tyro asks for it, unless an override gives it


def _value(raw: Any, hint: Any, file: str, key: str, base: Any = None) -> Any:
    """`raw` as a value of type `hint`; `base` is the default that a nested dataclass completes."""
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):  # Annotated[X, ...]
        return _value(raw, args[0], file, key, base)
    if origin in (Union, types.UnionType):
        return _member(raw, args, file, key, base)
    if origin is Literal:
        if not any(raw == choice and type(raw) is type(choice) for choice in args):
            raise _wrong(file, key, raw, "one of " + ", ".join(map(str, args)), nearest=list(map(str, args)))
        return raw
    if origin in (tuple, list, Sequence):
        return _sequence(raw, origin, args, file, key)
    if origin in (dict, Mapping):
        if not isinstance(raw, Mapping):
            raise _wrong(file, key, raw, "keys and values")
        return {name: _value(item, args[1], file, f"{key}.{name}") for name, item in raw.items()}
    if isinstance(hint, type):
        return _scalar(raw, hint, file, key, base)
    return raw  # Any


def _scalar(raw: Any, hint: type, file: str, key: str, base: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(raw, hint, file, key, base if isinstance(base, hint) else None)
    if issubclass(hint, Enum):
        names = [member.name for member in hint]
        if raw not in names:
            raise _wrong(file, key, raw, "one of " + ", ".join(names), nearest=names)
        return hint[raw]
    if hint is float and type(raw) is int:
        return float(raw)
    if issubclass(hint, Path) and isinstance(raw, str):
        return hint(raw)
    if type(raw) is hint or (hint is object):
        return raw
    raise _wrong(file, key, raw, {str: "text", Path: "a path", bool: "true or false"}.get(hint, f"a {hint.__name__}"))


def _member(raw: Any, members: tuple[Any, ...], file: str, key: str, base: Any) -> Any:
    """The value as the first member of the union that takes it."""
    if raw is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is not type(None):
            try:
                return _value(raw, member, file, key, base)
            except ValueError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(file, key, raw, " or ".join(getattr(member, "__name__", str(member)) for member in members))


def _sequence(raw: Any, origin: Any, items: tuple[Any, ...], file: str, key: str) -> Any:
    if not isinstance(raw, list):
        raise _wrong(file, key, raw, "a list, such as [a, b]")
    if origin is tuple and items[-1] is not Ellipsis:
        if len(raw) != len(items):
            raise _wrong(file, key, raw, f"a list of {len(items)} values")
        return tuple(
            _value(item, hint, file, f"{key}[{i}]") for i, (item, hint) in enumerate(zip(raw, items, strict=True))
        )
    values = [_value(item, items[0], file, f"{key}[{i}]") for i, item in enumerate(raw)]
    return values if origin is list else tuple(values)


def _fields(config_type: type) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(config_type) if field.init)


def _names(config_type: type) -> tuple[str, ...]:
    return tuple(field.name for field in _fields(config_type))


def _wrong(file: str, key: str, raw: Any, wanted: str, nearest: Sequence[str] = ()) -> ValueError:
    got = f"{raw!r} ({'nothing' if raw is None else type(raw).__name__})"
    return ValueError(f"{file}: {key or 'the file'} is {got}, wanted {wanted}{_hint(str(raw), nearest)}")


def _unknown(file: str, key: str, name: str, known: list[str]) -> str:
    where = f"{key}.{name}".lstrip(".")
    return f"{file}: no setting is called {where!r}{_hint(name, known)}; known here: {', '.join(known)}"


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- dataclass -> YAML


def _plain(value: Any) -> Any:
    """A value in YAML's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in _fields(type(value))}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a setting holds a {type(value).__name__}, wanted numbers, text, paths, lists or dataclasses")
