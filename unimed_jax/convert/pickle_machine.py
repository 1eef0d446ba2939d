"""The state of the interpreter in convert/pickle_reader.py, and every bound on what a file can make of it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from unimed_jax.convert.plain import bare
from unimed_jax.errors import DataError

MAX_PICKLE = 32 * 2**20  # bytes of a whole pickle; 2000 tensors need 0.2 MB
MAX_STEPS = 500_000  # instructions; 2000 tensors need about 70 000
MAX_WORK = 8  # arguments of all calls, in values and characters, per byte of the file (and the steps on top)
MAX_TEXT = 2**20  # bytes of one string
MAX_INT = 32  # bytes of one integer
MAX_NAME = 512  # bytes of a module's or class's name
REMEDY = "get the weights as a plain state dict or as safetensors from a source that you trust"
SIZED = (str, bytes, list, tuple, dict)  # values whose length counts as work

Op = Callable[["Machine"], None]


class Known:
    """A name that the file may use.

    Args:
        name: as in the file, "module.name".
        call: what applying it to arguments gives; None when it is only ever an argument itself.
        new: gives an attribute table when an object is made of it.
    """

    __slots__ = ("call", "name", "new")

    def __init__(self, name: str, call: Callable[[tuple], Any] | None = None, *, new: bool = False):
        self.name, self.call, self.new = name, call, new


class Machine:
    """A stack, marks and a memo: the state between two instructions."""

    def __init__(self, data: bytes, where: str, find, persistent, start: int):
        self.data, self.where, self.find, self.persistent = data, where, find, persistent
        self.at = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # Attribute tables by identity; holding them keeps the identities valid.
        self.objects: dict[int, dict] = {}
        self.work = MAX_WORK * len(data) + MAX_STEPS
        self.done = False
        self.result: Any = None

    def fail(self, why: str) -> NoReturn:
        """Refuses the file, naming the place in it."""
        raise DataError(f"{self.where} is no readable checkpoint: {why} (byte {self.at})", REMEDY)

    def forbid(self, name: str) -> NoReturn:
        """Refuses a name outside the table."""
        raise DataError(f"{self.where} contains {bare(name)}; not executed", REMEDY)

    def run(self, ops: Mapping[int, Op], refused: Mapping[int, str]) -> None:
        """Follows instructions until the one that ends a pickle.

        Args:
            ops: what each instruction does, by its byte.
            refused: names of others, for the refusal.
        """
        data, steps = self.data, 0
        while not self.done:
            steps += 1
            if steps > MAX_STEPS:
                self.fail(f"it has more than {MAX_STEPS} instructions")
            if self.at >= len(data):
                self.fail("it is cut short")
            code = data[self.at]
            self.at += 1
            handler = ops.get(code)
            if handler is None:
                self.fail(f"instruction {refused.get(code, hex(code))} is not supported; not executed")
            handler(self)

    def spend(self, values: Any) -> None:
        """Counts what a call will look at: one large value must not be handed to a thousand calls."""
        self.work -= len(values) + sum(len(v) for v in values if isinstance(v, SIZED))
        if self.work < 0:
            self.fail("it uses the same values too often")

    def take(self, n: int) -> bytes:
        """The next bytes of the file."""
        if n > len(self.data) - self.at:
            self.fail("it is cut short")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> Any:
        """The next number, in a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """The next text that ends with its line."""
        end = self.data.find(b"\n", self.at, self.at + MAX_NAME + 1)
        if end < 0:
            self.fail("a name has no end")
        raw = self.data[self.at : end]
        self.at = end + 1
        return self.decode(raw)

    def decode(self, raw: bytes, encoding: str = "utf-8") -> str:
        """Bytes as text."""
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            self.fail("a text is not UTF-8")

    def text(self, n: int) -> bytes:
        """The next bytes of a text, whose length is bounded."""
        if n > MAX_TEXT:
            self.fail(f"a text of {n} bytes is over the limit of {MAX_TEXT}")
        return self.take(n)

    def pop(self) -> Any:
        """Takes the value on top; never one below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        """The value on top, left there."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("a value is missing")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """Takes the values above the last mark, and the mark."""
        if not self.marks:
            self.fail("a mark is missing")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def lookup(self, name: str) -> None:
        """Pushes what the table holds under a name."""
        value = self.find(name)
        if value is None:
            self.forbid(name)
        self.stack.append(value)
