"""Which prompts a suite is asked with: our own, a file's, or those of the user's own checkout of the original.

The original's tables are read from its source text with `ast`: plain dict literals of lists of texts are taken, nothing
is ever executed, and the file's hash goes into the results. None of these texts is part of this package.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax.errors import UsageError, did_you_mean
from unimed_jax.evaluate import multilabel, suites, tasks

FOLDER = tasks.FOLDER / "unimed21"
REFERENCE = "ref:"
_MAX_SOURCE = 16 << 20  # bytes

Classes = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where prompts come from."""

    kind: str  # "own", "file" or "reference"
    file: str = ""
    sha256: str = ""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # prompts, or pairs of them

    def json(self) -> dict[str, str]:
        """For results.json."""
        return {"kind": self.kind} | ({"file": self.file, "sha256": self.sha256} if self.file else {})


def load(spec: str) -> Source:
    """Reads `--prompts`: nothing for our own, a JSON file, or `ref:PATH/constants.py`.

    Raises:
        UsageError: for a file that cannot be read or holds no prompts.
    """
    if not spec:
        return Source(kind="own")
    path = Path(spec.removeprefix(REFERENCE))
    try:
        if path.stat().st_size > _MAX_SOURCE:
            raise UsageError(f"prompt file {path} is larger than {_MAX_SOURCE} bytes")
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(
            f"prompt file {path} cannot be read ({e.strerror or type(e).__name__})",
            "FILE.json, or ref:PATH/constants.py of a checkout of the original",
        ) from e
    reference = spec.startswith(REFERENCE)
    tables = tables_of(data, str(path)) if reference else _file(data, path)
    return Source(
        kind="reference" if reference else "file",
        file=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        tables=tables,
    )


