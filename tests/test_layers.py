"""Imports run strictly downward (docs/architecture.md), and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the top of the program to its ground; a name covers the module and everything below it, the longest match
# wins. A module imports only from lower rows; within a row, anything but a cycle.
ROWS = [
    ["cli"],
    ["quickstart", "demo"],
    ["quickstart_scores"],
    ["train.loop", "train.plan", "train.finish", "evaluate.report", "evaluate.plots"],
    ["evaluate.embed", "evaluate.inputs", "evaluate.search", "evaluate.streams", "evaluate.overlap"],
    [
        *("evaluate.suite_run", "evaluate.embedding_tasks", "evaluate.zeroshot", "evaluate.references"),
        "evaluate.batches",
        *("evaluate.predict", "evaluate.question", "evaluate.truth"),
    ],
    ["conversion", "saliency"],
    ["infer", "model_folder", "hub"],
    ["train.checkpoint", "train.assemble", "convert"],
    ["models", "parallel", "train"],
    ["data.pipeline", "data.bench", "captioning"],
    ["data", "evaluate"],
    ["config_rules", "vectors"],
    ["config"],
    ["errors"],
]
NO_DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "tensorflow"}
DEVICE_FREE = (
    *("captioning", "data", "config", "config_rules", "errors", "evaluate.metrics", "evaluate.tasks"),
    *(
        "evaluate.multilabel",
        "evaluate.multilabel_metrics",
        "evaluate.calibration",
        "evaluate.calibration_fit",
    ),
    *("evaluate.suites", "evaluate.layouts", "evaluate.suite_prompts", "evaluate.suite_results"),
)


def row_of(module: str) -> int:
    matches = [
        (len(name), i)
        for i, row in enumerate(ROWS)
        for name in row
        if module == name or module.startswith(name + ".")
    ]
    assert matches, f"{module} has no row in ROWS: say where it belongs"
    return max(matches)[1]


def modules(package: Path) -> dict[str, ast.Module]:
    return {
        ".".join(p.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            p.read_text()
        )
        for p in sorted(package.rglob("*.py"))
        if p.parent != package or not p.stem.startswith("__")
    }


def imported(tree: ast.Module, *, anywhere: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; `anywhere=False` leaves out those inside functions."""
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for n in ast.walk(f)
    }
    never_run = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.If) and isinstance(f.test, ast.Name) and f.test.id == "TYPE_CHECKING"
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if id(node) in never_run or (not anywhere and id(node) in inside):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def internal(name: str, known: set[str]) -> str | None:
    if not name.startswith("unimed_jax."):
        return None
    name = name.removeprefix("unimed_jax.")
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def violations(trees: dict[str, ast.Module]) -> list[str]:
    known, found = set(trees), []
    edges: dict[str, set[str]] = {}
    for module, tree in trees.items():
        for name in imported(tree):
            target = internal(name, known)
            if target and target != module:
                if row_of(target) < row_of(module):
                    found.append(f"{module} imports {target}, which lies above it")
                edges.setdefault(module, set()).add(target)
    return found + cycles(edges)


def cycles(edges: dict[str, set[str]]) -> list[str]:
    state: dict[str, int] = {}
    found: list[str] = []

    def visit(m: str, path: tuple[str, ...]) -> None:
        state[m] = 1
        for n in sorted(edges.get(m, ())):
            if state.get(n) == 1:
                found.append("cycle: " + " -> ".join([*path, m, n]))
            elif n not in state:
                visit(n, (*path, m))
        state[m] = 2

    for m in sorted(edges):
        if m not in state:
            visit(m, ())
    return found


@pytest.fixture(scope="module")
def trees(repo_root: Path) -> dict[str, ast.Module]:
    return modules(repo_root / "unimed_jax")


def test_imports_run_downward(trees):
    assert violations(trees) == []


def test_the_check_sees_a_violation(trees):
    planted = {**trees, "config": ast.parse("from unimed_jax.train import loop"), "errors": ast.parse("")}
    assert any("config imports train" in v for v in violations(planted))
    planted = {
        "data.a": ast.parse("import unimed_jax.data.b"),
        "data.b": ast.parse("import unimed_jax.data.a"),
    }
    assert any(v.startswith("cycle") for v in violations(planted))


def test_data_never_touches_a_device(trees):
    found = [
        f"{m} imports {name}"
        for m, tree in trees.items()
        if any(m == p or m.startswith(p + ".") for p in DEVICE_FREE)
        for name in imported(tree)
        if name.split(".")[0] in NO_DEVICE
    ]
    assert found == []


def test_torch_only_inside_functions_of_convert(trees):
    for m, tree in trees.items():
        top = {n.split(".")[0] for n in imported(tree, anywhere=False)}
        every = {n.split(".")[0] for n in imported(tree)}
        assert "torch" not in top, f"{m} imports torch at module level"
        assert "torch" not in every or m.startswith("convert"), f"{m} imports torch"
        assert "tensorflow" not in every, f"{m} imports tensorflow"


@pytest.mark.parametrize("banned", ["pickle", "marshal", "shelve", "dill", "cloudpickle"])
def test_nothing_can_execute_a_file(trees, banned):
    for m, tree in trees.items():
        assert banned not in {n.split(".")[0] for n in imported(tree)}, f"{m} imports {banned}"
        calls = {
            n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, f"{m} calls {calls}"


def test_nnx_is_used_narrowly(trees):
    """Structure and names only: nnx transforms and nnx.Optimizer put framework state into checkpoints."""
    allowed = {"Module", "Param", "Rngs", "Linear", "LayerNorm", "Embed", "Conv", "initializers", "split", "merge",
               "eval_shape", "to_pure_dict", "GraphDef", "State", "List", "graph", "state", "data"}  # fmt: skip
    for m, tree in trees.items():
        used = {
            n.attr
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "nnx"
        }
        assert used <= allowed, f"{m} uses nnx.{used - allowed}"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_import_is_light():
    heavy = "{'jax', 'flax', 'grain', 'transformers', 'tensorflow_datasets', 'torch', 'numpy', 'PIL', 'rich'}"
    code = f"import sys, unimed_jax; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_help_is_light():
    code = (
        "import sys; from unimed_jax.cli import main; main.usage(); "
        "print(sorted({'jax', 'numpy', 'PIL', 'grain', 'absl'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_every_verb_exists():
    from unimed_jax.cli import main

    for verb in main.VERBS:
        out = subprocess.run(
            [sys.executable, "-m", "unimed_jax", verb, "--help"], capture_output=True, text=True, timeout=60
        )
        assert out.returncode == 0, f"{verb} --help: {out.stderr}"
        assert len(out.stdout) > 50, f"{verb} --help prints nothing"
