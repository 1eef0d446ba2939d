"""Every global name that the package uses exists: the linters cannot say, since shape strings look like names."""

from __future__ import annotations

import builtins
import dis
import importlib
import pkgutil
import types
from collections.abc import Iterator

import pytest

import unimed_jax

MODULES = [
    m.name
    for m in pkgutil.walk_packages(unimed_jax.__path__, "unimed_jax.")
    if m.name.rpartition(".")[2] != "__main__"
]


def globals_used(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from globals_used(constant)


def undefined(name: str) -> set[str]:
    module = importlib.import_module(name)
    assert module.__file__
    with open(module.__file__, "rb") as f:
        code = compile(f.read(), module.__file__, "exec", dont_inherit=True)
    # Names of class bodies are loaded by name, too; they are defined there.
    local = {n for c in code.co_consts if isinstance(c, types.CodeType) for n in class_names(c)}
    known = vars(module).keys() | vars(builtins).keys() | local | {"__class__", "__annotations__"}
    return {n for n in globals_used(code) if n not in known}


def class_names(code: types.CodeType) -> set[str]:
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    return found.union(*(class_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


@pytest.mark.parametrize("name", MODULES)
def test_every_name_exists(name):
    assert undefined(name) == set()


def test_the_check_sees_a_missing_name(tmp_path, monkeypatch):
    (tmp_path / "probe_of_names.py").write_text(
        "def f():\n    return nowhere(1)\n\n\nclass A:\n    x = 1\n    y = x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert undefined("probe_of_names") == {"nowhere"}
