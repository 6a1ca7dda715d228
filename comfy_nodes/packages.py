"""What a node says when a package that it needs isn't installed: the exact line that brings it.

The nodes import heavy packages when they are used, so that without one of them the others still load and work.
"""

import re
import sys
import tomllib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirement(name: str) -> str | None:
    """The project's requirement on a package, such as "diffusers>=0.42"; None if it has none."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return next((line for line in lines if re.split(r"[^\w-]", line)[0].replace("-", "_") == name), None)


def explained(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A node's `execute` that turns a missing package of the project into a message for the node.

    Raises:
        ImportError: with the line to run; other errors are left as they are.
    """

    @wraps(execute)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except ModuleNotFoundError as error:
            name = (error.name or "").split(".")[0]
            line = requirement(name)
            if line is None:
                raise
            raise ImportError(
                f'`{name}` must be installed for this node, but it is missing; run "{sys.executable}" -m pip install '
                f'"{line}" and start ComfyUI again.',
                name=name,
            ) from error

    return run
