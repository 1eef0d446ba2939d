"""Findings that do not exclude each other: each is asked with two groups of prompts, for it and against it.

The score of a finding is the softmax of `logit_scale x cosine` over its own pair of text vectors, so every finding has
a probability by itself. The protocol is that of E. Tiu et al., "Expert-level detection of pathologies from unannotated
chest X-ray images via self-supervised learning", Nature Biomedical Engineering 6 (2022). A file looks like

    {"name": "chest", "label": "labels:finding", "none": ["no finding"], "metric": "auroc", "group": "patient",
     "findings": {"effusion": {"positive": ["pleural effusion", ...], "negative": ["no pleural effusion", ...]}}}

and a plain `{"effusion": {"positive": [...], "negative": [...]}, ...}` is accepted too. The truth of a finding is
present, absent or unknown; unknown ones are left out and counted, and what a record does not list is `unlisted`:
"absent" or "unknown", which the results state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from unimed_jax.config import MODALITIES
from unimed_jax.errors import UsageError, did_you_mean
from unimed_jax.evaluate import tasks
from unimed_jax.vectors import ensemble

if TYPE_CHECKING:
    pass

FOLDER = tasks.FOLDER / "multilabel"
PRESENT, ABSENT, UNKNOWN = 1, 0, -1
METRICS = ("auroc", "average_precision")  # what such a task may be judged by
UNLISTED = {"absent": ABSENT, "unknown": UNKNOWN}
FORM = 'write {"finding": {"positive": ["prompt", ...], "negative": ["prompt", ...]}, ...}'


@dataclass(frozen=True, slots=True)
class Pair:
    """The prompts of one finding."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """One multi-label problem."""

    name: str
    findings: dict[str, Pair]  # in the order of the columns
    label: str = "labels:finding"  # whose values are present
    absent: str = ""  # labels:PREFIX whose values are absent
    uncertain: str = ""  # labels:PREFIX whose values are unknown
    unlisted: str = "absent"  # what a labelled record's other findings are
    none: tuple[str, ...] = ()  # values that say that nothing was found
    ignore: tuple[str, ...] = ()  # values that are known and no finding of this task
    where: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    metric: str = "auroc"
    group: str = "patient"
    version: int = 1
    description: str = ""
    modality: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over the findings and prompts, in order: equal digests ask equal questions."""
        text = json.dumps(
            [[k, list(p.positive), list(p.negative)] for k, p in self.findings.items()], ensure_ascii=False
        )
        return hashlib.sha256(f"pairs {text}".encode()).hexdigest()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text once, in order."""
        sides = (side for p in self.findings.values() for side in (p.positive, p.negative))
        return tuple(dict.fromkeys(text for side in sides for text in side))

    def shape(self) -> str:
        """Findings and prompts a side, e.g. `14x(4+4)`."""
        span = lambda n: str(min(n)) if min(n) == max(n) else f"{min(n)}-{max(n)}"
        for_it = span([len(p.positive) for p in self.findings.values()])
        return f"{len(self.findings)}x({for_it}+{span([len(p.negative) for p in self.findings.values()])})"


def names() -> list[str]:
    """The built-in multi-label tasks.

    Example:
        >>> "chest_findings" in names()
        True
    """
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def is_multilabel(name: str | Path) -> bool:
    """Whether a name or file is of this kind; an unreadable file is not (`tasks.load` says what is wrong with it).

    Example:
        >>> is_multilabel("chest_findings"), is_multilabel("modality")
        (True, False)
    """
    if str(name) in names():
        return True
    try:
        raw = json.loads(Path(name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    pairs = lambda v: isinstance(v, dict) and ("positive" in v or "negative" in v)
    return isinstance(raw, dict) and ("findings" in raw or any(map(pairs, raw.values())))


def either(name: str | Path) -> tasks.Task | Findings:
    """A built-in task of either kind by name, or one from a JSON file.

    Raises:
        UsageError: for an unknown name, or a file that is no valid task, naming the field.

    Example:
        >>> either("modality").name, either("chest_findings").name
        ('modality', 'chest_findings')
    """
    known, path = [*tasks.names(), *names()], Path(name)
    if str(name) not in known and path.suffix != ".json" and not path.exists():
        raise UsageError(
            f"no task {str(name)!r}.{did_you_mean(str(name), known)}",
            f"one of {', '.join(known)}, or a .json file",
        )
    return load(name) if is_multilabel(name) else tasks.load(name)


def load(name: str | Path | Findings) -> Findings:
    """A built-in multi-label task by name, or one from a JSON file.

    Raises:
        UsageError: for an unknown name, or a file that is no valid task of this kind, naming the field.

    Example:
        >>> load("chest_findings").findings["pneumothorax"].negative[0]
        'no pneumothorax on the chest X-ray'
    """
    if isinstance(name, Findings):
        return name
    if str(name) in names():
        return _parse(FOLDER / f"{name}.json")
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"no multi-label task {str(name)!r}.{did_you_mean(str(name), names())}",
            f"one of {', '.join(names())}, or a .json file",
        )
    return _parse(path)


def from_labels(labels: Sequence[str], *, modality: str = "", name: str = "findings") -> Findings:
    """A task for names of findings alone: neutral sentences for and against each, naming the modality when given.

    Raises:
        UsageError: for no name, repeated ones or an unknown modality.

    Example:
        >>> from_labels(["pleural effusion"], modality="xray").findings["pleural effusion"].negative[0]
        'a chest or skeletal X-ray image without pleural effusion'
    """
    kind = tasks.modality_phrase(modality)
    twice = [k for k, n in Counter(labels).items() if n > 1]
    if twice:
        raise UsageError(f"labels are given twice: {', '.join(twice)}")
    said = lambda sentences, k: tuple(s.format(kind=kind, label=k) for s in sentences)
    found = {k: Pair(said(_FOR, k), said(_AGAINST, k)) for k in labels}
    return checked(Findings(name=name, findings=found, label=f"labels:{name}"), "labels")


_FOR = (
    "{kind} with {label}",
    "{kind} showing {label}",
    "{label} is present in {kind}",
    "evidence of {label}",
)
_AGAINST = (
    "{kind} without {label}",
    "{kind} showing no {label}",
    "{label} is absent from {kind}",
    "no evidence of {label}",
)


def pairs_of(raw: Any, where: str) -> dict[str, Pair]:
    """A table of findings, each with its two groups of prompts.

    Raises:
        UsageError: when it is none, naming the finding.
    """
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"{where} is no table of findings", FORM)
    return {k: _pair(v, f"{where}: finding {k!r}") for k, v in raw.items()}


def checked(task: Findings, where: str) -> Findings:
    """The task itself, when it is one.

    Args:
        task: any.
        where: what to call it in an error.

    Raises:
        UsageError: for no finding, empty or shared prompts, names that differ by case only, or an unknown metric,
            group, label, filter or word for what is unlisted.
    """
    if not task.findings:
        raise UsageError(f"{where} has no findings", FORM)
    folded = Counter(k.casefold() for k in task.findings)
    for name, pair in task.findings.items():
        if not name.strip():
            raise UsageError(f"{where} has a finding without a name")
        if folded[name.casefold()] > 1:
            raise UsageError(f"{where}: findings differ by case only: {name!r}")
        for side in ("positive", "negative"):
            prompts = getattr(pair, side)
            if not prompts or not all(p.strip() for p in prompts):
                raise UsageError(f"{where}: finding {name!r} has no {side} prompts or an empty one", FORM)
        shared = set(pair.positive) & set(pair.negative)
        if shared:
            raise UsageError(f"{where}: finding {name!r} has {min(shared)!r} on both sides")
    fields = {
        "modality": ("", *MODALITIES),
        "metric": METRICS,
        "group": tasks.GROUPS,
        "unlisted": tuple(UNLISTED),
    }
    for name, known in fields.items():
        value = getattr(task, name)
        if value not in known:
            raise UsageError(f"{where}: {name} is {value!r}", f"one of {', '.join(filter(None, known))}")
    prefixes = [v for v in (task.label, task.absent, task.uncertain) if v]
    for value in prefixes:
        if not value.startswith(tasks.LABEL_PREFIX):
            raise UsageError(f"{where}: label is {value!r}", f"{tasks.LABEL_PREFIX}PREFIX")
    if len(set(prefixes)) < len(prefixes):
        raise UsageError(f"{where}: label, absent and uncertain must differ")
    for name in task.where:
        if name not in tasks.FILTERS and not name.startswith(tasks.LABEL_PREFIX):
            raise UsageError(f"{where}: where has no field {name!r}.{did_you_mean(name, tasks.FILTERS)}")
    clash = sorted((set(task.none) | set(task.ignore)) & set(task.findings))
    if clash:
        raise UsageError(f"{where}: {clash[0]!r} is a finding, and one of none or ignore")
    return task


def _parse(path: Path) -> Findings:
    raw = tasks.read_json(path)
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"{path} is no multi-label task", FORM)
    if "findings" not in raw:
        raw = {"findings": raw}
    known = {f.name for f in dataclasses.fields(Findings)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise UsageError(f"{path} has no field {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    fields: dict[str, Any] = {"name": path.stem} | raw
    findings, where = fields.pop("findings"), fields.pop("where", {})
    if not isinstance(where, dict):
        raise UsageError(f"{path}: where is no table", '{"modality": "X-ray"}')
    for key in ("none", "ignore"):
        fields[key] = _texts(fields.get(key, []), f"{path}: {key}")
    for key, value in fields.items():
        if key not in ("none", "ignore") and type(value) is not (int if key == "version" else str):
            raise UsageError(f"{path}: {key} is {str(value)[:40]!r}", "a text; the version a whole number")
    made = Findings(
        findings=pairs_of(findings, str(path)),
        where={k: tuple(v) if isinstance(v, list) else (v,) for k, v in where.items()},
        **fields,
    )
    return checked(made, str(path))


def _pair(value: Any, where: str) -> Pair:
    if not isinstance(value, dict) or set(value) != {"positive", "negative"}:
        raise UsageError(f"{where} has no positive and negative prompts", FORM)
    return Pair(_texts(value["positive"], where), _texts(value["negative"], where))


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UsageError(f"{where} is no list of texts")
    return tuple(value)


# ---- scores


def margins(
    task: Findings,
    z: Float[np.ndarray, "n d"],
    prompts: Mapping[str, Float[np.ndarray, "d"]],
    scale: float,
) -> Float[np.ndarray, "n f"]:
    """Logit of each finding: `scale` x (cosine with what speaks for it - cosine with what speaks against it).

    Args:
        task: its findings.
        z: unit image embeddings.
        prompts: unit embedding of each of `task.prompts`; each side is their normalised mean.
        scale: the model's factor on cosines.
    """
    return scale * (z.astype(np.float64) @ _bank(task, prompts).T)


def _bank(task: Findings, prompts: Mapping[str, np.ndarray]) -> Float[np.ndarray, "f d"]:
    """The difference of the two text vectors of each finding."""

    def side(name: str) -> np.ndarray:
        texts = (getattr(p, name) for p in task.findings.values())
        return ensemble([np.stack([prompts[t] for t in ts]) for ts in texts]).astype(np.float64)

    return side("positive") - side("negative")


def probability(margin: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    """Probability of a finding from its logit: the softmax over its pair.

    Example:
        >>> probability(np.array([0.0, 800.0, -800.0])).tolist()
        [0.5, 1.0, 0.0]
    """
    from scipy.special import expit

    return expit(np.asarray(margin, np.float64))
