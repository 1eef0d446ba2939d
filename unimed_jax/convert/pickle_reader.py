"""An interpreter for the part of the pickle language that checkpoints need, and for nothing else.

The language is the one that the standard library's pickletools documents. Here a name in the file is only ever looked
up in a table given by the caller; it is never imported, and every count and length is bounded.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

from unimed_jax.convert.mapped import shown
from unimed_jax.convert.pickle_machine import (
    MAX_INT,
    MAX_NAME,
    MAX_PICKLE,
    MAX_STEPS,
    REMEDY,
    Known,
    Machine,
)
from unimed_jax.convert.plain import KEYS, Invalid, bare, check_plain
from unimed_jax.errors import DataError

__all__ = ("MAX_PICKLE", "MAX_STEPS", "Known", "Shell", "load", "load_first", "set_items")


def load(
    data: bytes,
    where: str,
    find: Callable[[str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, plain values and what `find`'s names make.

    Args:
        data: the whole pickle.
        where: what to call it in a refusal.
        find: value for "module.name", a `Known` or a plain value; None refuses the name.
        persistent: value for a persistent id.

    Raises:
        DataError: for a name outside the table, an instruction that is not needed, a limit passed, or damage.
    """
    value, end = load_first(data, where, find, persistent)
    if end != len(data):
        raise DataError(f"{where} is no readable checkpoint: bytes follow its end (byte {end})", REMEDY)
    return value


def load_first(
    data: bytes,
    where: str,
    find: Callable[[str], Any],
    persistent: Callable[[Any], Any] | None = None,
    *,
    start: int = 0,
) -> tuple[Any, int]:
    """As `load`, for a pickle at `start` that others may follow; also gives the byte after its end.

    Raises:
        DataError: as `load`.
    """
    machine = Machine(data, where, find, persistent, start)
    try:
        machine.run(_OPS, _REFUSED)
        check_plain(machine.result)
    except Invalid as e:
        machine.fail(str(e))
    return machine.result, machine.at


# One function per instruction: pickletools' names, in its groups.


def _proto(m: Machine) -> None:
    if not 2 <= m.number("<B") <= 5:
        m.fail("its protocol is none of 2 to 5")


def _frame(m: Machine) -> None:
    if m.number("<Q") > len(m.data) - m.at:
        m.fail("a frame is cut short")


def _stop(m: Machine) -> None:
    m.result, m.done = m.pop(), True
    if m.stack or m.marks:
        m.fail("values are left over")


def _mark(m: Machine) -> None:
    m.marks.append(len(m.stack))


def _pop(m: Machine) -> None:
    m.pop()


def _long(form: str) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        n = m.number(form)
        if not 0 <= n <= MAX_INT:
            m.fail(f"an integer of {n} bytes is over the limit of {MAX_INT}")
        m.stack.append(int.from_bytes(m.take(n), "little", signed=True))

    return op


def _constant(value: Any) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value)


def _fixed(form: str) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.number(form))


def _text(form: str, encoding: str) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        n = m.number(form)
        if n < 0:
            m.fail("a text has a negative length")
        raw = m.text(n)
        m.stack.append(m.decode(raw, encoding) if encoding else raw)

    return op


def _tuple(n: int) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        m.stack.append(tuple([m.pop() for _ in range(n)][::-1]))

    return op


def _put(form: str) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        m.memo[m.number(form)] = m.top()

    return op


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.top()


def _get(form: str) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        index = m.number(form)
        if index not in m.memo:
            m.fail(f"value {index} is not there yet")
        m.stack.append(m.memo[index])

    return op


def _append(m: Machine) -> None:
    _extend(m, [m.pop()])


def _extend(m: Machine, values: list[Any]) -> None:
    target = m.top()
    if type(target) is not list:
        m.fail("values are appended to what is no list")
    target.extend(values)


def set_items(target: Any, flat: list[Any]) -> None:
    """Puts keys and values, which alternate, into a dict.

    Raises:
        Invalid: for no dict, or a key that is no plain value or is there already.
    """
    if type(target) is not dict or len(flat) % 2:
        raise Invalid("keys and values are put into what is no dict")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if type(key) not in KEYS:
            raise Invalid(f"a {type(key).__name__} as a key")
        if key in target:
            raise Invalid(f"it holds the key {shown(key)} twice")
        target[key] = value


