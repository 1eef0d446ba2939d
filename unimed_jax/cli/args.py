"""argparse with the habits of this command line: underscores or dashes, suggestions, one-line refusals."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from unimed_jax.errors import UsageError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError and suggests the closest flag."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise UsageError(f"{self.prog}: {message}", f"{self.prog} --help")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parses; `--flag_name` is the same as `--flag-name`.

        Raises:
            UsageError: for an unknown flag, with the closest known one.
        """
        argv = [_dashes(a) for a in argv]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [s for p in self._all_parsers() for a in p._actions for s in a.option_strings]
            word = unknown[0].split("=")[0]
            raise UsageError(
                f"{self.prog}: unknown argument {word}.{did_you_mean(word, known)}", f"{self.prog} --help"
            )
        return args

    def _all_parsers(self) -> list[argparse.ArgumentParser]:
        subs = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [self, *(p for a in subs for p in a.choices.values())]


def _dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, eq, value = arg.partition("=")
    return flag.replace("_", "-") + eq + value
