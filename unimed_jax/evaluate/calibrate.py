"""A calibration from the predictions that an evaluation of validation records left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.evaluate import calibration, calibration_fit, results, stored


def from_results(
    folder: str | Path, wanted: Sequence[str] = (), *, resamples: int = 1000, seed: int = 0
) -> calibration.Calibration:
    """Fits every task of a results folder, or some: a temperature for classes, scale and offset for findings.

    Args:
        folder: what `unimed-jax eval` wrote about validation records.
        wanted: names of tasks; default: all.
        resamples: bootstrap resamples of the figures, by subject; 0 = no intervals.
        seed: of folds and resampling.

    Raises:
        UsageError: for a task that the folder does not have.
        DataError: when its scores are calibrated already, are damaged, or are too few.
    """
    folder = Path(folder)
    about = results.read(folder)
    if "calibration" in about["settings"]:
        raise DataError(f"the scores of {folder} are calibrated already", "evaluate without --calibration")
    try:
        model = {k: about["model"][k] for k in ("name", *calibration.BOUND)}
    except KeyError as e:
        raise DataError(
            f"{folder} does not say how its model computed ({e.args[0]})", "evaluate again"
        ) from e
    classes = {t["name"]: t for t in about["tasks"]}
    pairs = {t["name"]: t for t in about.get("findings", ())}
    known = [*classes, *pairs]
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"{folder} has no task {name!r}.{did_you_mean(name, known)}", f"it has: {', '.join(known)}"
            )
    options = {"resamples": resamples, "seed": seed}
    fits: list[calibration.Temperature | calibration.Platt] = []
    rows = stored.predictions(folder) if classes else {}
    for name, t in classes.items():
        if not wanted or name in wanted:
            s = stored.scored(name, rows.get(name, []), t["classes"])
            digest = t["prompts"]["sha256"]
            fits.append(
                calibration_fit.fit_temperature(
                    name, digest, s.log_scores, s.labels, s.subjects, s.keys, **options
                )
            )
    rows = stored.findings(folder) if pairs else {}
    for name, t in pairs.items():
        if not wanted or name in wanted:
            names = list(t["findings"])
            f = stored.scored_findings(name, rows.get(name, []), names)
            digest = t["prompts"]["sha256"]
            fits.append(
                calibration_fit.fit_findings(
                    name, digest, names, f.margins, f.truth, f.subjects, f.keys, **options
                )
            )
    return calibration.Calibration(model=model, tasks=tuple(fits))
