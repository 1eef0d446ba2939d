"""argparse with the habits of this command line: underscores or dashes, suggestions, one-line refusals."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from unimed_jax.data import limits
from unimed_jax.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from unimed_jax.data.medical import Slices
    from unimed_jax.data.slides import Tiles


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default only where there is one to name, and once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or isinstance(action.default, bool) or action.default in ("", [])
        if nothing or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """What kind of value it is, where the parser names none: the name of the flag says nothing new."""
        kinds = {int: "N", float: "X"}
        return kinds.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError and suggests the closest flag."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise UsageError(f"{self.prog.removeprefix('unimed-jax ')}: {message}", f"{self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses what is no choice, with the closest one; also verbs below the first."""
        if action.choices is not None and value not in action.choices:
            known = [str(c) for c in action.choices]
            what = "verb" if isinstance(action, argparse._SubParsersAction) else "choice"
            listed = ", ".join(known)
            message = f"no {what} {value!r}.{did_you_mean(str(value), known)} There are: {listed}"
            if what == "verb":
                self.error(message)
            raise argparse.ArgumentError(action, message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parses; `--flag_name` is the same as `--flag-name`.

        Raises:
            UsageError: for an unknown flag, with the closest known one.
        """
        argv = [_dashes(a) for a in argv]
        known = [s for p in self._all_parsers() for a in p._actions for s in a.option_strings]
        try:
            args, unknown = self.parse_known_args(argv)
        except UsageError:  # what is missing may be there, misspelt
            flags = argv[: argv.index("--")] if "--" in argv else argv
            unknown = [a for a in flags if a.startswith("--") and a.split("=")[0] not in known]
            if not unknown:
                raise
        if unknown:
            word = unknown[0].split("=")[0]
            self.error(f"unknown argument {word}.{did_you_mean(word, known)}")
        return args

    def _all_parsers(self) -> list[argparse.ArgumentParser]:
        subs = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [self, *(p for a in subs for p in a.choices.values())]


def reader_threads() -> int:
    """How many threads read and decode pictures unless told otherwise: one a core that this process may use.

    More than 32 wait for Python's lock more than they decode.
    """
    return min(limits.cores(), 32)


def _dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, eq, value = arg.partition("=")
    return flag.replace("_", "-") + eq + value


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """What of a file becomes a picture: gray values, slices of a volume, tiles of a slide."""
    parser.add_argument(
        "--window",
        default="",
        metavar="W",
        help="lung, brain, bone, ... or CENTRE,WIDTH; default: the file's own",
    )
    parser.add_argument(
        "--slices",
        default="middle",
        metavar="S",
        help="middle, all or every:N, of volumes and files with several frames",
    )
    parser.add_argument(
        "--mpp", type=float, metavar="MICRONS", help="per pixel of a slide's tiles; 0.5 is 20x"
    )
    parser.add_argument("--level", type=int, metavar="N", help="level of a slide, instead of --mpp")
    parser.add_argument(
        "--tissue", type=float, default=0.25, metavar="SHARE", help="of a tile that must be tissue, 0 to 1"
    )
    parser.add_argument(
        "--max-tiles", type=int, default=1000, metavar="N", help="of one slide, spread evenly"
    )


def picture_options(args: argparse.Namespace) -> tuple[tuple[float, float] | None, Slices, Tiles]:
    """(window, slices, tiles) of `add_picture_arguments`.

    Raises:
        UsageError: for a window, slices or tiles that are none.
    """
    from unimed_jax.data import medical, slides, windows

    tiles = slides.Tiles(mpp=args.mpp, level=args.level, tissue=args.tissue, most=args.max_tiles)
    return windows.parse_window(args.window), medical.Slices.parse(args.slices), tiles.checked()
