"""Plain data out of a pickle, without an unpickler: strings, numbers, lists and dictionaries, and nothing that is called.

The reader knows the opcodes of data alone. What a pickle says by a name of a class is refused, but for the dictionaries of
`collections`, in whose place a plain one is made here; neither is imported. What would run code in an unpickler is an
error here, which names it, and nothing of the file is run.

References:
    [1] Python's `pickletools`, which splits a pickle into opcodes and documents each.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

_MARK = object()
_MOST = 50_000_000  # opcodes
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_DICTIONARIES = {"collections OrderedDict", "collections Counter"}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Any] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}


class _Dictionary:
    """Stands for a class of `collections` until the pickle says what is in it."""


def read_plain_pickle(path: Path) -> Any:
    """Return what a pickle or a file of `torch.save` holds, if that is plain data.

    Args:
        path: of the file.

    Raises:
        ValueError: it holds anything else, which would be made by running code, or is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
                if name is None:
                    raise ValueError("no data.pkl in it")
                return _next_object(io.BytesIO(archive.read(name)))
        with path.open("rb") as stream:
            found = _next_object(stream)
            if found != _TORCH_MAGIC or isinstance(found, bool):
                return found
            for _ in ("protocol", "system"):
                _next_object(stream)
            return _next_object(stream)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} must hold plain data, which is read without running anything: {error}") from None


def _next_object(stream: BinaryIO) -> Any:
    """Read one pickle."""
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _MOST:
            raise ValueError(f"more than {_MOST} opcodes")
        if opcode.name == "STOP":
            return machine.result()
        machine.take(opcode.name, argument)
    raise ValueError("it ends too early")


class _Machine:
    """A stack of plain values, as a pickle's opcodes build them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What is left at the end.

        Raises:
            ValueError: more or less than one value is.
        """
        if len(self.stack) != 1 or self.stack[0] is _MARK or isinstance(self.stack[0], _Dictionary):
            raise ValueError(f"{len(self.stack)} values at its end")
        return self.stack[0]

    def take(self, name: str, argument: Any) -> None:
        """Do what an opcode of data says.

        Raises:
            ValueError: the opcode is none.
        """
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            size = _TUPLES[name]
            self.stack[-size:] = [tuple(self.stack[-size:])]
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name not in _IGNORED and not self._memory(name, argument) and not self._collect(name):
            self._stand_in(name, argument)

    def _memory(self, name: str, argument: Any) -> bool:
        """Remember the top, or bring back what was remembered."""
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        else:
            return False
        return True

    def _marked(self) -> list[Any]:
        """Take all above the last mark off the stack."""
        at = len(self.stack) - 1 - next(i for i, value in enumerate(reversed(self.stack)) if value is _MARK)
        found, self.stack[at:] = self.stack[at + 1 :], []
        return found

    def _collect(self, name: str) -> bool:
        """Put what lies above a mark together, or into the list or dictionary below."""
        if name in ("LIST", "TUPLE"):
            found = self._marked()
            self.stack.append(found if name == "LIST" else tuple(found))
        elif name == "DICT":
            found = self._marked()
            self.stack.append(dict(zip(found[::2], found[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            found = [self.stack.pop()] if name == "APPEND" else self._marked()
            self._top(list).extend(found)
        elif name in ("SETITEM", "SETITEMS"):
            found = self._marked() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
            self._top(dict).update(zip(found[::2], found[1::2], strict=True))
        else:
            return False
        return True

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {kind.__name__} is filled that is none")
        return self.stack[-1]

    def _stand_in(self, name: str, argument: Any) -> None:
        """Make a plain dictionary where the pickle calls for one of `collections`; refuse everything else."""
        if name == "GLOBAL":
            self._class(str(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = self.stack[-2:]
            del self.stack[-2:]
            self._class(f"{module} {attribute}")
        elif name == "REDUCE":
            arguments, stand_in = self.stack.pop(), self.stack.pop()
            plain = isinstance(stand_in, _Dictionary) and type(arguments) is tuple
            given = arguments[0] if plain and arguments and arguments[0] is not None else {}
            if not plain or len(arguments) > 1 or type(given) not in (dict, list):
                raise ValueError("it calls something (opcode REDUCE)")
            self.stack.append(dict(given))
        else:
            raise ValueError(f"opcode {name}, which is no plain data")

    def _class(self, name: str) -> None:
        if name not in _DICTIONARIES:
            raise ValueError(f"it names {name.replace(' ', '.')}")
        self.stack.append(_Dictionary())
