"""One flat dataclass per training script serves its config file and its flags: defaults < `--config` < flags.

A config file holds either the settings of one script, or sections named after scripts (`tune_vlm:`, `train_ldm:`), of
which a script reads its own; the name is that of its dataclass, `TrainLdmConfig` reads `train_ldm`.
"""

import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

logger = logging.getLogger(__name__)

Config = TypeVar("Config")


def run(main: Callable[[Config], None], config_class: type[Config], description: str | None = None) -> None:
    """A script's `main` with its settings, logging at level info; a mistake ends it with one line and exit code 1.

    Args:
        main: takes the settings.
        config_class: see `parse_config`.
        description: the script's docstring.
    """
    config = parse_config(config_class, description)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file of a state
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel for 4-bit weights on some CPUs
    try:
        main(config)
    except (ValueError, OSError, ImportError) as error:
        logger.debug("ended by", exc_info=True)
        print(f"error: {_own_words(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _own_words(error: Exception) -> str:
    """An error's message in one line; of one that a data loader's worker hands over with its traceback, the end."""
    text = str(error)
    if "Original Traceback (most recent call last)" in text:
        frames = text.rsplit("Traceback (most recent call last):\n", 1)[1].splitlines()
        first = next(i for i, line in enumerate(frames) if line and not line.startswith(" "))
        text = " ".join(frames[first:]).partition(": ")[2] or frames[first]
    return " ".join(text.split()) or type(error).__name__


def section_of(config_class: type) -> str:
    """Name of a script's section in a config file: `train_ldm` of `TrainLdmConfig`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", config_class.__name__.removesuffix("Config")).lower()


def parse_config(
    config_class: type[Config], description: str | None = None, arguments: Sequence[str] | None = None
) -> Config:
    """Reads a script's settings from `--config FILE.yaml` and flags; `--dry-run` prints them and exits.

    Args:
        config_class: keyword-only dataclass with flat fields; its `__post_init__` checks ranges and raises ValueError.
            `report() -> str`, if it has one, is printed by `--dry-run` below the settings, as comments.
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
        report = config.report() if dry_run and hasattr(config, "report") else ""
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    if dry_run:
        print(to_yaml(config), *(f"# {line}".rstrip() + "\n" for line in report.splitlines()), sep="", end="")
        raise SystemExit(0)
    return config


def to_yaml(config: Any) -> str:
    """The settings as YAML that `--config` reads back."""
    return yaml.safe_dump(plain_values(config), sort_keys=False)


def plain_values(config: Any) -> dict[str, Any]:
    """The settings as YAML and JSON hold them: paths as text, tuples as lists."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(content).__name__}.")
    fields = [field.name for field in dataclasses.fields(config_class)]  # ty: ignore[invalid-argument-type]
    hints = get_type_hints(config_class)
    values = _section(config_class, content, path)
    for key in values:
        if key not in fields:
            raise ValueError(f"{path}: unknown setting `{key}`; {_nearest(key, fields)}")
        values[key] = _converted(values[key], hints[key], f"{path}: `{key}`")
    return values


def _section(config_class: type, content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of one script: a file without sections as it is, otherwise the script's own section."""
    sections = [name for name, value in content.items() if isinstance(value, dict)]
    if not sections:
        return content
    # A section without a line in it reads as null.
    loose = [name for name, value in content.items() if value is not None and name not in sections]
    if loose:
        raise ValueError(
            f"{path} must hold either settings or sections named after scripts, got `{loose[0]}` beside the section "
            f"`{sections[0]}`; move it into a section."
        )
    own = section_of(config_class)
    if own not in content:
        raise ValueError(f"{path} must have a section `{own}` for this script; {_nearest(own, list(content))}")
    return content[own] or {}


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known are {', '.join(map(str, known))}."


def _converted(value: Any, hint: Any, name: str) -> Any:
    """A value from YAML in the type of its field."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for member in members:
        try:
            return _as_type(value, member)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"{name} must be {' or '.join(_spelt(member) for member in members)}, got {value!r}.")


def _as_type(value: Any, hint: Any) -> Any:
    """A value from YAML as one type without alternatives; TypeError or ValueError if it is not of that type."""
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    if get_origin(hint) is tuple and isinstance(value, list):
        kind = get_args(hint)[0]
        return tuple(_as_type(item, kind) for item in value)
    if type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 takes 1e-3, without a point, for text
    raise TypeError


def _spelt(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_spelt(get_args(hint)[0])}"
    return "null" if hint is NoneType else hint.__name__


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
