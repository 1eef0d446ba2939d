"""The errors that leave this package: one line of cause, one of remedy, one exit code.

Every refusal raises one of these; the command line prints it without a traceback (`--debug` shows it).
"""

from __future__ import annotations


class UnimedError(Exception):
    """An error that a user can act on.

    Args:
        cause: what is wrong and where (file, record, field), in one line.
        remedy: what to do about it, in one line; may be empty.

    Example:
        >>> print(DataError("shard a.array_record is cut short", "export it again").line())
        shard a.array_record is cut short. Fix: export it again
    """

    exit_code = 70

    def __init__(self, cause: str, remedy: str = ""):
        super().__init__(cause)
        self.cause = " ".join(str(cause).split())
        self.remedy = " ".join(str(remedy).split())

    def line(self) -> str:
        """The whole message on one line."""
        stop = "" if self.cause.endswith((".", "?", "!")) else "."
        return f"{self.cause}{stop} Fix: {self.remedy}" if self.remedy else self.cause

    def __str__(self) -> str:
        return self.line()

    def __reduce__(self):
        # Exceptions with more than one argument need this to cross a process boundary.
        return type(self), (self.cause, self.remedy)


class UsageError(UnimedError):
    """The request itself is wrong: an unknown flag, field, name or an impossible setting."""

    exit_code = 2


class DataError(UnimedError):
    """Input, stored data or a verification is wrong; nothing was written under a final name."""

    exit_code = 3


class SomeInputsFailed(UnimedError):
    """The work is done for all good inputs; the bad ones are counted and listed."""

    exit_code = 4


class Fault(UnimedError):
    """A process, a worker or a peer broke."""

    exit_code = 70


class Stalled(UnimedError):
    """The watchdog saw no progress."""

    exit_code = 71


class Preempted(UnimedError):
    """Stopped by a signal after the state was saved: run the same command again."""

    exit_code = 75


def did_you_mean(word: str, known) -> str:
    """Returns ' Did you mean "x"?' for the closest known word, or an empty string.

    Example:
        >>> did_you_mean("batchsize", ["batch_size", "seed"])
        ' Did you mean "batch_size"?'
    """
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
