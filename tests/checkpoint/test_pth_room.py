import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maestrale.checkpoint.pth_room import open_pth
from maestrale.errors import CheckpointError

torch = pytest.importorskip("torch")


def saved(tmp_path, value, **options):
    path = tmp_path / "consolidated.00.pth"
    torch.save(value, path, **options)
    return path


def archive(tmp_path, data: bytes, name="a/data.pkl", compression=zipfile.ZIP_STORED):
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr(name, data)
    return path


def values() -> dict:
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(2, 2).to(torch.bfloat16),
        "c.weight": torch.randn(300, 70).half(),
        "d.weight": torch.arange(4),
        "e.weight": torch.tensor(2.5, dtype=torch.float64),
        "f.weight": torch.zeros(0, 4),
        "g.weight": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_tensors_are_views_that_equal_what_torch_saved(tmp_path, wrap):
    expected = wrap(values())
    path = saved(tmp_path, expected)
    file = open_pth(path)
    assert list(file.entries) == list(expected)
    for name, tensor in expected.items():
        found = file.tensor(name)
        assert found.shape == tuple(tensor.shape)
        assert not found.data.flags.owndata or tensor.numel() == 0
        assert found.data.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_state_dict_with_its_metadata_parameters_and_shared_storage_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    state = module.state_dict()
    state["parameter"] = module[0].weight
    state["rows"] = module[0].weight[1:3].detach()
    file = open_pth(saved(tmp_path, state))
    for name, tensor in state.items():
        np.testing.assert_array_equal(file.tensor(name).array, tensor.detach().numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_fault_26_code_in_the_pickle_does_not_run(tmp_path, refused):
    mark = tmp_path / "it ran"
    path = saved(tmp_path, {"a": torch.ones(2), "b": Evil(mark)})
    with refused(CheckpointError, 3, path, "refused", "posix.mkdir", "can run code", ".safetensors"):
        open_pth(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert mark.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "builtins.eval"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "in an unknown way"),
        (b"\x80\x02c__main__\nX\n)\x81.", "__main__.X"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "in an unknown way"),
        (b"\x80\x02}.", None),
        (b"\x80\x02K\x01.", "holds a int"),
        (b"\x80\x02}(K\x01K\x02u.", "is no tensor"),
        (b"\x80\x02}(X\x01\x00\x00\x00aK\x02u.", "'a' is no tensor"),
        (b"\x80\x02}(X\x01\x00\x00\x00au.", "damaged"),
        (b"\x80\x02]\x94.", "MEMOIZE"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02j\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02Q.", "damaged"),
        (b"\x80\x02K\x01Q.", "no storage"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
        (b"", "damaged"),
        (b"cposix\\o\nx\n.", "posix"),
        (b"\x80\x02}))" + b"q\x00h\x00\x86" * 100 + b"K\x01s.", "key that is no name"),
    ],
)
def test_fault_26_only_plain_tensors_are_followed(tmp_path, refused, text, words):
    path = archive(tmp_path, text)
    if words is None:
        assert open_pth(path).entries == {}
        return
    with refused(CheckpointError, 3, path, words):
        open_pth(path)


def test_fault_26_other_python_objects_are_refused(tmp_path, refused):
    for value, words in (
        ({"a": np.zeros(2)}, "numpy"),
        ({"model": {"a": torch.ones(1)}}, "'model' is no tensor"),
        ([torch.ones(1)], "holds a list"),
        ({"a": torch.ones(1), "step": 3}, "'step' is no tensor"),
        ({3: torch.ones(1)}, "'3' is no tensor"),
    ):
        with refused(CheckpointError, 3, "refused", words):
            open_pth(saved(tmp_path, value))


def test_fault_26_the_old_format_and_bare_pickles_are_refused(tmp_path, refused):
    with refused(CheckpointError, 3, "no zip archive"):
        open_pth(saved(tmp_path, values(), _use_new_zipfile_serialization=False))
    path = tmp_path / "b.pth"
    path.write_bytes(pickle.dumps({"a": 1}))
    with refused(CheckpointError, 3, "no zip archive"):
        open_pth(path)


def test_compressed_members_are_refused(tmp_path, refused):
    with refused(CheckpointError, 3, "compressed"):
        open_pth(archive(tmp_path, b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED))


def test_tensors_that_are_not_contiguous_are_refused(tmp_path, refused):
    with refused(CheckpointError, 3, "not contiguous"):
        open_pth(saved(tmp_path, {"a": torch.randn(3, 4).t()}))
    with refused(CheckpointError, 3, "does not hold"):
        open_pth(saved(tmp_path, {"a": torch.ones(1).expand(9)}))


def test_an_absent_or_short_storage_is_refused(tmp_path, refused):
    path = saved(tmp_path, {"a": torch.randn(3, 4)})
    members = {info.filename: zipfile.ZipFile(path).read(info) for info in zipfile.ZipFile(path).infolist()}
    key = next(name for name in members if name.endswith("data/0"))
    for replacement, words in ((None, "is missing"), (b"\0" * 40, "40 bytes, expected 12 of F32")):
        with zipfile.ZipFile(path, "w") as out:
            for name, data in members.items():
                if name != key:
                    out.writestr(name, data)
                elif replacement is not None:
                    out.writestr(name, replacement)
        with refused(CheckpointError, 3, path, words):
            open_pth(path)


def test_a_truncated_archive_is_refused(tmp_path, refused):
    path = saved(tmp_path, values())
    path.write_bytes(path.read_bytes()[:-100])
    with refused(CheckpointError, 3, path, "damage"):
        open_pth(path)


BUFFER = io.BytesIO()
torch.save(OrderedDict(a=torch.ones(2, 3), b=torch.zeros(4, dtype=torch.bfloat16)), BUFFER)
GOOD = BUFFER.getvalue()
with zipfile.ZipFile(BUFFER) as opened:
    PICKLE = opened.read(next(name for name in opened.namelist() if name.endswith("data.pkl")))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_mutated_archive_opens_or_is_refused_and_nothing_else(tmp_path, edits):
    data = bytearray(GOOD)
    for place, value in edits:
        data[place] = value
    check_opens_or_refused(tmp_path / "x.pth", bytes(data))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(PICKLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_pickle_opens_or_is_refused_and_nothing_else(tmp_path, edits):
    text = bytearray(PICKLE)
    for place, value in edits:
        text[place] = value
    check_opens_or_refused(archive(tmp_path, bytes(text)), None)


def check_opens_or_refused(path, data):
    if data is not None:
        path.write_bytes(data)
    try:
        file = open_pth(path)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = str(path)
        for name, entry in file.entries.items():
            assert file.tensor(name).array.shape == entry.shape
    assert refusal.startswith(str(path))
    assert "\n" not in refusal
