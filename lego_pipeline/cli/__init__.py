"""The `lego` command: one module per subcommand, each a dataclass of its flags with a `run` method.

Nothing heavy is imported before a subcommand runs, so `lego --help` answers at once. Exit codes: 0 everything asked
for was written, 1 something failed on the way, 2 the request itself cannot be served (nothing is written then).
"""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import tyro

from lego_pipeline.cli.app import App
from lego_pipeline.cli.convert import Convert
from lego_pipeline.cli.demo import Demo
from lego_pipeline.cli.doctor import Doctor
from lego_pipeline.cli.enhance import Enhance
from lego_pipeline.cli.evaluate import Evaluate
from lego_pipeline.cli.generate import Generate
from lego_pipeline.cli.study import Study
from lego_pipeline.cli.study_report import StudyReport
from lego_pipeline.cli.swap import Swap

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Enhance, tyro.conf.subcommand("enhance")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Swap, tyro.conf.subcommand("swap")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[App, tyro.conf.subcommand("app")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[StudyReport, tyro.conf.subcommand("study-report")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lego` with these arguments (default: those of the process) and return its exit code."""
    command = tyro.cli(
        Command,
        prog="lego",
        description="Draws action frames: an egocentric frame and an action in, the same scene with hands acting out.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel for 4-bit weights on some CPUs
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
        try:
            return command.run()
        except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, ImportError) as error:
            return _refuse(error, 2, as_json=command.json)
        except (OSError, RuntimeError) as error:
            return _refuse(error, 1, as_json=command.json)
        except KeyboardInterrupt:
            print("lego: interrupted; run the same command again to go on", file=sys.stderr)
            return 130


def _refuse(error: Exception, code: int, as_json: bool) -> int:
    """Say what is wrong in one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"lego: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"ok": False, "error": message}))
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in one line, without the source line that gave it."""
    print(f"lego: warning: {' '.join(str(message).split())}", file=sys.stderr)
