"""`unimed-jax train`: an experiment from a config file; the same command again continues it."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from unimed_jax import config, config_rules
from unimed_jax.cli.args import Parser
from unimed_jax.errors import UnimedError, UsageError, did_you_mean

# Configs of a checkout, then those inside an installed wheel.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDERS = (_PACKAGE.parent / "configs", _PACKAGE / "configs")

HELP = """Trains from a config file. The same command again continues at the exact sample.

Any setting: --config.FIELD=VALUE, e.g. --config.optim.lr=1e-3. All of them with their values: --config.help"""


def run(argv: list[str]) -> int:
    """Parses the flags, loads the config and trains; refusals propagate as UnimedError."""
    overrides, rest = split_overrides(argv)
    parser = Parser("unimed-jax train", description=HELP)
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a config file, or the name of a shipped one")
    parser.add_argument("--workdir", metavar="DIR", help="run folder: made, or continued")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--profile", metavar="FROM:TO", help="trace these steps into WORKDIR/profile")
    parser.add_argument("--extend", action="store_true", help="permit another duration when continuing")
    args = parser.parse(rest)
    if "help" in overrides:
        print(settings(load_config(args.config, {}) if args.config else config.Train()))
        return 0
    if not args.config:
        raise UsageError("train: --config is missing", f"one of {', '.join(shipped())}, or a file")
    cfg = config_rules.validate(load_config(args.config, overrides))
    if not args.workdir and not args.dry_run:
        raise UsageError("train: --workdir is missing", "--workdir=DIR, or --dry_run")
    if args.workdir and "://" in args.workdir:
        raise UsageError(f"--workdir {args.workdir} is a URL", "mount the bucket and give the folder")

    from unimed_jax.train import hygiene, loop

    hygiene.quiet_libraries()
    result = loop.run(
        cfg,
        args.workdir or "",
        dry_run=args.dry_run,
        profile=_window(args.profile) if args.profile else None,
        extend=args.extend,
    )
    if result.text:
        print(result.text)
    return 0


def _window(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UsageError(f"--profile {text!r} is no window of steps", "for example --profile=100:105")
    return int(first), int(last)


# -- configs --------------------------------------------------------------------------------------------------------


def split_overrides(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separates `--config.FIELD=VALUE` (or VALUE as the next word) from all other flags; the last one wins.

    Example:
        >>> split_overrides(["--config.optim.lr=1", "--config.seed", "2", "--workdir=x"])
        ({'optim.lr': '1', 'seed': '2'}, ['--workdir=x'])
    """
    overrides: dict[str, str] = {}
    rest: list[str] = []
    words = iter(range(len(argv)))
    for i in words:
        name, eq, value = argv[i].partition("=")
        field = name.lstrip("-").removeprefix("config.")
        if not name.startswith("-") or not name.lstrip("-").startswith("config."):
            rest.append(argv[i])
        elif eq:
            overrides[field] = value
        elif i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            overrides[field] = argv[next(words)]
        else:
            overrides[field] = "true"
    return overrides, rest


def shipped() -> list[str]:
    """The names of the configs that come with the package."""
    return sorted({p.stem for folder in CONFIG_FOLDERS for p in folder.glob("*.py") if p.stem[0] != "_"})


def find_config(spec: str) -> str:
    """Resolves `FILE[:ARG]` or `NAME[:ARG]` to `path[:ARG]`.

    Raises:
        UsageError: when there is no such file, with the closest shipped name.
    """
    name, colon, arg = spec.partition(":")
    candidates = [
        Path(name),
        *(folder / f"{Path(name).stem}.py" for folder in CONFIG_FOLDERS if "/" not in name),
    ]
    for path in candidates:
        if path.is_file():
            if path.suffix != ".py":
                raise UsageError(f"config {path} is no Python file", "give a configs/*.py file")
            return f"{path}{colon}{arg}"
    near = did_you_mean(Path(name).stem, shipped())
    raise UsageError(f"no config {name!r}.{near}", f"a file, or one of {', '.join(shipped())}")


def load_config(spec: str, overrides: dict[str, str]) -> config.Train:
    """Runs `get_config(arg)` of a config file and sets the overridden fields, by `ml_collections.config_flags`.

    The flags live in a private set, so that this can be called any number of times.

    Raises:
        UsageError: for a missing file, an unknown field or variant, a value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    path = find_config(spec)
    words = [f"--config={path}", *(f"--config.{k}={v}" for k, v in overrides.items())]
    private = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=private, sys_argv=words, lock_config=False)
    plain = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=plain, sys_argv=words[:1], lock_config=False)
    try:
        sys.modules.pop("config_config", None)  # else the names of the file loaded before are still in there
        plain(["train", words[0]])
        _resolve_types(type(plain["config"].value))
        for field in overrides:
            _check_field(plain["config"].value, field)
        private(["train", *words])
    except UnimedError:
        raise
    except Exception as e:  # the config file is the user's own code; flags raise their own types
        cause = _root(e)
        if isinstance(cause, UnimedError):
            raise cause from e
        text = str(cause) if isinstance(cause, flags.Error) else f"{type(cause).__name__}: {cause}"
        raise UsageError(f"config {spec}: {text}", "--config.help shows all settings") from e
    cfg = private["config"].value
    if not isinstance(cfg, config.Train):
        raise UsageError(
            f"config {spec}: get_config returned {type(cfg).__name__}", "return a unimed_jax.config.Train"
        )
    return config.from_dict(config.Train, config.to_dict(cfg))  # refuses values of a wrong type


def _resolve_types(kind: type) -> None:
    """Makes `Field.type` a class: it is a string under postponed annotations, and config_flags takes it as it is."""
    if not dataclasses.is_dataclass(kind):
        return
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        field.type = hints[field.name]
        _resolve_types(hints[field.name])


def _root(e: BaseException) -> BaseException:
    while e.__cause__ is not None:
        e = e.__cause__
    return e


def _check_field(cfg: Any, field: str) -> None:
    """Refuses an unknown field, a group of fields, and tables that only a file can hold."""
    node = cfg
    done = "config"
    for name in field.split("."):
        known = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if name not in known:
            raise UsageError(
                f"{done} has no field {name!r}.{did_you_mean(name, known)}", "--config.help lists all"
            )
        kind = typing.get_type_hints(type(node))[name]
        node, done = getattr(node, name), f"{done}.{name}"
    if dataclasses.is_dataclass(node):
        names = ", ".join(f"{done}.{f.name}" for f in dataclasses.fields(node))
        raise UsageError(f"{done} is a group of settings", f"set {names}")
    inner = [a for a in typing.get_args(kind) if a is not Ellipsis]
    if any(not isinstance(a, type) or dataclasses.is_dataclass(a) for a in inner):
        raise UsageError(f"{done} is a table", "set it in the config file")


def settings(cfg: Any, prefix: str = "config") -> str:
    """All fields with their values, one a line, as flags."""
    lines = []
    for f in dataclasses.fields(cfg):
        value, name = getattr(cfg, f.name), f"{prefix}.{f.name}"
        lines.append(settings(value, name) if dataclasses.is_dataclass(value) else f"--{name}={value!r}")
    return "\n".join(lines)
