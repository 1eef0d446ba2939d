"""`unimed-jax eval --retrieval` and `--probe`: frozen embeddings beyond zero-shot classes."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimed_jax.errors import DataError, SomeInputsFailed, UsageError

_ONLY_PROBE = ("fractions", "shots", "seeds", "train_set", "val_set")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of retrieval and the probe."""
    add = parser.add_argument_group("beyond zero-shot").add_argument
    add(
        "--retrieval",
        action="store_true",
        help="with --data: pictures and captions find each other: retrieval.json",
    )
    add(
        "--probe",
        default="",
        metavar="TASK",
        help="linear probe: on a task's classes with --data, on a set of a --suite with --train-set: probe.json",
    )
    add("--train-set", default="", metavar="SET", help="of the suite, which the probe is trained on")
    add(
        "--val-set", default="", metavar="SET", help="of the suite; default: a fifth of the training subjects"
    )
    add("--fractions", default="", metavar="F,...", help="of the training labels; default: 0.01,0.1,1")
    add("--shots", default="", metavar="K,...", help="training records a class, instead of or with fractions")
    add("--seeds", type=int, default=0, metavar="N", help="draws of each budget; default: 3")


def wanted(args: argparse.Namespace) -> bool:
    """Whether the command is one of these.

    Raises:
        UsageError: for flags that do not go together.
    """
    given = [f"--{f.replace('_', '-')}" for f in _ONLY_PROBE if getattr(args, f)]
    if given and not args.probe:
        raise UsageError(f"{given[0]} belongs to --probe", "leave it out, or name a task")
    if not (args.retrieval or args.probe):
        return False
    if args.retrieval and (args.suite or args.probe):
        raise UsageError("--retrieval is a run of its own", "leave out --probe and --suite")
    if args.probe and bool(args.suite) != bool(args.train_set):
        raise UsageError(
            "a probe on a suite takes two sets" if args.suite else "--train-set names a set of a suite",
            "--suite S --probe SET --train-set SET; records (--data) have splits",
        )
    sets = [s for s in (args.probe, args.train_set, args.val_set) if s]
    if args.suite and len(set(sets)) < len(sets):
        raise UsageError("the probe's sets are the same", "different sets to train, choose and test on")
    if args.probe and args.suite:
        zero_shot = ("sets", "prompts", "prompt_sensitivity", "protocol")
        asked = [f for f in zero_shot if getattr(args, f) not in ("", False, "own")]
        if asked:
            raise UsageError(
                f"--{asked[0].replace('_', '-')} is for zero-shot classes", "leave it out with --probe"
            )
    if args.report or args.tasks != "modality":
        raise UsageError(
            f"--{'report' if args.report else 'tasks'} is for zero-shot classes",
            "leave it out with --retrieval and --probe",
        )
    return True


def run(args: argparse.Namespace, sources: Callable[[str], list[Any]]) -> int:
    """Computes, prints and writes.

    Args:
        args: the flags.
        sources: of a split; refuses when there are none.

    Raises:
        UsageError: for values that are none, or a file that exists.
        DataError: see `evaluate.embedding_tasks`.
        SomeInputsFailed: after everything is written, when too many pictures of a suite's sets failed.
    """
    from unimed_jax.cli import job, suite
    from unimed_jax.data import files
    from unimed_jax.evaluate import tasks

    kind = "retrieval" if args.retrieval else "probe"
    out = Path(args.out) / f"{kind}.json"
    if out.exists() and not args.force:
        raise UsageError(f"{out} exists", "choose another --out, or --force to replace it")
    budgets = {} if args.retrieval else _budgets(args)
    task = tasks.load(args.probe) if args.probe and not args.suite else None
    splits = {} if args.suite else {"test": sources(args.split)}
    collected = suite.collect(args, list(_sets(args).values())) if args.suite else None
    if task is not None:
        splits["train"] = sources("train")
        with contextlib.suppress(DataError):  # without it, training subjects are held out, and it is said
            splits["val"] = sources("val")

    from unimed_jax import config, infer, parallel
    from unimed_jax.cli.progress import Progress
    from unimed_jax.evaluate import embedding_tasks

    mesh = parallel.make_mesh(config.Mesh())
    model = infer.load(args.model, mesh=mesh, batch_size=args.batch_size, dtype=args.dtype)
    if not args.json:
        print(f"model   {model.describe()}")
        for split, found in splits.items():
            print(f"{split:7} {', '.join(f'{s.name} {len(s)} records' for s in found)}")
    with Progress("embed", "img") as progress:
        options = {"resamples": args.ci, "threads": args.threads, "progress": progress}
        if collected is not None:
            found = embedding_tasks.probe_sets(model, collected, _sets(args), **budgets, **options)
        elif task is None:
            found = embedding_tasks.retrieve(model, splits["test"], seed=args.seed, **options)
        else:
            found = embedding_tasks.probe_task(model, splits, task, **budgets, **options)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write() -> None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(out, text)
        except OSError as e:
            raise DataError(f"{out} cannot be written: {e.strerror or e}", "choose another --out") from e

    job.by_the_first(write)
    if args.json:
        print(text.rstrip())
    else:
        print(embedding_tasks.table(found))
        print(f"wrote   {out}")
        print("note    research use only, not a medical device")
    lost = sum(d.get("bad", 0) for d in found["data"].values())
    if lost > args.allow_bad:
        raise SomeInputsFailed(f"{lost} pictures or rows could not be used", "the others are in the result")
    return 0


def _sets(args: argparse.Namespace) -> dict[str, str]:
    """The sets of a probe on a suite: split -> name."""
    named = {"test": args.probe, "train": args.train_set, "val": args.val_set}
    return {split: name for split, name in named.items() if name}


def _budgets(args: argparse.Namespace) -> dict[str, Any]:
    """The probe's budgets and seeds."""
    if args.seeds < 0:
        raise UsageError("--seeds must be at least 1")
    fractions = _numbers(args.fractions, float, "--fractions", lambda f: 0 < f <= 1, "above 0 and at most 1")
    shots = _numbers(args.shots, int, "--shots", lambda k: k >= 1, "1 or more")
    out: dict[str, Any] = {"shots": shots, "seeds": tuple(range(args.seed, args.seed + (args.seeds or 3)))}
    return out | ({"fractions": fractions} if fractions or shots else {})


def _numbers(
    text: str, kind: Callable[[str], Any], flag: str, fits: Callable[[Any], bool], words: str
) -> tuple[Any, ...]:
    try:
        found = tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        found = (-1,)
    if not all(fits(x) for x in found):
        raise UsageError(f"{flag} {text} is no list of numbers {words}", f"for example {flag} 1")
    return found
