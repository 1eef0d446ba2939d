"""The `unimed-jax` command: finds the verb, runs it, and turns refusals into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys

from unimed_jax import __version__
from unimed_jax.errors import UnimedError, UsageError, did_you_mean

# verb: (one line of help, module with `run(argv) -> int | None`)
VERBS = {
    "quickstart": (
        "the main job on real images: records, training, evaluation, report",
        "unimed_jax.cli.quickstart",
    ),
    "train": ("train from a config; the same command again resumes", "unimed_jax.cli.train"),
    "eval": ("evaluate a model: zero-shot, suites of data sets, retrieval, probes", "unimed_jax.cli.eval"),
    "calibrate": ("scores to probabilities: fit on validation records", "unimed_jax.cli.calibrate"),
    "demo": ("a web page on this machine: scores and saliency of a picture", "unimed_jax.cli.demo"),
    "predict": ("score image files against labels, to CSV", "unimed_jax.cli.predict"),
    "embed": ("pictures, records or texts to vectors, to Parquet", "unimed_jax.cli.embed"),
    "search": ("nearest pictures to a text or picture", "unimed_jax.cli.search"),
    "convert": ("weights from and to PyTorch, OpenCLIP and Hugging Face", "unimed_jax.cli.convert"),
    "data": ("records: build, import-wds, check, stats, show, overlap", "unimed_jax.cli.data"),
    "captions": ("captions from labels: generate, template, review, apply", "unimed_jax.cli.captions"),
    "models": ("named models and model folders: list, show, fetch, check", "unimed_jax.cli.models"),
    "report": ("one HTML page of a run or results folder, or of two compared", "unimed_jax.cli.report"),
    "doctor": ("versions, devices, extras, caches", "unimed_jax.cli.doctor"),
}

_LESS_MEMORY = (
    "when training: a smaller batch_size, more optim.accum_steps, model.remat=dots or full, a larger mesh.fsdp; "
    "--dry_run estimates the memory"
)


def usage() -> str:
    """The text of `unimed-jax --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (text, _) in VERBS.items()]
    return "\n".join(
        [
            f"unimed-jax {__version__}: UniMed-CLIP in JAX. Research use only, not a medical device.",
            "",
            "usage: unimed-jax VERB [options]      (unimed-jax VERB --help for its options)",
            "",
            *lines,
            "",
            "  --debug   show the traceback of a refusal",
            "",
            "exit codes: 0 ok, 2 usage, 3 data or verification failed, 4 some inputs failed (listed), 70 fault,",
            "            71 stalled, 75 pre-empted after saving (run the same command again)",
        ]
    )


def dispatch(argv: list[str]) -> int:
    """Runs one verb and returns its exit code; refusals propagate as UnimedError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("--version", "-V"):
        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UsageError(f"no verb {verb!r}.{did_you_mean(verb, VERBS)}", "unimed-jax --help lists them")
    return importlib.import_module(VERBS[verb][1]).run(rest) or 0


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; always ends in `sys.exit`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name or label that the terminal cannot show ends no work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = dispatch(argv)
        sys.stdout.flush()
    except UnimedError as e:
        _show(debug)
        print(f"unimed-jax: {e.line()}", file=sys.stderr)
        code = e.exit_code
    except OSError as e:
        if isinstance(e, BrokenPipeError) and _nobody_reads():  # e.g. `| head`
            # What is still buffered goes nowhere, or the interpreter would fail on it while it ends (exit code 120).
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        _show(debug)
        where = f": {e.filename}" if e.filename else ""
        print(f"unimed-jax: {e.strerror or e}{where}", file=sys.stderr)
        code = 70 if isinstance(e, BrokenPipeError) else 3
    except KeyboardInterrupt:
        print("unimed-jax: interrupted", file=sys.stderr)
        code = 130
    except Exception as e:
        _show(debug)
        code = 70
        words = " ".join(str(e).split())[:500]
        if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in words:
            print(
                f"unimed-jax: out of memory: {words or type(e).__name__}. Fix: {_LESS_MEMORY}",
                file=sys.stderr,
            )
        else:
            # A defect of ours, not of the input: say so, and how to get what a report of it needs.
            print(f"unimed-jax: fault: {type(e).__name__}: {words}", file=sys.stderr)
            print("unimed-jax: this is a defect; --debug shows the traceback for a report", file=sys.stderr)
    sys.exit(code)


def _show(debug: bool) -> None:
    """The traceback for `--debug`; the exit code stays that of the refusal."""
    if debug:
        import traceback

        traceback.print_exc()


def _nobody_reads() -> bool:
    """Whether the broken pipe is our own output; one to a worker process is a fault."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return True
    watch = select.poll()
    try:
        watch.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # stdout is no file
        return False
    return any(event & select.POLLERR for _, event in watch.poll(0))
