"""Suites as data: which data sets, how each is stored, which classes, labels and prompts it has.

`suites/unimed21.json` holds the 21 sets of the UniMed-CLIP average and a few beside it. A suite file of one's own is
JSON or YAML of the same form; the shortest one is

    {"name": "mine", "sets": [{"name": "lungs", "modality": "CT", "classes": ["nodule", "none"],
                               "layout": {"kind": "folders"}}]}

Every set may carry named `options`: changes to its own entry (a ninth class, each repeated picture once), and
`reference`: changes that reproduce the original evaluator.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax.config import MODALITIES
from unimed_jax.data import medmnist
from unimed_jax.errors import UsageError, did_you_mean
from unimed_jax.evaluate import multilabel, yaml_text
from unimed_jax.evaluate.metrics import METRICS
from unimed_jax.evaluate.multilabel import Pair

FOLDER = Path(__file__).parent / "suites"
KINDS = ("csv", "folders", "names", "npz")
YAML = (".yaml", ".yml")
INDEX = "index"  # labels: "index" = the source writes the class index


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a set lies on the disk. Columns are positions (0-based) or names of the header."""

    kind: str  # csv; folders: one a class; names: NAME_LABEL.png in one folder; npz: MedMNIST
    folder: str = ""  # of the set below the data root
    file: str = ""  # csv, npz: the annotation file, from the set's folder
    shipped: bool = False  # the original's own repository holds the file
    images: str = ""  # pictures are named from here; may contain {label}
    image: int | str = 0
    label: int | str | tuple[str, ...] = 1  # several: one-hot columns, the largest counts
    image_list: bool = False  # the cell is a list in Python's notation, its first element counts
    label_list: bool = False
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column -> accepted values
    paths: str = ""  # regular expression that a picture's name must contain
    ignore: tuple[str, ...] = ()  # labels that are known and left out
    once: bool = False  # a picture that is listed again is left out
    group_columns: tuple[str, ...] = ()  # the first of these that the file has says who was pictured
    group_pattern: str = ""  # or the match of this in the picture's name
    split: str = "test"  # npz
    separator: str = ""  # of a multi-label set: one cell names several findings
    none: tuple[str, ...] = ()  # what such a cell says when there is no finding
    blank: str = "unknown"  # what a blank cell says: unknown or absent


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One data set of a suite."""

    name: str
    classes: tuple[str, ...]
    layout: Layout
    modality: str = ""
    labels: dict[str, int] = field(default_factory=dict)  # as written in the source -> class index
    metric: str = "accuracy"  # the one that enters the averages
    average: bool = True
    multilabel: bool = False  # classes are findings that do not exclude each other
    binary: bool = False  # the original reports five metrics for it
    prompts: str | dict[str, tuple[str, ...]] = ""  # whose built-in prompts; or prompts
    pairs: dict[str, Pair] = field(default_factory=dict)  # of a multi-label set that brings its own
    extra_prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # beside the built-in ones
    prompt_count: int = 0  # only so many of each class; 0 = all
    table: str = ""  # the prompt table's name in the original's constants.py
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)  # name -> classes scored apart
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fetch: str = ""
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def changed(self, changes: Mapping[str, Any]) -> DataSet:
        """The set with some fields of its entry replaced; those of `layout` one by one."""
        new = {k: v for k, v in changes.items() if k != "about"}
        layout = self.raw["layout"] | new.pop("layout", {})
        return _data_set(self.raw | new | {"layout": layout}, f"set {self.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Data sets that are evaluated together."""

    name: str
    sets: tuple[DataSet, ...]
    version: int = 1
    description: str = ""
    published: tuple[dict[str, Any], ...] = ()  # averages to stand beside
    sha256: str = ""
    average: tuple[str, ...] = ()  # names of all sets that belong to the average, chosen or not

    def choose(
        self, wanted: Sequence[str] = (), options: Sequence[str] = (), *, reference: bool = False
    ) -> Suite:
        """Some of the sets (default: those of the average), with options applied.

        Args:
            wanted: names, in any order; the suite's order is kept.
            options: `SET:OPTION`.
            reference: apply what reproduces the original evaluator.

        Raises:
            UsageError: for an unknown set or option, with the closest known one.
        """
        known = {s.name: s for s in self.sets}
        asked: dict[str, list[str]] = {}
        for text in options:
            name, _, option = text.partition(":")
            _known(name, known, "set")
            _known(option, known[name].options, f"option of {name}")
            asked.setdefault(name, []).append(option)
        for name in wanted:
            _known(name, known, "set")
        out = []
        for s in self.sets:
            if s.name in wanted if wanted else s.average:
                changes = [s.options[o] for o in asked.get(s.name, [])] + [s.reference] * reference
                for change in changes:
                    s = s.changed(change)
                out.append(s)
        lost = sorted(set(asked) - {s.name for s in out})
        if lost:
            raise UsageError(f"an option is given for {lost[0]}, which is not evaluated", "name it in --sets")
        return dataclasses.replace(self, sets=tuple(out))


