import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from maestrale.checkpoint import writer
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.writer import (
    atomic_file,
    atomic_folder,
    require_space,
    save_checkpoint,
    write_json,
    write_safetensors,
)
from maestrale.config import ModelConfig
from maestrale.errors import DiskError, UsageError


def fill(folder: Path, text="new"):
    (folder / "a.txt").write_text(text)


def test_a_folder_appears_whole_when_its_block_ends(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as partial:
        assert partial == tmp_path / "deep" / "out.partial"
        fill(partial)
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["a.txt"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def stopped_folder(target, stop):
    with atomic_folder(target) as partial:
        fill(partial)
        (partial / "sub").mkdir()
        raise stop


def stopped_file(target, stop):
    with atomic_file(target) as partial:
        partial.write_text("x")
        raise stop


@pytest.mark.parametrize(("write", "target"), [(stopped_folder, "deep/out"), (stopped_file, "out")])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_fault_32_whatever_ends_the_block_leaves_nothing(tmp_path, write, target, stop):
    with pytest.raises(stop):
        write(tmp_path / target, stop)
    assert list(tmp_path.iterdir()) == []


def test_fault_33_leftovers_of_a_killed_run_are_cleaned_by_the_next(tmp_path):
    leftover = tmp_path / "out.partial"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "big.safetensors").write_text("half")
    (leftover / ".lock").touch()
    with atomic_folder(tmp_path / "out") as partial:
        assert [p.name for p in partial.iterdir()] == [".lock"]
        fill(partial)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fault_33_a_kill_between_the_two_renames_of_force_loses_nothing(tmp_path):
    old = tmp_path / "out.replaced.partial"
    old.mkdir()
    fill(old, "old")
    (old / "params.json").touch()
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out", force=True):
        raise ValueError
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fault_34_an_existing_output_is_refused_without_force(tmp_path, refused):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as partial:  # an empty folder is no output
        fill(partial, "old")
        (partial / "params.json").touch()
    with refused(UsageError, 2, target, "not empty", "--force"), atomic_folder(target):
        pass
    with pytest.raises(ValueError), atomic_folder(target, force=True):
        raise ValueError
    assert (target / "a.txt").read_text() == "old"
    with atomic_folder(target, force=True) as partial:
        (partial / "b.txt").touch()
    assert [p.name for p in target.iterdir()] == ["b.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_no_file_and_no_folder_of_folders(tmp_path, refused):
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "file").touch()
    with refused(UsageError, 2, "home", "holds no model"), atomic_folder(tmp_path / "home", force=True):
        pass
    (tmp_path / "home" / "config.json").touch()
    with refused(UsageError, 2, "home", "photos", "flat"), atomic_folder(tmp_path / "home", force=True):
        pass
    with refused(UsageError, 2, "file", "is a file"), atomic_folder(tmp_path / "file", force=True):
        pass
    with refused(UsageError, 2, "/: cannot be written"), atomic_folder("/", force=True):
        pass
    with refused(UsageError, 2, "home", "is a folder"), atomic_file(tmp_path / "home"):
        pass
    with refused(UsageError, 2, "file", "--force"), atomic_file(tmp_path / "file", force=False):
        pass
    with refused(UsageError, 2, "slip/x.json", "there is no folder", "make it"), atomic_file(tmp_path / "slip/x.json"):
        pass
    assert not (tmp_path / "slip").exists()


def test_fault_35_the_second_writer_of_a_target_is_refused_and_the_first_is_unharmed(tmp_path, refused):
    with atomic_folder(tmp_path / "out") as partial:
        fill(partial)
        with refused(UsageError, 2, tmp_path / "out", "another process is writing"), atomic_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "a.txt").exists()
    with atomic_file(tmp_path / "x.json") as partial:
        partial.write_text("first")
        with refused(UsageError, 2, "x.json", "another process is writing"), atomic_file(tmp_path / "x.json"):
            pass
    assert (tmp_path / "x.json").read_text() == "first"


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "x.json").write_text("old and longer")
    with atomic_file(tmp_path / "x.json") as partial:
        partial.write_text("new")
        assert (tmp_path / "x.json").read_text() == "old and longer"
    assert (tmp_path / "x.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_fault_30_a_full_disk_leaves_nothing_and_exits_5(tmp_path, refused, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with refused(DiskError, 5, "No space left", "make room"), atomic_folder(tmp_path / "out") as partial:
        monkeypatch.setattr(os, "write", full)
        write_json(partial / "params.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []
    with refused(DiskError, 5, "out", "No space left"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_fault_30_on_a_disk_that_is_really_full(small_disk, refused):
    big = StoredTensor("U8", (3 << 20,), np.zeros(3 << 20, np.uint8))
    with refused(DiskError, 5, "No space left"), atomic_folder(small_disk / "out") as partial:
        write_safetensors(partial / "x.safetensors", [("a", "U8", big.shape)], [big])
    assert list(small_disk.iterdir()) == []


def test_fault_31_too_little_space_is_refused_up_front(tmp_path, small_disk, refused):
    require_space(small_disk / "a" / "b", 1 << 19)
    with refused(DiskError, 5, small_disk, "needs 2,097,152 bytes", "free"):
        require_space(small_disk / "a" / "b", 2 << 20)
    with refused(DiskError, 5, "needs"):
        require_space(tmp_path, 1 << 60)


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, refused):
    (tmp_path / "file").touch()
    with (
        refused(DiskError, 5, tmp_path / "file" / "out", "cannot write", "File exists"),
        atomic_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_other_errors_of_the_block_pass_as_they_are(tmp_path):
    with pytest.raises(BrokenPipeError), atomic_folder(tmp_path / "out"):
        raise BrokenPipeError


def test_safetensors_bytes_are_the_librarys(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2).to(torch.bfloat16),
        "c": torch.randn(7).half(),
        'ü "quoted"': torch.arange(3),
        "empty": torch.zeros(0, 2),
    }
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
    order = ['ü "quoted"', "b", "empty", "a", "c"]  # the library's: by dtype, then by name
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "theirs", metadata)
        stored = [
            StoredTensor(names[t.dtype], tuple(t.shape), t.view(torch.uint8).numpy().reshape(-1))
            for t in (tensors[name] for name in order)
        ]
        entries = [(name, t.dtype, t.shape) for name, t in zip(order, stored, strict=True)]
        steps: list[tuple[int, int]] = []
        write_safetensors(
            tmp_path / "ours", entries, iter(stored), metadata, lambda *step, steps=steps: steps.append(step)
        )
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert steps == [(24, 102), (84, 102), (84, 102), (88, 102), (102, 102)]


def test_a_tensor_other_than_announced_is_a_programming_error(tmp_path):
    tensor = StoredTensor("F32", (2,), np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "x", [("a", "F32", (1, 2))], [tensor])
    with pytest.raises(ValueError, match="one name"):
        write_safetensors(tmp_path / "x", [("a", "F32", (2,))] * 2, [tensor] * 2)


def test_a_saved_checkpoint_opens_and_casts(tmp_path, moe_params, weights):
    config = ModelConfig.from_mistral(moe_params)
    arrays = weights(moe_params)
    tensors = {
        name: (lambda array=array: StoredTensor.from_array(array, "F32"))
        if i % 2
        else StoredTensor.from_array(array, "F32")
        for i, (name, array) in enumerate(arrays.items())
    }
    tokenizer = tmp_path / "tokenizer.model.v3"
    tokenizer.write_bytes(b"words")
    save_checkpoint(tmp_path / "out", config, tensors, [tokenizer], dtype="F32")
    assert json.loads((tmp_path / "out" / "params.json").read_text()) == config.to_mistral()
    assert (tmp_path / "out" / "tokenizer.model.v3").read_bytes() == b"words"
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.config == config
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.tensor(name).array, array)
    save_checkpoint(tmp_path / "half", config, tensors)
    with open_checkpoint(tmp_path / "half") as checkpoint:
        assert {checkpoint.stored_dtype(name) for name in checkpoint.names()} == {"BF16"}


def test_a_checkpoint_that_fails_halfway_leaves_the_previous_one(tmp_path, params, weights):
    config = ModelConfig.from_mistral(params)
    tensors = {name: StoredTensor.from_array(array, "F32") for name, array in weights(params).items()}
    save_checkpoint(tmp_path / "out", config, tensors)

    def fail():
        raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path / "out", config, tensors | {"norm.weight": fail}, force=True)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.config == config
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_large_buffers_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK", 7)
    (tmp_path / "a").write_bytes(bytes(range(100)))
    writer.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(range(100))