def tables_of(source: bytes, where: str) -> dict[str, Classes]:
    """The tables of a Python source: every name that is assigned a dict literal of lists of texts at the top level.

    Raises:
        UsageError: for a text that is no Python, or without any table.

    Example:
        >>> tables_of(b"A = {'no': ['a', 'b'], 'yes': ['c']}; B = open('x')", "x.py")
        {'A': {'no': ('a', 'b'), 'yes': ('c',)}}
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UsageError(f"{where} is no Python source ({type(e).__name__})") from e
    found: dict[str, Classes] = {}
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            if isinstance(target, ast.Name):
                found.pop(target.id, None)  # a later assignment replaces an earlier one, whatever it is
                table = _table(getattr(node, "value", None))
                if table:
                    found[target.id] = table
    if not found:
        raise UsageError(f"{where} assigns no dict of prompts", "give the original's constants.py")
    return found


def _table(node: ast.AST | None) -> Classes | None:
    if not isinstance(node, ast.Dict):
        return None
    out: Classes = {}
    for key, value in zip(node.keys, node.values, strict=True):
        prompts = [_text(e) for e in value.elts] if isinstance(value, (ast.List, ast.Tuple)) else []
        name = _text(key)
        if name is None or not prompts or None in prompts:
            return None
        out[name] = tuple(p for p in prompts if p is not None)
    return out


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _file(data: bytes, path: Path) -> dict[str, dict[str, Any]]:
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path} is no JSON text: {e}") from e
    good = isinstance(raw, dict) and raw
    if good and isinstance(raw.get("name"), str):  # one of our own files, of a task or of findings
        raw = {raw["name"]: raw.get("classes", raw.get("findings", {}))}
    for name, classes in raw.items() if good else ():
        good = good and isinstance(classes, dict) and bool(classes)
        for prompts in classes.values() if good and not _paired(classes) else ():
            good = good and isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
        if not good:
            raise UsageError(f"{path}: {name!r} is no table of prompts", _FORM)
    if not good:
        raise UsageError(f"{path} holds no prompts", _FORM)
    return {
        name: multilabel.pairs_of(classes, f"{path}: {name}")
        if _paired(classes)
        else {k: tuple(v) for k, v in classes.items()}
        for name, classes in raw.items()
    }


def _paired(classes: Mapping[str, Any]) -> bool:
    """Whether a table is one of findings; `multilabel` judges whether it is a good one."""
    return any(isinstance(v, dict) for v in classes.values())


_FORM = 'write {"set": {"class": ["prompt", ...], ...}, ...}'


def task(s: suites.DataSet, source: Source) -> tuple[tasks.Task | multilabel.Findings, str]:
    """The question that a set is asked with, and in words where it comes from.

    A file's classes go by name. The original's go by position, which is how it reads them, and the words say which key
    became which class.

    Raises:
        UsageError: when the source has no table for the set, or the classes do not fit.
    """
    if s.multilabel:
        return _findings(s, source)
    if source.kind == "reference":
        found, words = _from_reference(s, source)
    elif source.kind == "file":
        table = source.tables.get(s.name)
        if table and _paired_table(table):
            raise UsageError(f"{source.file}: {s.name} has pairs of prompts, but one label a picture")
        found, words = _by_name(s, table, f"{source.file}: {s.name}", source.tables), ""
    else:
        found, words = _own(s)
    if s.prompt_count:
        found = {k: v[: s.prompt_count] for k, v in found.items()}
        words = f"{words}; the first {s.prompt_count} of each class only".removeprefix("; ")
    made = tasks.Task(
        name=s.name,
        classes=found,
        label=f"labels:{s.name}",
        metric=s.metric,
        description=f"Modality: {s.modality}." if s.modality else "",
    )
    # What the original asks is not ours to refuse: its classes may share a prompt.
    return (made if source.kind == "reference" else tasks.checked(made, f"prompts of {s.name}")), words


def _findings(s: suites.DataSet, source: Source) -> tuple[multilabel.Findings, str]:
    """The pairs of a multi-label set, by name."""
    table: Mapping[str, Any]
    if source.kind == "reference":
        raise UsageError(
            f"{s.name}: the original has no multi-label sets", "leave it out, or give --prompts FILE"
        )
    if source.kind == "file":
        where, words = f"{source.file}: {s.name}", ""
        table = _by_name(s, source.tables.get(s.name), where, source.tables)
        if not _paired_table(table):
            raise UsageError(f"{where} has no pairs of prompts", multilabel.FORM)
    elif s.pairs:
        table, words = s.pairs, "of the suite file"
    elif isinstance(s.prompts, str) and s.prompts:
        found = multilabel.load(s.prompts)
        table, words = found.findings, f"{found.name} version {found.version}"
        table = _by_name(s, table, found.name, {})
    else:
        table = multilabel.from_labels(s.classes, modality=s.modality).findings
        words = "neutral sentences with the names of the findings: there are no prompts for this set"
    made = multilabel.Findings(
        name=s.name, findings=dict(table), label=f"labels:{s.name}", metric=s.metric, modality=s.modality
    )
    return multilabel.checked(made, f"prompts of {s.name}"), words


def _paired_table(table: Mapping[str, Any]) -> bool:
    return all(isinstance(v, multilabel.Pair) for v in table.values())


def _own(s: suites.DataSet) -> tuple[Classes, str]:
    if isinstance(s.prompts, dict):
        return s.prompts, "of the suite file"
    path = FOLDER / f"{s.prompts}.json"
    if s.prompts and path.is_file():
        found = tasks.load(path)
        words = f"{path.stem} version {found.version}"
        return _by_name(s, found.classes | s.extra_prompts, path.name, {}), words
    if s.prompts:
        raise UsageError(f"{s.name}: there are no built-in prompts {s.prompts!r}", "give --prompts FILE")
    plain = tasks.from_labels(s.classes, modality=s.modality, name=s.name)
    return dict(plain.classes), "neutral sentences with the class names: there are no prompts for this set"


def _from_reference(s: suites.DataSet, source: Source) -> tuple[Classes, str]:
    if not s.table:
        raise UsageError(f"{s.name}: the original has no prompt table for it")
    if s.table not in source.tables:
        raise UsageError(
            f"{source.file} has no dict of prompts {s.table!r}.{did_you_mean(s.table, source.tables)}"
        )
    table = source.tables[s.table]
    found = _by_position(s, table, f"{source.file}: {s.table}")
    named = [f"{k!r} as {c!r}" for k, c in zip(table, s.classes, strict=True) if k != c]
    return found, s.table + (f" ({', '.join(named[:8])})" if named else "")


def _by_position(s: suites.DataSet, table: Mapping[str, tuple[str, ...]], where: str) -> Classes:
    if len(table) != len(s.classes):
        raise UsageError(f"{where} has {len(table)} classes, the set {s.name} has {len(s.classes)}")
    return dict(zip(s.classes, table.values(), strict=True))


def _by_name(
    s: suites.DataSet, table: Mapping[str, Any] | None, where: str, known: Mapping[str, Any]
) -> dict[str, Any]:
    if table is None:
        raise UsageError(f"{where} is missing.{did_you_mean(s.name, known)}", _FORM)
    lacks = [c for c in s.classes if c not in table]
    extra = [c for c in table if c not in s.classes]
    if lacks or extra:
        parts = [f"no prompts for {', '.join(lacks)}"] * bool(lacks)
        parts += [f"no class {', '.join(extra)}"] * bool(extra)
        raise UsageError(f"{where}: {'; '.join(parts)}", f"the classes are: {', '.join(s.classes)}")
    return {c: table[c] for c in s.classes}
