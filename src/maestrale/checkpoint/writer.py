"""Writing so that a reader never meets half a folder: everything goes into `<target>.partial`, then one rename.

A run that fails or is interrupted removes its partial; one that is killed leaves it, and the next run at the same
target takes it over. Two runs at one target: the first holds a lock, the second is refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maestrale.checkpoint.dtypes import StoredTensor, byte_count, cast
from maestrale.config import ModelConfig
from maestrale.errors import DiskError, UsageError
from maestrale.plan import tensor_plan

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), after each tensor
_BLOCK = 64 << 20
_LOCK = ".lock"
_MARKS = ("params.json", "config.json", "adapter_config.json")


@contextmanager
def atomic_folder(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Gives an empty folder `<target>.partial`, which becomes `target` when the block ends well, folders above it made.

    UsageError: `target` holds something and `force` is not set, or another process is writing there. DiskError: the
    file system refuses. Whatever ends the block (KeyboardInterrupt and SystemExit too) removes the partial folder.
    """
    target = Path(os.path.realpath(target))
    partial, replaced = _sibling(target, ".partial"), _sibling(target, ".replaced.partial")
    _check_folder_target(target, force)
    created = [p for p in target.parents if not p.exists()]
    try:
        with _disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_folder(partial, target)
        try:
            with _disk_errors(target):
                if replaced.exists():  # a run was killed between its two renames
                    if target.exists():
                        shutil.rmtree(replaced)
                    else:
                        replaced.rename(target)
            _check_folder_target(target, force)  # again, for a run that ended while this one came
            _empty(partial)
            with _full_disk(target):
                yield partial
            with _disk_errors(target):
                _sync(partial)
                # A non-empty folder cannot be renamed over: step aside first. A kill between is mended above.
                if target.exists() and any(target.iterdir()):
                    target.rename(replaced)
                partial.rename(target)
                (target / _LOCK).unlink()
                _sync(target.parent)
                shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            with suppress(OSError):  # the error on its way says more than one of the clean-up
                if replaced.exists() and not target.exists():
                    replaced.rename(target)
                _empty(partial)
                (partial / _LOCK).unlink()
                partial.rmdir()
            raise
        finally:
            os.close(lock)
    except BaseException:
        with suppress(OSError):
            for folder in created:
                folder.rmdir()
        raise


