"""PyTorch's .pth and .pt archives, read without running the pickle inside them.

Such a file is a zip of one pickle (names, shapes) and one member of raw bytes for each storage. A pickle is a
program that may call anything; here its operations are interpreted one by one, and the only things it can reach are
the few records below. Anything else is refused. Source: torch/serialization.py's zip format, pickletools.
"""

from __future__ import annotations

import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestrale.checkpoint.dtypes import STORAGE
from maestrale.checkpoint.tensorfile import Entry, MappedFile, TensorFile
from maestrale.errors import CheckpointError

_MAX_PICKLE_BYTES = 8_000_000  # a thousand tensors take 300 kB
_STORAGE_DTYPES = {
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch DoubleStorage": "F64",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_GLOBALS = {*_STORAGE_DTYPES, _ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER}


@dataclass(frozen=True)
class _Global:
    """A name that the pickle mentions; nothing is imported for it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    start: int
    count: int  # of elements


class _Refused(Exception):
    """Why this pickle is not followed further."""


def open_pth(path: str | Path) -> TensorFile:
    """Maps the archive and reads its names; CheckpointError for anything but a dictionary of contiguous tensors."""
    mapped = MappedFile(path)
    try:
        archive = _Archive(mapped)
        found = _interpret(archive.read_pickle(), archive.storage)
        if not isinstance(found, dict):
            raise _Refused(f"it holds a {type(found).__name__}")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Entry):
                raise _Refused(f"{str(name)[:80]!r} is no tensor")
    except _Refused as reason:
        raise CheckpointError(
            f"{path}: refused: {reason}. A .pth file is a pickle, which can run code, so only a dictionary of "
            "tensors in torch's zip format is read; save it again as .safetensors"
        ) from None
    return TensorFile(mapped, found)


class _Archive:
    """The zip around it: members must be stored as they are, so that a tensor is a view of the file."""

    def __init__(self, mapped: MappedFile):
        self.mapped = mapped
        try:
            with zipfile.ZipFile(mapped.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError, EOFError, OSError):
            raise _Refused("it is no zip archive (torch's format before version 1.6, or damage)") from None
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members):
            raise _Refused("two members have one name")
        pickles = [name for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"it has {len(pickles)} members data.pkl, expected 1")
        self.prefix = pickles[0].removesuffix("data.pkl")
        order = self.prefix + "byteorder"
        if order in self.members and self._bytes(order, 16) != b"little":
            raise _Refused("its byte order is not little-endian")

    def read_pickle(self) -> bytes:
        return self._bytes(self.prefix + "data.pkl", _MAX_PICKLE_BYTES)

    def storage(self, reference: Any) -> _Storage:
        """reference: what the pickle says of a storage: ("storage", its class, member's name, device, elements)."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise _Refused("a reference that is no storage")
        _, kind, key, _, count = reference
        if not isinstance(kind, _Global) or kind.name not in _STORAGE_DTYPES:
            raise _Refused("a storage of an unknown class")
        if not isinstance(key, str) or not _is_size(count):
            raise _Refused("a storage without name or size")
        dtype = _STORAGE_DTYPES[kind.name]
        start, end = self._span(f"{self.prefix}data/{key}")
        if end - start != count * STORAGE[dtype].itemsize:
            raise _Refused(f"storage {key!r} has {end - start:,} bytes, expected {count:,} of {dtype}")
        return _Storage(dtype, start, count)

    def _bytes(self, name: str, limit: int) -> bytes:
        start, end = self._span(name)
        if end - start > limit:
            raise _Refused(f"member {name!r} has {end - start:,} bytes, expected at most {limit:,}")
        return self.mapped.data[start:end].tobytes()

    def _span(self, name: str) -> tuple[int, int]:
        """The bytes [start, end) of the file that are the member's."""
        member = self.members.get(name)
        if member is None:
            raise _Refused(f"member {name!r} is missing")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _Refused(f"member {name!r} is compressed or encrypted")
        offset = member.header_offset
        head = self.mapped.data[offset : offset + 30].tobytes() if offset >= 0 else b""
        if len(head) != 30 or head[:4] != b"PK\3\4":
            raise _Refused(f"member {name!r} has no local header")
        name_length, extra_length = struct.unpack("<HH", head[26:30])
        start = offset + 30 + name_length + extra_length
        end = start + member.file_size
        if end > len(self.mapped.data):
            raise _Refused(f"member {name!r} ends at byte {end:,} of {len(self.mapped.data):,}: truncated")
        return start, end


def _interpret(data: bytes, storage: Callable[[Any], _Storage]) -> Any:
    """Follows the pickle's operations as far as plain data and tensors go; _Refused for every other one."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        items = stack[-count:]
        if len(items) < count or (marks and len(stack) - count < marks[-1]):
            raise _Refused("its pickle is damaged")
        del stack[-count:]
        return items

    def pop_mark() -> list[Any]:
        if not marks:
            raise _Refused("its pickle is damaged")
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    argument: Any
    # pickletools undoes escapes in names, and warns of wrong ones.
    ignored = warnings.catch_warnings(action="ignore")
    with ignored, suppress(ValueError, IndexError, KeyError, TypeError, OverflowError):
        for operation, argument, _ in pickletools.genops(data):
            match operation.name:
                case "PROTO":
                    pass
                case "STOP":
                    return pop(1)[0]
                case "MARK":
                    marks.append(len(stack))
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(operation.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(pop(int(operation.name[-1]))))
                case "TUPLE":
                    stack.append(tuple(pop_mark()))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "APPEND" | "APPENDS":
                    items = pop_mark() if operation.name == "APPENDS" else pop(1)
                    _expect(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = pop_mark() if operation.name == "SETITEMS" else pop(2)
                    if not all(type(key) in (str, int) for key in items[::2]):  # others could take forever to hash
                        raise _Refused("a key that is no name")
                    _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
                case "GLOBAL":
                    if argument not in _GLOBALS:
                        raise _Refused(f"it asks for {argument.replace(' ', '.')[:80]!r}")
                    stack.append(_Global(argument))
                case "BINPERSID":
                    stack.append(storage(pop(1)[0]))
                case "REDUCE":
                    function, arguments = pop(2)
                    stack.append(_call(_expect(function, _Global).name, _expect(arguments, tuple)))
                case "BUILD":  # attributes of a state_dict (its _metadata), which say nothing of the weights
                    pop(1)
                    _expect(stack[-1], dict)
                case name:
                    raise _Refused(f"its pickle uses {name}")
    raise _Refused("its pickle is damaged")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Refused("its pickle is damaged")
    return value


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == _ORDERED_DICT and arguments == ():
        return {}
    if name == _REBUILD_TENSOR and 6 <= len(arguments) <= 7:
        return _tensor(*arguments[:4])
    if name == _REBUILD_PARAMETER and len(arguments) == 3:
        return _expect(arguments[0], Entry)
    raise _Refused(f"it calls {name.replace(' ', '.')} in an unknown way")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Entry:
    """offset and strides in elements."""
    if not isinstance(storage, _Storage) or not _is_size(offset):
        raise _Refused("a tensor without storage")
    if not all(isinstance(v, tuple) and len(v) <= 32 and all(map(_is_size, v)) for v in (shape, strides)):
        raise _Refused("a tensor with an impossible shape")
    count = math.prod(shape)
    if len(shape) != len(strides) or offset + count > storage.count:
        raise _Refused(f"a tensor of shape {shape} that its storage of {storage.count:,} elements does not hold")
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and count and stride != step:
            raise _Refused(f"a tensor of shape {shape} with strides {strides}: it is not contiguous")
        step *= extent
    width = STORAGE[storage.dtype].itemsize
    start = storage.start + offset * width
    return Entry(storage.dtype, shape, start, start + count * width)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
