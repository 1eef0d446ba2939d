"""Zero-shot tasks as data: which records, which label, which prompts for each class.

The built-in ones are JSON files in `prompts/`. A task file looks like

    {"name": "mri_plane", "version": 1, "description": "...", "where": {"modality": "MRI"},
     "label": "labels:plane", "ignore": ["oblique"], "group": "patient", "metric": "balanced_accuracy",
     "classes": {"axial": ["an axial MRI slice", ...], ...}}

and a plain `{"class": ["prompt", ...], ...}` is accepted too: its label is the modality when every class is one,
else the labels that start with the file's name. `prompts/unimed21/` holds the prompts for public data sets: these
files say of which `modality` all pictures of the set are, and their label, too, has the file's name.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.config import MODALITIES
from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from unimed_jax.data.record import Example

FOLDER = Path(__file__).parent / "prompts"
_FIELDS = {
    "name",
    "version",
    "description",
    "modality",
    "where",
    "label",
    "ignore",
    "classes",
    "metric",
    "group",
}
FILTERS = ("modality", "source", "split", "simulated")
GROUPS = ("patient", "key")
LABEL_PREFIX = "labels:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One zero-shot problem."""

    name: str
    classes: dict[str, tuple[str, ...]]  # class -> prompts, in the order of the class indices
    label: str = "modality"  # "modality", "source" or "labels:PREFIX"
    where: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # field -> accepted values
    ignore: tuple[str, ...] = ()  # label values that are known and left out
    metric: str = "balanced_accuracy"
    group: str = "patient"  # what is resampled
    version: int = 1
    description: str = ""
    modality: str = ""  # of all pictures, when they have the same

    @property
    def digest(self) -> str:
        """SHA-256 over the classes and prompts, in order: equal digests ask equal questions."""
        text = json.dumps([[k, list(v)] for k, v in self.classes.items()], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def chance(self) -> float:
        """What guessing reaches: one over the classes, or one half for AUROC."""
        return 0.5 if self.metric == "auroc" else 1 / len(self.classes)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text once, in order."""
        return tuple(dict.fromkeys(p for prompts in self.classes.values() for p in prompts))

    def shape(self) -> str:
        """Classes and prompts a class, e.g. `6x8` or `3x4-6`."""
        counts = [len(p) for p in self.classes.values()]
        low, high = min(counts), max(counts)
        return f"{len(counts)}x{low}" if low == high else f"{len(counts)}x{low}-{high}"


def names() -> list[str]:
    """The built-in tasks.

    Example:
        >>> "modality" in names()
        True
    """
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def load(name: str | Path | Task) -> Task:
    """A built-in task by name, or one from a JSON file.

    Raises:
        UsageError: for an unknown name, or a file that is no valid task, naming the field.

    Example:
        >>> len(load("modality").classes)
        6
    """
    if isinstance(name, Task):
        return name
    path = Path(name)
    if path.suffix == ".json" or path.exists():
        if not path.is_file():
            raise UsageError(f"prompt file {path} does not exist", "check the spelling")
        return _parse(path)
    if str(name) not in names():
        raise UsageError(
            f"no task {str(name)!r}.{did_you_mean(str(name), names())}",
            f"one of {', '.join(names())}, or a .json file",
        )
    return _parse(FOLDER / f"{name}.json")


def from_labels(labels: Sequence[str], *, modality: str = "", name: str = "labels") -> Task:
    """A task for class names alone: a few neutral sentences a class, naming the modality when it is given.

    Raises:
        UsageError: for fewer than two classes, repeated ones or an unknown modality.

    Example:
        >>> from_labels(["pneumonia", "normal"], modality="xray").classes["normal"][0]
        'a chest or skeletal X-ray image: normal'
    """
    kind = modality_phrase(modality)
    prompts = {k: tuple(s.format(kind=kind, label=k) for s in _SENTENCES) for k in labels}
    if len(prompts) != len(labels):
        twice = [k for k, n in Counter(labels).items() if n > 1]
        raise UsageError(f"labels are given twice: {', '.join(twice)}")
    return checked(Task(name=name, classes=prompts, label=f"{LABEL_PREFIX}{name}"), "labels")


_SENTENCES = (
    "{kind}: {label}",
    "{kind} showing {label}",
    "{kind} of {label}",
    "{label} as seen in {kind}",
    "the findings in {kind} are consistent with {label}",
)
_KINDS = {  # spelling without case or punctuation -> phrase
    "": "a medical image",
    "xray": "a chest or skeletal X-ray image",
    "ct": "a CT image",
    "mri": "an MRI image",
    "ultrasound": "an ultrasound image",
    "histopathology": "a histopathology image",
    "fundus": "a retinal fundus photograph",
}


def modality_phrase(modality: str) -> str:
    """How prompts name a modality; accepts `xray`, `X-ray`, `x_ray`...

    Raises:
        UsageError: for an unknown one.
    """
    word = "".join(ch for ch in modality.lower() if ch.isalnum())
    if word not in _KINDS:
        raise UsageError(
            f"no modality {modality!r}.{did_you_mean(word, _KINDS)}", f"one of {', '.join(MODALITIES)}"
        )
    return _KINDS[word]


def read_json(path: Path) -> Any:
    """The content of a prompt file.

    Raises:
        UsageError: when it is no JSON text, or names something twice.
    """
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"{path} is no JSON text: {e}") from e


def _parse(path: Path) -> Task:
    raw = read_json(path)
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"{path} is no task", 'write {"class": ["prompt", ...], ...}')
    if "classes" not in raw:
        label = "modality" if set(raw) <= set(MODALITIES) else f"{LABEL_PREFIX}{path.stem}"
        raw = {"name": path.stem, "label": label, "classes": raw}
    unknown = sorted(set(raw) - _FIELDS)
    if unknown:
        raise UsageError(f"{path} has no field {unknown[0]!r}.{did_you_mean(unknown[0], _FIELDS)}")
    raw.setdefault("name", path.stem)
    if raw.get("modality"):
        raw.setdefault("label", f"{LABEL_PREFIX}{path.stem}")
    where = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in raw.pop("where", {}).items()}
    classes = {k: _prompts(v, k, path) for k, v in raw.pop("classes").items()}
    ignore = tuple(raw.pop("ignore", ()))
    return checked(Task(**raw, classes=classes, where=where, ignore=ignore), str(path))


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    twice = [k for k, n in Counter(k for k, _ in pairs).items() if n > 1]
    if twice:
        raise UsageError(f"{path} names {twice[0]!r} twice")
    return dict(pairs)


def _prompts(value: Any, name: str, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(p, str) for p in value):
        raise UsageError(f"{path}: the prompts of class {name!r} are no list of texts")
    return tuple(value)


def checked(task: Task, where: str) -> Task:
    """The task itself, when it is one.

    Args:
        task: any.
        where: what to call it in an error.

    Raises:
        UsageError: for fewer than two classes, empty or shared prompts, names that differ by case only, or an unknown
            metric, group, label or filter.
    """
    classes = task.classes
    if len(classes) < 2:
        raise UsageError(
            f"{where} has {len(classes)} class(es)", "zero-shot classification needs at least two"
        )
    for name, prompts in classes.items():
        if not name.strip():
            raise UsageError(f"{where} has a class without a name")
        if not prompts or not all(p.strip() for p in prompts):
            raise UsageError(f"{where}: class {name!r} has no prompts or an empty one")
    folded = Counter(k.casefold() for k in classes)
    if max(folded.values()) > 1:
        same = [k for k in classes if folded[k.casefold()] > 1]
        raise UsageError(f"{where}: classes differ by case only: {', '.join(same)}")
    owner: dict[str, str] = {}
    for name, prompts in classes.items():
        for p in prompts:
            if owner.setdefault(p, name) != name:
                raise UsageError(f"{where}: classes {owner[p]!r} and {name!r} share the prompt {p!r}")
    if task.modality and task.modality not in MODALITIES:
        raise UsageError(
            f"{where}: modality is {task.modality!r}.{did_you_mean(str(task.modality), MODALITIES)}",
            f"one of {', '.join(MODALITIES)}",
        )
    if task.metric not in METRICS:
        raise UsageError(f"{where}: metric is {task.metric!r}", f"one of {', '.join(METRICS)}")
    if task.group not in GROUPS:
        raise UsageError(f"{where}: group is {task.group!r}", f"one of {', '.join(GROUPS)}")
    if task.label not in ("modality", "source") and not task.label.startswith(LABEL_PREFIX):
        raise UsageError(f"{where}: label is {task.label!r}", f"modality, source or {LABEL_PREFIX}PREFIX")
    for name in task.where:
        if name not in FILTERS and not name.startswith(LABEL_PREFIX):
            raise UsageError(f"{where}: where has no field {name!r}.{did_you_mean(name, FILTERS)}")
    clash = sorted(set(task.ignore) & set(classes))
    if clash:
        raise UsageError(f"{where}: {clash[0]!r} is both a class and ignored")
    return task


def values_of(example: Example, name: str) -> tuple[Any, ...]:
    """The values of a record's field, or of its `prefix:value` labels."""
    if not name.startswith(LABEL_PREFIX):
        value = getattr(example, name)
        return (value,) if value != "" else ()
    prefix = name.removeprefix(LABEL_PREFIX) + ":"
    return tuple(v.removeprefix(prefix) for v in example.labels if v.startswith(prefix))


def select(task: Task, examples: Mapping[int, Example]) -> dict[int, int]:
    """Which records belong to a task, with their class index, before anything is computed.

    A record belongs when it passes `where` and carries the label; ignored values are left out.

    Raises:
        DataError: for labels that are no class (all of them, and classes that differ by case only), for records with
            two values of the label, and when no record is left, with what was asked for.
    """
    index = {k: i for i, k in enumerate(task.classes)}
    picked: dict[int, int] = {}
    unknown: Counter[str] = Counter()
    for i, e in examples.items():
        if not all(set(values_of(e, name)) & set(accepted) for name, accepted in task.where.items()):
            continue
        found = [v for v in values_of(e, task.label) if v not in task.ignore]
        if len(found) > 1:
            raise DataError(
                f"task {task.name}: record {e.key} has {len(found)} values of {task.label}: {found}"
            )
        for v in found:
            if v in index:
                picked[i] = index[v]
            else:
                unknown[v] += 1
    if unknown:
        _refuse_labels(task, unknown, {list(index)[c] for c in picked.values()})
    if not picked:
        asked = ", ".join(f"{k} in {list(v)}" for k, v in task.where.items()) or "all records"
        raise DataError(
            f"task {task.name}: none of {len(examples)} records has {task.label} ({asked})",
            "unimed-jax data stats shows the labels of a folder",
        )
    return picked


def _refuse_labels(task: Task, unknown: Counter[str], used: set[str]) -> None:
    folded = {k.casefold(): k for k in task.classes}
    parts = [f"{v!r} x{n}" for v, n in sorted(unknown.items())]
    case = [f"{v!r} is {folded[v.casefold()]!r} but for case" for v in unknown if v.casefold() in folded]
    unused = sorted(set(task.classes) - used)
    extra = "; ".join([*case, *([f"classes without records: {', '.join(unused)}"] if unused else [])])
    raise DataError(
        f"task {task.name}: {task.label} has values that are no class: {', '.join(parts)}"
        + (f"; {extra}" if extra else ""),
        "add classes for them or list them under ignore",
    )
