"""What the page shows of a suite: averages beside the published ones, the sets, and what was not evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimed_jax.evaluate.suite_results import OVERALL, number, published_groups, words


def collect(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a suite's results.json, each empty where there is nothing to show."""
    return {
        "averages": _averages(stored),
        "sets": [_set(name, s) for name, s in stored["datasets"].items()],
        "reference": _reference(stored),
        "sensitivity": [
            {"name": name, "metric": words(s["metric"]), "all": s["metrics"][s["metric"]], **s["sensitivity"]}
            for name, s in stored["datasets"].items()
            if s.get("sensitivity")
        ],
        "parts": [
            {"name": name, "part": part, **figures}
            for name, s in stored["datasets"].items()
            for part, figures in s.get("parts", {}).items()
        ],
        "failed": stored.get("failed", []),
    }


def _averages(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, one row a metric, and the published ones below; the columns are overall and the modalities.

    Published columns that cannot be told apart show all their values in each.
    """
    ours = {k: g for k, g in stored.get("averages", {}).items() if g[OVERALL]["sets"]}
    published = stored.get("published", []) if ours else []
    complete = bool(stored.get("suite", {}).get("complete"))
    others = [_published(p) for p in (published if complete else ())]
    groups = list(
        dict.fromkeys(name for found in (*ours.values(), *(c for _, c in others)) for name in found)
    )
    rows = []
    for metric, means in ours.items():
        cells = {k: {"text": number(metric, m["value"]), "sets": m["sets"]} for k, m in means.items()}
        rows.append(({"whose": "this model", "metric": words(metric), "ours": True}, cells))
    rows = [row | {"cells": [cells.get(g) for g in groups]} for row, cells in (*rows, *others)]
    notes = []
    if published and not complete:
        notes.append("Published averages are not shown: they are over the whole suite, this is a part.")
    elif any("unassigned" in p for p in published):
        notes.append("“or”: the source does not tell the two columns apart.")
    return {"groups": groups, "rows": rows, "notes": notes}


def _published(p: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    cells = {
        name: {"text": " or ".join(f"{v:.2f}" for v in values)}
        for names, values in published_groups(p)
        for name in names
    }
    return {"whose": p["name"], "source": p["source"], "metric": "accuracy, percent"}, cells


def _set(name: str, s: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        **{k: s[k] for k in ("modality", "n", "subjects", "bad")},
        "metric": words(s["metric"]),
        "main": s["metrics"][s["metric"]],
    }


def _reference(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The original's figures of each set that has them; sets of two classes have more of them than the others."""
    found = {name: s for name, s in stored["datasets"].items() if s.get("reference")}
    columns = list(dict.fromkeys(k for s in found.values() for k in s["reference"]))
    rows = [
        {
            "name": name,
            "modality": s["modality"],
            "n": s["n"],
            "cells": [_percent(s["reference"], k) for k in columns],
        }
        for name, s in found.items()
    ]
    return {"columns": [words(k) for k in columns], "rows": rows}


def _percent(figures: Mapping[str, float | None], name: str) -> str:
    if name not in figures:
        return ""
    value = figures[name]
    return "undefined" if value is None else f"{value:.2f}"
