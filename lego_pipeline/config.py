"""One flat dataclass per training script serves its config file and its flags: defaults < `--config` < flags."""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config], description: str | None = None, arguments: Sequence[str] | None = None
) -> Config:
    """Reads a script's settings from `--config FILE.yaml` and flags; `--dry-run` prints them and exits.

    Args:
        config_class: keyword-only dataclass with flat fields; its `__post_init__` checks ranges and raises ValueError.
        description: shown by `--help`, usually the script's docstring.
        arguments: instead of the command line, for tests.

    Returns:
        The settings. A mistake in file or flags ends the program with one line on standard error and exit code 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        path, arguments = _take_option(arguments, "--config")
        values = _read_yaml(config_class, Path(path)) if path else {}
        missing = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(config_class)  # ty: ignore[invalid-argument-type]
            if field.default is field.default_factory is dataclasses.MISSING
        }
        dry_run = "--dry-run" in arguments
        arguments = [argument for argument in arguments if argument != "--dry-run"]
        default = _without_checks(config_class, {**missing, **values})
        shared = "--config FILE.yaml gives defaults for the flags below; --dry-run prints the settings and stops."
        text = f"{description or config_class.__doc__}\n\n{shared}"
        config = tyro.cli(config_class, description=text, args=arguments, default=default)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if dry_run:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def to_yaml(config: Any) -> str:
    """The settings as YAML that `--config` reads back."""
    values = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False)


def _take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise ValueError(f"`{name}` must be followed by a file.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _read_yaml(config_class: type, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`--config` must be a YAML file, found none at {path}.")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}.")
    fields = [field.name for field in dataclasses.fields(config_class)]  # ty: ignore[invalid-argument-type]
    hints = get_type_hints(config_class)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(fields)}."
            raise ValueError(f"{path}: unknown setting `{key}`; {hint}")
        values[key] = _converted(values[key], hints[key], f"{path}: `{key}`")
    return values


def _converted(value: Any, hint: Any, name: str) -> Any:
    """A value from YAML in the type of its field."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = [get_origin(member) or member for member in members]
    if type(value) in kinds:
        return value
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-3, without a point, for text
        except ValueError:
            pass
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name} must be {expected}, got {value!r}.")


def _without_checks(config_class: type[Config], values: dict[str, Any]) -> Config:
    """An instance for tyro to fill, made without `__post_init__`, which cannot see required values yet."""
    default = object.__new__(config_class)
    for field in dataclasses.fields(config_class):  # ty: ignore[invalid-argument-type]
        if field.name in values:
            value = values[field.name]
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        object.__setattr__(default, field.name, value)
    return default