def names() -> list[str]:
    """The built-in suites.

    Example:
        >>> names()
        ['unimed21']
    """
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def load(name: str | Path) -> Suite:
    """A built-in suite by name, or one from a JSON or YAML file.

    Raises:
        UsageError: for an unknown name, or a file that is no valid suite, naming set and field.

    Example:
        >>> len([s for s in load("unimed21").sets if s.average])
        21
    """
    path = Path(name)
    if str(name) in names():
        path = FOLDER / f"{name}.json"
    elif path.suffix not in (".json", *YAML) and not path.exists():
        raise UsageError(
            f"no suite {str(name)!r}.{did_you_mean(str(name), names())}",
            f"one of {', '.join(names())}, or a .json or .yaml file",
        )
    try:
        data = path.read_bytes()
    except OSError as e:
        what = f"suite file {path} cannot be read ({e.strerror or type(e).__name__})"
        raise UsageError(what, "check its name and permissions") from e
    raw = yaml_text.parse(data, str(path)) if path.suffix in YAML else _json(data, path)
    return from_dict(raw, path, hashlib.sha256(data).hexdigest())


def _json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path} is no JSON text: {e}") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [k for k, n in Counter(k for k, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is named twice")
    return dict(pairs)


def from_dict(raw: Any, path: Path, digest: str = "") -> Suite:
    """A suite from the content of its file.

    Args:
        raw: the content.
        path: what messages call it.
        digest: SHA-256 of the file.

    Raises:
        UsageError: see `load`.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("sets"), list) or not raw["sets"]:
        raise UsageError(f"{path} is no suite", 'write {"name": ..., "sets": [{"name": ...}, ...]}')
    _fields(raw, ("name", "version", "description", "sets", "published"), str(path))
    _types(raw, _HEAD_TYPES, str(path))
    sets = []
    for i, entry in enumerate(raw["sets"]):
        where = f"{path}: set {i}"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UsageError(f"{where} has no name")
        sets.append(_data_set(entry, f"{path}: set {entry['name']}"))
    twice = [k for k, n in Counter(s.name.casefold() for s in sets).items() if n > 1]
    if twice:
        raise UsageError(f"{path}: two sets are named {twice[0]!r}")
    for s in sets:  # every variant must be valid before someone asks for it
        for change in [*s.options.values(), s.reference]:
            if not isinstance(change, dict) or not isinstance(change.get("layout", {}), dict):
                raise UsageError(f"{path}: set {s.name}: an option is no table of changes")
            s.changed(change)
    published = tuple(raw.get("published", ()))
    head = {k: raw[k] for k in ("version", "description") if k in raw}
    name = str(raw.get("name", path.stem))
    average = tuple(s.name for s in sets if s.average)
    return Suite(name=name, sets=tuple(sets), published=published, sha256=digest, average=average, **head)


_NAMES = tuple(f.name for f in dataclasses.fields(DataSet) if f.name not in ("raw", "pairs"))
_LAYOUT_NAMES = tuple(f.name for f in dataclasses.fields(Layout))
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("average", "binary", "multilabel"), (bool,)),
    **dict.fromkeys(("table", "fetch", "modality", "metric"), (str,)),
    **dict.fromkeys(("parts", "options", "reference", "extra_prompts"), (dict,)),
    "prompt_count": (int,),
    "notes": (list,),
}
_LAYOUT_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("folder", "file", "images", "paths", "group_pattern", "split", "separator", "blank"), (str,)
    ),
    **dict.fromkeys(("shipped", "image_list", "label_list", "once"), (bool,)),
    "image": (int, str),
    "label": (int, str, list),
    "where": (dict,),
}
_HEAD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "description"), (str,)),
    "version": (int,),
    "published": (list,),
}


def _data_set(raw: Mapping[str, Any], where: str) -> DataSet:
    _fields(raw, _NAMES, where)
    _types(raw, _TYPES, where)
    if "classes" not in raw:
        raw = _of_medmnist(raw.get("layout")) | dict(raw)
    name, classes = raw["name"], raw.get("classes")
    if not re.fullmatch(r"[\w.-]{1,80}", name) or name.startswith("."):
        raise UsageError(f"{where}: the name may hold letters, digits, dots, dashes and underscores only")
    if not isinstance(classes, list) or not all(isinstance(c, str) and c.strip() for c in classes):
        raise UsageError(f"{where}: classes is no list of names")
    several = raw.get("multilabel", False)
    if len(classes) < 2 - several or len({c.casefold() for c in classes}) < len(classes):
        raise UsageError(f"{where}: classes must be at least two, and differ by more than case")
    modality, metric = raw.get("modality", ""), raw.get("metric", "auroc" if several else "accuracy")
    if modality and modality not in MODALITIES:
        raise UsageError(f"{where}: no modality {modality!r}", f"one of {', '.join(MODALITIES)}")
    known = multilabel.METRICS if several else METRICS
    if metric not in known:
        raise UsageError(f"{where}: metric is {metric!r}", f"one of {', '.join(known)}")
    for field_name in ("binary", "parts", "reference", "extra_prompts", "prompt_count") if several else ():
        if raw.get(field_name):
            raise UsageError(f"{where}: a multi-label set has no {field_name}")
    if raw.get("prompt_count", 0) < 0:
        raise UsageError(f"{where}: prompt_count is below 0")
    pairs = {}
    if several and isinstance(raw.get("prompts"), dict):
        pairs = multilabel.pairs_of(raw["prompts"], f"{where}: prompts")
        if list(pairs) != classes:
            raise UsageError(f"{where}: prompts do not name exactly the classes in their order")
    rest = ("average", "multilabel", "binary", "prompt_count", "table", "options", "reference", "fetch")
    return DataSet(
        name=name,
        classes=tuple(classes),
        layout=_layout(raw.get("layout"), where, len(classes) if several else 0),
        modality=modality,
        metric=metric,
        labels=_labels(raw.get("labels", {}), classes, where),
        prompts="" if pairs else _own_prompts(raw.get("prompts", ""), classes, where),
        pairs=pairs,
        extra_prompts={
            k: _texts(v, f"{where}: extra_prompts") for k, v in raw.get("extra_prompts", {}).items()
        },
        parts={k: _indices(v, len(classes), where) for k, v in raw.get("parts", {}).items()},
        notes=_texts(raw.get("notes", []), f"{where}: notes"),
        raw=dict(raw),
        **{k: raw[k] for k in rest if k in raw},
    )


def _of_medmnist(layout: Any) -> dict[str, Any]:
    """What the entry of a MedMNIST file need not say; nothing for other layouts."""
    file = layout.get("file") if isinstance(layout, dict) and layout.get("kind") == "npz" else None
    known = medmnist.SETS.get(medmnist.name_of(Path(file))) if isinstance(file, str) else None
    if known is None:
        return {}
    labels = {"multilabel": True} if known.multilabel else {"labels": INDEX}
    return {"classes": list(known.names), "modality": known.modality, **labels}


def _layout(raw: Any, where: str, findings: int) -> Layout:
    if not isinstance(raw, dict) or raw.get("kind") not in KINDS:
        raise UsageError(f"{where}: layout has no kind", f"one of {', '.join(KINDS)}")
    _fields(raw, _LAYOUT_NAMES, f"{where}: layout")
    values = dict(raw)
    _types(raw, _LAYOUT_TYPES, f"{where}: layout")
    for key in ("ignore", "group_columns", "none"):
        values[key] = _texts(raw.get(key, []), f"{where}: layout.{key}")
    columns = raw.get("label", 1)
    if isinstance(columns, list):
        values["label"] = _texts(columns, f"{where}: layout.label")
    if raw.get("image", 0) is True or columns is True or columns == []:
        raise UsageError(f"{where}: layout.image and layout.label are columns")
    asked = {k: v if isinstance(v, list) else [v] for k, v in raw.get("where", {}).items()}
    values["where"] = {k: tuple(str(x) for x in v) for k, v in asked.items()}
    for key in ("paths", "group_pattern"):
        try:
            re.compile(values.get(key, ""))
        except re.error as e:
            raise UsageError(f"{where}: layout.{key} is no regular expression: {e}") from e
    if values["kind"] in ("csv", "npz") and not values.get("file"):
        raise UsageError(f"{where}: layout.file is missing", "name the annotation file")
    _check_findings(values, where, findings)
    return Layout(**values)


def _check_findings(values: Mapping[str, Any], where: str, findings: int) -> None:
    """What only makes sense with several labels a picture, and what then must be there."""
    if values.get("blank", "unknown") not in multilabel.UNLISTED:
        raise UsageError(f"{where}: layout.blank is {values['blank']!r}", "unknown or absent")
    if not findings:
        for key in ("separator", "none", "blank"):
            if values.get(key):
                raise UsageError(f"{where}: layout.{key} is for multi-label sets", '"multilabel": true')
        return
    if values["kind"] not in ("csv", "npz"):
        raise UsageError(f"{where}: a multi-label set is csv or npz, not {values['kind']}")
    columns = values.get("label", 1)
    if values["kind"] == "csv" and not values.get("separator"):
        if not isinstance(columns, tuple) or len(columns) != findings:
            raise UsageError(
                f"{where}: layout.label does not name {findings} columns, one for each class, in their order",
                "or name one column and the separator of its values",
            )
    elif isinstance(columns, tuple):
        raise UsageError(f"{where}: layout.label with a separator is one column")


def _labels(raw: Any, classes: Sequence[str], where: str) -> dict[str, int]:
    if raw == INDEX:
        return {str(i): i for i in range(len(classes))}
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: labels is no table", '{"as written": "class", ...} or "index"')
    if not raw:
        return {c: i for i, c in enumerate(classes)}
    for value in raw.values():
        _known(value, classes, f"class ({where}: labels)")
    return {k: list(classes).index(v) for k, v in raw.items()}


def _own_prompts(raw: Any, classes: Sequence[str], where: str) -> str | dict[str, tuple[str, ...]]:
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, dict) or set(raw) != set(classes):
        raise UsageError(f"{where}: prompts do not name exactly the classes", ", ".join(classes))
    return {c: _texts(raw[c], f"{where}: prompts of {c}") for c in classes}


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UsageError(f"{where} is no list of texts")
    return tuple(value)


def _indices(value: Any, classes: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < classes for v in value):
        raise UsageError(f"{where}: parts holds numbers that are no class", f"0 to {classes - 1}")
    return tuple(value)


def _types(raw: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    for key, wanted in types.items():
        if key in raw and not isinstance(raw[key], wanted):
            raise UsageError(
                f"{where}: {key} is {str(raw[key])[:40]!r}", " or ".join(t.__name__ for t in wanted)
            )


def _fields(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in known:
            raise UsageError(f"{where} has no field {key!r}.{did_you_mean(key, known)}")


def _known(name: Any, known: Any, what: str) -> None:
    if name not in known:
        raise UsageError(
            f"no {what} {name!r}.{did_you_mean(str(name), known)}",
            f"one of {', '.join(known)}" if known else "there are none",
        )