@contextmanager
def atomic_file(target: str | Path, force: bool = True) -> Iterator[Path]:
    """Gives the path `<target>.partial`, an empty file, which replaces `target` when the block ends well.

    Errors as `atomic_folder`'s; UsageError too where the file's folder is not there: a slip in a name makes no folder.
    """
    target = Path(os.path.realpath(target))
    partial = _sibling(target, ".partial")
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; expected a file to write")
    if target.exists() and not force:
        raise UsageError(f"{target}: exists already; --force replaces it")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.parent}: make it, or name another file")
    with _disk_errors(target):
        lock = _lock(partial, target)
    try:
        with _disk_errors(target):
            os.ftruncate(lock, 0)
        with _full_disk(target):
            yield partial
        with _disk_errors(target):
            _sync(partial)
            partial.replace(target)
            _sync(target.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(lock)


def require_space(path: str | Path, size: int) -> None:
    """DiskError unless the file system that `path` is on, or will be on, has `size` bytes free."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    with _disk_errors(path):
        free = shutil.disk_usage(place).free
    if free < size:
        raise DiskError(
            f"{path}: needs {size:,} bytes, but {place} has {free:,} free; make room or choose another disk"
        )


def write_safetensors(
    path: str | Path,
    entries: Iterable[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[StoredTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    alignment: int = 8,
) -> None:
    """One .safetensors file with `entries` (name, dtype, shape) in their order, `tensors` in the same order.

    One tensor at a time is held. The first begins at a multiple of `alignment` bytes; with 8, the bytes are those
    that the safetensors library writes for this order.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    total = 0
    for name, dtype, shape in entries:
        size = byte_count(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [total, total + size]}
        total += size
    if len(header) != len(entries) + bool(metadata):
        raise ValueError("two entries have one name")
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    done = 0
    with writing(path) as write:
        write(len(text).to_bytes(8, "little") + text)
        for (name, dtype, shape), tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(f"{name}: announced as {dtype} {shape}, got {tensor.dtype} {tensor.shape}")
            write(tensor.data)
            done += tensor.data.nbytes
            if progress is not None:
                progress(done, total)


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON with a newline at its end, as Hugging Face folders have it."""
    with writing(path) as write:
        write((json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def copy_file(source: str | Path, path: str | Path) -> None:
    with open(source, "rb") as file, writing(path) as write:
        while block := file.read(_BLOCK):
            write(block)


def save_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor | Callable[[], StoredTensor]],
    tokenizer_files: Iterable[str | Path] = (),
    dtype: str = "BF16",
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """A native folder (params.json, consolidated.safetensors, the tokenizer's files), whole or not at all.

    tensors: every canonical name of `tensor_plan(config)` → a tensor, or a function that makes it when its turn
    comes. Each is cast to `dtype` as it is written.
    """
    plan = tensor_plan(config)
    entries = [(name, dtype, tensor.shape) for name, tensor in plan.items()]

    def made() -> Iterator[StoredTensor]:
        for name in plan:
            tensor = tensors[name]
            yield cast(tensor() if callable(tensor) else tensor, dtype)

    with atomic_folder(folder, force) as partial:
        require_space(partial, sum(byte_count(dtype, shape) for _, dtype, shape in entries))
        write_json(partial / "params.json", config.to_mistral())
        for file in tokenizer_files:
            copy_file(file, partial / Path(file).name)
        write_safetensors(partial / "consolidated.safetensors", entries, made(), {"format": "pt"}, progress)


@contextmanager
def writing(path: str | Path) -> Iterator[Callable[[Any], None]]:
    """A function that appends a buffer to `path`, made empty first; on disk when the block ends."""
    with _disk_errors(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(buffer: Any) -> None:
        view = memoryview(buffer).cast("B")
        with _disk_errors(path):
            while view:
                view = view[os.write(file, view[:_BLOCK]) :]

    try:
        yield write
        with _disk_errors(path):
            os.fsync(file)
    finally:
        os.close(file)


def _sibling(target: Path, suffix: str) -> Path:
    if not target.name:
        raise UsageError(f"{target}: cannot be written as a whole; name a folder or file inside it")
    return target.with_name(target.name + suffix)


def _check_folder_target(target: Path, force: bool) -> None:
    with _disk_errors(target):
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise UsageError(f"{target}: is a file; expected a folder to write")
        inside = list(target.iterdir())
    if inside and not force:
        raise UsageError(f"{target}: exists and is not empty; --force replaces it")
    # A model's folder is flat, and says what it is. This keeps --force on any other folder from deleting it.
    if inside and not any(p.name in _MARKS for p in inside):
        raise UsageError(f"{target}: holds no model or adapter, and --force replaces nothing else: name another folder")
    if folders := sorted(p.name for p in inside if p.is_dir()):
        raise UsageError(f"{target}: holds folders ({', '.join(folders[:3])}); --force replaces flat folders only")


def _lock_folder(partial: Path, target: Path) -> int:
    while True:
        with _disk_errors(target):
            partial.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # its owner removed it in this moment
                return _lock(partial / _LOCK, target)


def _lock(path: Path, target: Path) -> int:
    """An open descriptor of the file `path`, with the lock on it; UsageError where another process has that."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # An owner that ends may move the file away between our opening and locking it: then try again.
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise UsageError(f"{target}: another process is writing there (it holds {path}); wait for it") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _empty(folder: Path) -> None:
    """Removes everything but the lock."""
    with _disk_errors(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _disk_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(_message(path, error)) from error


@contextmanager
def _full_disk(path: str | Path) -> Iterator[None]:
    """For a block of other people's code: only the errors that are surely about room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskError(_message(path, error)) from error


def _message(path: str | Path, error: OSError) -> str:
    where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
    room = "; make room or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{path}: cannot write: {error.strerror or error}{where}{room}"