def _setitem(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    set_items(m.top(), [key, value])


def _setitems(m: Machine) -> None:
    flat = m.pop_mark()
    set_items(m.top(), flat)


def _appends(m: Machine) -> None:
    values = m.pop_mark()
    _extend(m, values)


def _global(m: Machine) -> None:
    m.lookup(f"{m.line()}.{m.line()}")


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > MAX_NAME:
        m.fail("a name is no text")
    m.lookup(f"{module}.{name}")


def _inst(m: Machine) -> None:
    m.forbid(f"{m.line()}.{m.line()}")


def _reduce(m: Machine) -> None:
    args, known = m.pop(), m.pop()
    if not isinstance(known, Known) or known.call is None or not isinstance(args, tuple):
        m.fail(
            f"it applies {bare(known.name) if isinstance(known, Known) else 'what is no function'}; not executed"
        )
    m.spend(args)
    m.stack.append(known.call(args))


def _newobj(m: Machine) -> None:
    args, known = m.pop(), m.pop()
    if not isinstance(known, Known) or not known.new or type(args) is not tuple or args:
        m.fail(
            f"it makes an object of {bare(known.name) if isinstance(known, Known) else 'no class'}; not executed"
        )
    made: dict[str, Any] = {}
    m.objects[id(made)] = made
    m.stack.append(made)


def _build(m: Machine) -> None:
    state, target = m.pop(), m.top()
    if isinstance(target, Shell):
        target.build(state)
    elif id(target) in m.objects:
        if type(state) is not dict:
            m.fail("an object has no table of attributes")
        m.spend(state)
        set_items(target, [x for pair in state.items() for x in pair])
    elif type(target) is not dict:  # a dict's state is the version table of an OrderedDict: not needed
        m.fail("a state is given to what has none")


def _persistent(m: Machine) -> None:
    if m.persistent is None:
        m.fail("it refers to a storage")
    m.stack.append(m.persistent(m.pop()))


class Shell(abc.ABC):
    """A value that takes its state in a second instruction, and is never part of the result."""

    @abc.abstractmethod
    def build(self, state: Any) -> None:
        """Takes the state.

        Raises:
            Invalid: when it makes no sense.
        """


_OPS: Mapping[int, Callable[[Machine], None]] = {
    code[0]: op
    for code, op in {
        b"\x80": _proto, b"\x95": _frame, b".": _stop, b"(": _mark, b"0": _pop, b"1": Machine.pop_mark,
        b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False),
        b"J": _fixed("<i"), b"K": _fixed("<B"), b"M": _fixed("<H"), b"G": _fixed(">d"),
        b"\x8a": _long("<B"), b"\x8b": _long("<i"),
        b"X": _text("<I", "utf-8"), b"\x8c": _text("<B", "utf-8"), b"\x8d": _text("<Q", "utf-8"),
        b"U": _text("<B", "latin-1"), b"T": _text("<i", "latin-1"),  # text of Python 2
        b"C": _text("<B", ""), b"B": _text("<I", ""), b"\x8e": _text("<Q", ""),
        b")": _constant(()), b"t": lambda m: m.stack.append(tuple(m.pop_mark())),
        b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
        b"]": lambda m: m.stack.append([]), b"a": _append, b"e": _appends,
        b"}": lambda m: m.stack.append({}), b"s": _setitem, b"u": _setitems,
        b"q": _put("<B"), b"r": _put("<I"), b"\x94": _memoize, b"h": _get("<B"), b"j": _get("<I"),
        b"c": _global, b"\x93": _stack_global, b"i": _inst,
        b"R": _reduce, b"\x81": _newobj, b"b": _build, b"Q": _persistent,
    }.items()
}  # fmt: skip
_REFUSED = {
    code[0]: name
    for code, name in {
        b"I": "INT", b"L": "LONG", b"F": "FLOAT", b"S": "STRING", b"V": "UNICODE", b"P": "PERSID", b"o": "OBJ",
        b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"2": "DUP", b"l": "LIST",
        b"d": "DICT", b"p": "PUT", b"g": "GET", b"\x8f": "EMPTY_SET", b"\x90": "ADDITEMS",
        b"\x91": "FROZENSET", b"\x96": "BYTEARRAY8", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
    }.items()
}  # fmt: skip
