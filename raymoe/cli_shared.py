"""What all commands of `raymoe` share."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Json = Annotated[Path | None, typer.Option("--json", help="Write what is printed to this file, as JSON.")]


def shown_console() -> Console:
    """Wraps lines on a terminal only, so that a file has them whole, and tables in a file are not squeezed."""
    is_terminal = sys.stdout.isatty()
    return Console(soft_wrap=not is_terminal, width=None if is_terminal else 120)


def shown_command() -> str:
    """The command line as one would type it."""
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
