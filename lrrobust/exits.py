"""How a command ends: its exit code, and the one line on standard error that explains a failure.

0 done, 1 `check` found a regression or `verify` an image that fools no more, 2 wrong input or a failure the message
explains, 70 a defect, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP, 141 nobody reads standard output.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from lrrobust.errors import ConfigError, LrRobustError
from lrrobust.interrupts import Stopped
from lrrobust.out_of_memory import explain_in_brief, is_out_of_memory

#: Mistakes on the command line. typer names only some of these classes, and each release has them elsewhere.
_UsageError = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

#: Commands that find again what they had finished.
_RESUMABLE = ("eval", "train")

#: Exit codes of what ends a command from outside, as shells number them, and of a defect (EX_SOFTWARE of sysexits.h).
_BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
_DEFECT = 70


class Interrupted(Exception):
    """Ctrl-C or a signal that ends, under a name that typer does not handle in its own way; says what it leaves."""

    def __init__(self, cause: BaseException, leaves: str | None = None) -> None:
        signum = cause.signum if isinstance(cause, Stopped) else signal.SIGINT
        how = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
        super().__init__(how if leaves is None else f"{how}: {leaves}")
        self.exit_code = 128 + signum


class _NobodyReads(Exception):
    """Standard output is a pipe whose reader has gone; a BrokenPipeError itself typer turns into exit code 1."""


class Commands(TyperGroup):
    """Commands whose end from outside reaches `run_command`, past typer, which has its own way with it."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as cause:
            leaves = "what was finished is kept, the same command goes on from there"
            raise Interrupted(cause, leaves if ctx.invoked_subcommand in _RESUMABLE else None) from None
        except BrokenPipeError:
            raise _NobodyReads from None
        except SystemExit as done:
            if _is_broken_pipe(done):
                raise _NobodyReads from None
            # No command ends so. With its exit code somebody else's code would speak for what was not done.
            raise LrRobustError(
                f"something called sys.exit({done.code!r}) before the command was done{_place_of(done)}: take that call out "
                "and run the same command again; what was finished is kept"
            ) from None


def _is_broken_pipe(done: SystemExit) -> bool:
    """rich, which writes typer's help, ends the process where nobody reads it."""
    return isinstance(done.__context__, BrokenPipeError)


def _place_of(error: BaseException) -> str:
    """Where an error was raised; nothing where Python does not say."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "" if at is None else f" ({at.tb_frame.f_code.co_filename}, line {at.tb_lineno})"


def run_command(app: typer.Typer, arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; failures become one line on standard error."""
    try:
        _require_text(arguments)
        # An exit code where the command chose one; what else commands return is None.
        code = app(arguments, prog_name="lrrobust", standalone_mode=False)
    except LrRobustError as error:
        # In one line whatever is named: GitHub takes lines that begin with `::` for commands.
        return _end(2, f"error: {' '.join(str(error).splitlines())}")
    except _UsageError as error:
        return _end(2, _explain_usage(error))
    except (Interrupted, KeyboardInterrupt, typer.Abort) as cause:
        # Before a command began, or after it ended, it is still what Python or typer raised.
        interruption = cause if isinstance(cause, Interrupted) else Interrupted(cause)
        return _end(interruption.exit_code, str(interruption))
    except (BrokenPipeError, _NobodyReads):
        return _end_unread()
    except OSError as error:
        # What none of us foresaw, yet no defect: a full disk behind standard output, a file system that went away.
        where = f" {error.filename}" if error.filename is not None else ""
        return _end(
            2,
            f"error: the system refused{where} ({error.strerror or error}); what was finished is kept; mend this and run the "
            "same command again",
        )
    except SystemExit as done:
        if _is_broken_pipe(done):
            return _end_unread()
        # How shells ask for completions.
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        if isinstance(error, ImportError) and not (error.name or "").startswith("lrrobust"):
            return _end(
                2,
                f"error: a library could not be loaded ({explain_in_brief(error)}); install the requirements again, or give "
                "the process more memory where that is limited",
            )
        if is_out_of_memory(error):
            return _end(
                2,
                f"error: memory ran out ({explain_in_brief(error)}); what was finished is kept; "
                "give a smaller --batch-size where the command has one, fewer or smaller images, or another device",
            )
        traceback.print_exc()
        plea = "please report it with the lines above; what was finished is kept"
        return _end(_DEFECT, f"error: this is a defect of lrrobust: {plea}")
    return code or 0


def _end(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


def _require_text(arguments: Sequence[str]) -> None:
    """Manifests and reports keep what was asked for, in UTF-8; file systems take any bytes for a name."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{argument!r}: expected text in {sys.getfilesystemencoding()}, found other bytes; rename the file or folder "
                "that is meant, or give a link to it"
            ) from None


def _end_unread() -> int:
    """Whoever reads, such as `head`, has enough; nothing more can be said there, not even when Python ends."""
    sys.stdout = open(os.devnull, "w")
    return _BROKEN_PIPE


def _explain_usage(error: _UsageError) -> str:
    """One line; without a command its list, which is what was missing."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).replace("Input should be", "expected")
    if context is None:
        return f"error: {message}"
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.format_message()
    return f"error: {message.rstrip('.')} (see `{context.command_path} --help`)"


class _Stream:
    """A standard stream that differs in how it fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StandardOutput(_Stream):
    """Its failures name it: Python knows no file that they are of. A sign that its encoding lacks is no failure."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # as standard error has it

    def write(self, text: str) -> int:
        with _of_standard_output():
            return self._stream.write(text)

    def flush(self) -> None:
        with _of_standard_output():
            self._stream.flush()


@contextmanager
def _of_standard_output() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


class Unheard(_Stream):
    """Standard error that may stop being read, or fill its disk: what is said there decides nothing."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def close(self) -> None:
        """Not by a model's file, whose output comes here."""
        self.flush()
