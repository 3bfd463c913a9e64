"""The command ``newton-summary``: ``report``, and what packages beside this one add to it."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TypeAlias

from newton_summary.errors import UsageError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_EPILOG = (
    "Exit codes: 0 done, 1 the run diverged, 2 a mistake that the message explains, 130 Ctrl-C, "
    "141 nobody reads the output any more."
)

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

UNREAD = 141
"""The exit code where nobody reads the output any more, as a shell has it of commands that this ends."""

GROUP = "newton_summary.commands"
"""The entry points of packages that add commands: each is a function ``add(commands)`` of the subparsers."""

_ELSEWHERE = ("demo", "train", "compare", "interactions", "search", "figures", "data")
"""What ``newton-summary-experiments`` adds: what is missing is told from what is misspelt."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows the program's name.  Default: those of this process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _print_what_can_be()
    parser, known = _parser()
    if arguments and arguments[0] in _ELSEWHERE and arguments[0] not in known:
        print(
            f"newton-summary: {arguments[0]} is a command of the package with the experiments: "
            "pip install 'newton-summary[experiments]'",
            file=sys.stderr,
        )
        return 2
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
        if sys.stdout is not None:  # as it is where the output is closed
            sys.stdout.flush()
        return code
    except (UsageError, ImportError) as error:
        print(f"newton-summary: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("newton-summary: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return UNREAD


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Adds a command to the subparsers, for its arguments to be added to.

    Args:
        commands: the subparsers.
        name: of the command.
        run: carries it out, and returns the exit code.
        text: what it does, in one sentence.
    """
    command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG)
    command.set_defaults(command=run)
    return command


def _print_what_can_be() -> None:
    """A stream that lacks a letter, such as the bar of H̄ in a pipe of Windows, gets a question mark, and no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def tell_paths(paths: Sequence[Path]) -> None:
    """Says what was written."""
    print("wrote")
    for path in paths:
        print(f"  {path}")


def _parser() -> tuple[argparse.ArgumentParser, set[str]]:
    """The parser, and the names of its commands."""
    parser = argparse.ArgumentParser(
        prog="newton-summary",
        description="How the layers of a network interact in its loss, a rate for each, and training by them.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"newton-summary {version('newton-summary')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for point in entry_points(group=GROUP):
        point.load()(commands)
    page = add_command(
        commands,
        "report",
        _report,
        "A web page about a training that a Monitor watched, or about a run or a comparison; one file, no network.",
    )
    page.add_argument(
        "run", type=Path, metavar="RUN", help="the file of Monitor(path=…), or the folder that train or compare wrote"
    )
    page.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN with the ending .html, or RUN/report.html)"
    )
    page.add_argument(
        "--number", type=int, metavar="N", help="which run, where several were appended to a file (default: the last)"
    )
    return parser, set(commands.choices)


def _report(options: argparse.Namespace) -> int:
    from newton_summary import report

    tell_paths([report.write(options.run, options.out, options.number)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
