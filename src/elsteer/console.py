"""How the command speaks: one sentence per error, progress with the time left, no noise of the libraries below it.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a defect of elsteer, 2 something that the user can
mend, 3 no setting helps (see `NothingHelps`), 130 stopped with Ctrl-C,
141 the reader of its output went away.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from elsteer.errors import ElsteerError

__all__ = ["Application", "Invocation", "ProgressBars", "invocation", "note", "quiet", "screen"]

STOPPED = 130
_DEFECT = 1
_PIPE_CLOSED = 141  # as of a program that SIGPIPE ends
_LINE_EVERY = 5.0  # seconds between two lines about one stage where there is no terminal


def screen(*, stderr: bool = False) -> Console:
    """A rich console that takes no number or path of a user's text for markup."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def note(text: str) -> None:
    """A line on stderr about what is going on."""
    click.echo(text, err=True)


@dataclass
class Invocation:
    """What the command that is running knows of itself.

    command: as it was typed. debug: show tracebacks. kept: where finished work lies, said when it is stopped. interrupted:
    Ctrl-C was pressed, even where a library made another error of it.
    """

    command: str
    debug: bool = False
    kept: Path | None = None
    interrupted: bool = False


def invocation() -> Invocation:
    """That of the running command."""
    return click.get_current_context().ensure_object(Invocation)


class Application(click.Group):
    """A group of commands that ends every error in one sentence on stderr and in an exit code, never in a traceback."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run and exit. standalone_mode=False returns or raises instead, for use from Python; the rest is as in click."""
        words = list(sys.argv[1:] if args is None else args)
        name = prog_name or "elsteer"
        standalone = extra.pop("standalone_mode", True)
        told = Invocation(shlex.join([name, *words]))
        try:
            with _noticing_ctrl_c(told):
                result = super().main(words, name, standalone_mode=False, **{**extra, "obj": told})
            sys.stdout.flush()
        except Exception as error:
            if not standalone:
                raise
            sys.exit(_end(error, told))
        except SystemExit as left:
            # rich and click leave with 1 where the reader of stdout is gone; no command leaves so.
            sys.exit(_PIPE_CLOSED if left.code == 1 else left.code)
        if not standalone:
            return result
        sys.exit(result if isinstance(result, int) else 0)


@contextmanager
def _noticing_ctrl_c(told: Invocation) -> Iterator[None]:
    """Ctrl-C raises as ever and is noted too: compiled code, such as torch.asarray, turns it into an error of its own."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def raised(number: int, frame: FrameType | None) -> None:
        told.interrupted = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, raised)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(error: Exception, told: Invocation) -> int:
    """Say what happened; the exit code."""
    if told.debug:
        traceback.print_exception(error)
    if isinstance(error, click.Abort) or told.interrupted:
        kept = (
            "" if told.kept is None else f" Finished work is kept in {told.kept}: run the same command again to go on."
        )
        note(f"Stopped.{kept}")
        return STOPPED
    if isinstance(error, ElsteerError):
        note(f"Error: {error}")
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        note(error.format_message())
        return error.exit_code
    if isinstance(error, click.ClickException):
        note(f"Error: {_with_stop(error.format_message())}{_help_of(error)}")
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # such as `elsteer inspect X | head -1`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else Python complains once more when it flushes at its end
        return _PIPE_CLOSED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        note("Error: No space left on the disk: free some and run the same command again to go on.")
        return 2
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    ):
        note(
            "Error: The memory is full: give a smaller --dtype such as bfloat16, a smaller --batch-size, for a fit a smaller "
            "--training-refine-memory, or a smaller model."
        )
        return 2
    what = " ".join(str(error).split())[:300]
    hint = "" if told.debug else " Run it with --debug to see where, and please report it."
    note(f"Error: This is a defect of elsteer: {type(error).__name__}: {_with_stop(what)}{hint}")
    return _DEFECT


def _with_stop(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _help_of(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f" See `{context.command_path} --help`." if context is not None else ""


def quiet(debug: bool) -> None:
    """Silence the libraries below; elsteer's own warnings become lines on stderr. Call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        logging.basicConfig(level=logging.INFO)
        return
    warnings.simplefilter("ignore")
    logger = logging.getLogger("elsteer")
    if not logger.handlers:
        logger.addHandler(_Lines(logging.WARNING))
        logger.propagate = False


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """The message as a sentence."""
        text = record.getMessage()
        note(f"Note: {_with_stop(text[:1].upper() + text[1:])}")


class ProgressBars:
    """`progress(stage, done, total)` on stderr: bars on a terminal, else a line now and then. A context manager.

    A stage that begins again (the next setting that is tried) starts its bar anew.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or screen(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, _Stage] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done in `stage`."""
        if total == 0:
            return
        if self.console.is_terminal:
            self._bar(stage, done, total)
        else:
            self._line(stage, done, total)

    def _bar(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bars.start()
        if stage not in self._tasks:
            # What was done in an earlier run is no measure of speed: it is where the bar starts.
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done)
            return
        task = self._tasks[stage]
        if done < self._bars.tasks[self._bars.task_ids.index(task)].completed:
            self._bars.reset(task, total=total, completed=done)
        else:
            self._bars.update(task, total=total, completed=done)

    def _line(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        told = self._lines.get(stage)
        if told is None or done < told.done:
            told = self._lines[stage] = _Stage(now, done, said=now)
            note(f"{stage}: {done} of {total}")
            return
        told.done = done
        tenth = total > 0 and 10 * done // total > 10 * told.shown // total
        if (done >= total and told.shown < total) or (tenth and now - told.said >= _LINE_EVERY):
            left = (now - told.began) / max(1, done - told.first) * (total - done)
            rest = f", about {_clock(left)} left" if done < total else ""
            note(f"{stage}: {done} of {total}, {_clock(now - told.began)} so far{rest}")
            told.said, told.shown = now, done


@dataclass
class _Stage:
    began: float
    done: int
    said: float
    first: int = 0
    shown: int = 0

    def __post_init__(self) -> None:
        self.first = self.shown = self.done


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
