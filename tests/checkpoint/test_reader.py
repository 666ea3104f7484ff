import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maestrale.checkpoint.dtypes import cast
from maestrale.checkpoint.hf import hf_name, to_hf_rows, to_native_rows
from maestrale.checkpoint.reader import check_finite, open_checkpoint
from maestrale.errors import CheckpointError, ConfigError


def check_equals(folder, arrays):
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names()) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(cast(checkpoint.tensor(name), "F32").array, array)


def write_native(folder, values):
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(values))


def write_shards(folder, arrays, stem, count=2):
    names = sorted(arrays)
    files = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file({name: arrays[name] for name in names[i::count]}, folder / file)
    weight_map = {name: files[names.index(name) % count] for name in names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


# Layouts


@pytest.mark.parametrize("moe", [False, True])
def test_native_safetensors_are_views_in_plan_order(native_folder, params, moe_params, weights, moe):
    values = moe_params if moe else params
    folder = native_folder(values)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names() == list(weights(values))
        assert (checkpoint.layout, checkpoint.dtype, checkpoint.folder) == ("mistral", "F32", folder)
        assert checkpoint.config.hidden_dim == 48
        assert not any(checkpoint.tensor(name).data.flags.owndata for name in checkpoint.names())
    check_equals(folder, weights(values))


def test_native_shards_with_an_index(tmp_path, moe_params, weights):
    write_native(tmp_path / "m", moe_params)
    write_shards(tmp_path / "m", weights(moe_params), "consolidated", 3)
    check_equals(tmp_path / "m", weights(moe_params))


@pytest.mark.parametrize("files", [["consolidated.00.pth"], ["consolidated.00.pt", "consolidated.01.pt"]])
def test_native_pickles_with_disjoint_names(tmp_path, params, weights, files):
    torch = pytest.importorskip("torch")
    write_native(tmp_path / "m", params)
    arrays = {name: torch.from_numpy(array) for name, array in weights(params).items()}
    names = sorted(arrays)
    for i, file in enumerate(files):
        torch.save({name: arrays[name] for name in names[i :: len(files)]}, tmp_path / "m" / file)
    check_equals(tmp_path / "m", weights(params))


def test_the_raw_mixtral_layout_with_stacked_experts(tmp_path, moe_params, weights):
    torch = pytest.importorskip("torch")
    write_native(tmp_path / "m", moe_params)
    arrays = weights(moe_params)
    raw = {}
    for i in range(moe_params["n_layers"]):
        layer, stacked = f"layers.{i}.feed_forward.", f"layers.{i}.block_sparse_moe."
        experts = [[arrays[f"{layer}experts.{e}.{w}.weight"] for e in range(4)] for w in ("w1", "w2", "w3")]
        raw[f"{stacked}w1"] = np.concatenate(experts[0])
        raw[f"{stacked}w2"] = np.concatenate([w2.T for w2 in experts[1]])
        raw[f"{stacked}w3"] = np.concatenate(experts[2])
        raw[f"{stacked}gate.weight"] = arrays[f"{layer}gate.weight"]
    raw |= {name: array for name, array in arrays.items() if ".feed_forward." not in name}
    names = sorted(raw)
    for i in range(3):
        part = {name: torch.from_numpy(np.ascontiguousarray(raw[name])) for name in names[i::3]}
        torch.save(part, tmp_path / "m" / f"consolidated.{i:02}.pt")
    check_equals(tmp_path / "m", arrays)


def interleaved(x, positions, theta=1e4):
    """The native rotation: x [heads, head_dim] in pairs (2i, 2i + 1), as complex numbers."""
    half = x.shape[1] // 2
    turn = np.exp(1j * positions * theta ** (-np.arange(half) / half))
    return ((x[:, 0::2] + 1j * x[:, 1::2]) * turn).view(np.float64).reshape(x.shape)


def half_split(x, positions, theta=1e4):
    """Hugging Face's rotation: entry i with entry i + head_dim / 2."""
    half = x.shape[1] // 2
    angle = positions * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)


def test_permuted_rows_give_the_same_attention_scores_under_the_other_rotation():
    rng = np.random.default_rng(0)
    wq, wk = rng.standard_normal((2, 3 * 8, 16))
    x, y = rng.standard_normal((2, 16))
    native = interleaved((wq @ x).reshape(3, 8), 5.0) * interleaved((wk @ y).reshape(3, 8), 2.0)
    hf = half_split((to_hf_rows(wq, 8) @ x).reshape(3, 8), 5.0) * half_split((to_hf_rows(wk, 8) @ y).reshape(3, 8), 2.0)
    np.testing.assert_allclose(native.sum(1), hf.sum(1), rtol=1e-12)
    np.testing.assert_array_equal(to_native_rows(to_hf_rows(wq, 8), 8), wq)


@pytest.mark.parametrize("kind", ["mistral-untied", "mixtral-untied", "mistral-tied", "mixtral-tied"])
def test_hf_folders_as_transformers_saves_them(hf_folders, kind):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    stored = load_torch(hf_folders[kind] / "model.safetensors")
    with open_checkpoint(hf_folders[kind]) as checkpoint:
        assert (checkpoint.layout, checkpoint.dtype) == ("hf", "BF16")
        assert ("output.weight" in checkpoint.names()) == kind.endswith("-untied")
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            expected = stored.pop(hf_name(name))
            if name.endswith(("wq.weight", "wk.weight")):
                rows, dim = expected.shape  # docs/numerics.md's formula
                expected = expected.view(rows // 8, 2, 4, dim).transpose(1, 2).reshape(rows, dim)
            else:
                assert not tensor.data.flags.owndata
            assert torch.equal(torch.from_numpy(tensor.data), expected.view(torch.uint8).reshape(-1))
    assert not stored


def test_hf_fused_experts_as_transformers_5_has_them_in_memory(tmp_path, hf_folders):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file as save_torch

    separate = hf_folders["mixtral-untied"]
    model = transformers.AutoModelForCausalLM.from_pretrained(separate, dtype=torch.bfloat16)
    state = dict(model.state_dict())
    if not any("gate_up_proj" in name for name in state):
        pytest.skip("this transformers keeps experts one by one")
    save_torch(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((separate / "config.json").read_text())
    with open_checkpoint(tmp_path) as fused, open_checkpoint(separate) as plain:
        assert fused.names() == plain.names()
        for name in fused.names():
            np.testing.assert_array_equal(fused.tensor(name).array, plain.tensor(name).array)


def test_hf_shards_and_computed_buffers(tmp_path, hf_folders):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    stored = load_torch(hf_folders["mistral-untied"] / "model.safetensors")
    save_torch({n: t for n, t in stored.items() if "layers.0" in n}, tmp_path / "a.safetensors")
    rest = {n: t for n, t in stored.items() if "layers.0" not in n}
    rest["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_torch(rest, tmp_path / "b.safetensors")
    weight_map = {n: "a.safetensors" if "layers.0" in n else "b.safetensors" for n in stored}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((hf_folders["mistral-untied"] / "config.json").read_text())
    with open_checkpoint(tmp_path) as shards, open_checkpoint(hf_folders["mistral-untied"]) as whole:
        for name in whole.names():
            np.testing.assert_array_equal(shards.tensor(name).array, whole.tensor(name).array)


def test_a_head_beside_tied_embeddings_is_ignored_with_a_warning(native_folder, params):
    def add_head(arrays):
        arrays["output.weight"] = np.zeros((64, 32), np.float32)

    folder = native_folder(params | {"tied_embeddings": True}, add_head)
    with pytest.warns(UserWarning, match=r"tied: ignoring output\.weight"):
        checkpoint = open_checkpoint(folder)
    assert "output.weight" not in checkpoint.names()


def test_the_checkpoints_dtype_is_that_of_most_weights(tmp_path, params, weights):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    write_native(tmp_path / "m", params)
    arrays = {
        name: torch.from_numpy(a) if "norm" in name else torch.from_numpy(a).to(torch.bfloat16)
        for name, a in weights(params).items()
    }
    save_torch(arrays, tmp_path / "m" / "consolidated.safetensors")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.dtype == "BF16"
        assert checkpoint.stored_dtype("norm.weight") == "F32"


def test_tensors_outlive_their_checkpoint_and_release_gives_the_files_values_again(native_folder, weights, params):
    with open_checkpoint(native_folder()) as checkpoint:
        first = checkpoint.tensor("layers.1.feed_forward.w2.weight")
        checkpoint.release("layers.1.feed_forward.w2.weight")
    np.testing.assert_array_equal(first.array, weights(params)["layers.1.feed_forward.w2.weight"])


# Faults


def test_fault_10_one_tensor_in_two_shards_names_both(tmp_path, params, weights, refused):
    arrays = weights(params)
    write_native(tmp_path / "m", params)
    files = write_shards(tmp_path / "m", arrays, "consolidated")
    first = load_file(tmp_path / "m" / files[0])
    second = load_file(tmp_path / "m" / files[1])
    twice = next(iter(second))
    save_file(first | {twice: second[twice]}, tmp_path / "m" / files[0])
    with refused(CheckpointError, 3, twice, *files):
        open_checkpoint(tmp_path / "m")


def test_fault_11_missing_tensors_are_all_listed(native_folder, refused):
    gone = ["norm.weight", "layers.0.attention.wq.weight", "layers.1.feed_forward.w3.weight"]
    folder = native_folder(change=lambda arrays: [arrays.pop(name) for name in gone])
    with refused(CheckpointError, 3, folder, "3 of the 21", "params.json", *gone):
        open_checkpoint(folder)


def test_fault_12_unexpected_tensor_is_an_error_or_a_warning(native_folder, refused):
    folder = native_folder(change=lambda arrays: arrays.update({"layers.2.extra": np.zeros(1, np.float32)}))
    with refused(CheckpointError, 3, "layers.2.extra", "--ignore-unexpected"):
        open_checkpoint(folder)
    with pytest.warns(UserWarning, match=r"layers\.2\.extra; ignored"):
        checkpoint = open_checkpoint(folder, ignore_unexpected=True)
    assert "layers.2.extra" not in checkpoint.names()


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("layers.1.attention.wk.weight", (8, 32), "params.json says n_kv_heads = 2, head_dim = 8"),
        ("layers.1.attention.wk.weight", (16, 33), "params.json says dim = 32"),
        ("output.weight", (60, 32), "params.json says vocab_size = 64"),
        ("layers.0.feed_forward.w2.weight", (48, 32), "params.json says dim = 32, hidden_dim = 48"),
        ("norm.weight", (32, 1), "params.json says dim = 32"),
    ],
)
def test_fault_13_wrong_shape_says_expected_found_and_the_words_it_follows_from(
    native_folder, weights, params, refused, name, shape, words
):
    folder = native_folder(change=lambda arrays: arrays.update({name: np.zeros(shape, np.float32)}))
    expected = weights(params)[name].shape
    with refused(CheckpointError, 3, f"{name} in consolidated.safetensors: expected {expected}, got {shape}; {words}"):
        open_checkpoint(folder)


def test_fault_14_nan_and_inf_weights_are_listed(native_folder):
    def spoil(arrays):
        arrays["norm.weight"][3] = np.nan
        arrays["layers.1.attention.wo.weight"][0, 0] = -np.inf

    with open_checkpoint(native_folder(change=spoil)) as checkpoint:
        assert check_finite(checkpoint) == ["norm.weight", "layers.1.attention.wo.weight"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "x\0.safetensors"])
@pytest.mark.parametrize("stem", ["consolidated", "model"])
def test_fault_15_an_index_that_leads_out_of_the_folder(tmp_path, params, hf_folders, refused, name, stem):
    (tmp_path / "params.json").write_text(json.dumps(params))
    if stem == "model":
        (tmp_path / "params.json").unlink()
        (tmp_path / "config.json").write_text((hf_folders["mistral-tied"] / "config.json").read_text())
    index = tmp_path / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    with refused(CheckpointError, 3, index, "norm.weight", repr(name), "beside the index"):
        open_checkpoint(tmp_path)


def test_fault_15_an_index_that_names_an_absent_shard_or_a_wrong_one(tmp_path, params, weights, refused):
    write_native(tmp_path / "m", params)
    files = write_shards(tmp_path / "m", weights(params), "consolidated")
    path = tmp_path / "m" / "consolidated.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["norm.weight"] = next(f for f in files if f != index["weight_map"]["norm.weight"])
    path.write_text(json.dumps(index))
    with refused(CheckpointError, 3, "the index says that it holds norm.weight"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / files[1]).unlink()
    with refused(CheckpointError, 3, path, "not there", files[1]):
        open_checkpoint(tmp_path / "m")
    path.write_text('{"weight_map": {}}')
    with refused(CheckpointError, 3, path, "expected weight_map"):
        open_checkpoint(tmp_path / "m")


def test_fault_16_no_model_lists_the_accepted_layouts(tmp_path, native_folder, refused):
    layouts = ("params.json", "consolidated.safetensors", "config.json", "model.safetensors.index.json")
    with refused(CheckpointError, 3, tmp_path, "found nothing of one", *layouts):
        open_checkpoint(tmp_path)
    folder = native_folder()
    (folder / "params.json").unlink()
    with refused(CheckpointError, 3, folder, "found consolidated.safetensors;", *layouts):
        open_checkpoint(folder)


def test_fault_16_no_folder_or_a_file_in_its_place(native_folder, refused):
    folder = native_folder()
    with refused(CheckpointError, 3, folder / "no", "no such folder"):
        open_checkpoint(folder / "no")
    with refused(CheckpointError, 3, "params.json", "is a file; expected the folder"):
        open_checkpoint(folder / "params.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"dim": 32', "not JSON"), ('{"dim": 32, "dim": 64}', "duplicate key 'dim'"), ('{"norm_eps": NaN}', "NaN")],
)
def test_fault_17_bad_params_json(native_folder, refused, text, words):
    folder = native_folder()
    (folder / "params.json").write_text(text)
    with refused(CheckpointError, 3, folder / "params.json", words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"n_kv_heads": 3}, "n_heads / n_kv_heads"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "num_experts_per_tok = 3 is more than"),
        ({"norm_eps": 1e999}, "norm_eps"),
        ({"vision_encoder": {"x": 1}}, "text models only"),
        ({"mamba": {"x": 1}}, "text models only"),
    ],
)
def test_faults_18_and_19_impossible_values_name_file_and_key(native_folder, params, refused, change, words):
    folder = native_folder()
    text = json.dumps(params | change).replace("Infinity", "1e999")
    (folder / "params.json").write_text(text)
    with refused(ConfigError, 3, folder / "params.json", words):
        open_checkpoint(folder)


def test_fault_19_unknown_keys_are_warned_of_by_name(native_folder, params):
    folder = native_folder()
    (folder / "params.json").write_text(json.dumps(params | {"colour": "blue"}))
    with pytest.warns(UserWarning, match=r"params\.json: ignoring unknown keys: colour"):
        open_checkpoint(folder)


def test_fault_20_native_is_chosen_of_two_layouts_and_a_warning_says_so(native_folder, hf_folders):
    folder = native_folder()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((hf_folders["mistral-tied"] / name).read_bytes())
    with pytest.warns(UserWarning, match=r"using consolidated\.safetensors, ignoring model\.safetensors"):
        assert open_checkpoint(folder).layout == "mistral"
    (folder / "params.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(folder).layout == "hf"


def test_fault_28_a_folder_in_a_weight_files_place(tmp_path, params, refused):
    write_native(tmp_path / "m", params)
    (tmp_path / "m" / "consolidated.safetensors").mkdir()
    with refused(CheckpointError, 3, "consolidated.safetensors", "is a folder"):
        open_checkpoint(tmp_path / "m")


def test_fault_29_a_shard_that_changes_is_noticed(native_folder, refused):
    folder = native_folder()
    checkpoint = open_checkpoint(folder)
    checkpoint.verify_unchanged()
    with open(folder / "consolidated.safetensors", "ab") as file:
        file.write(b"x")
    for read in (checkpoint.verify_unchanged, lambda: checkpoint.tensor("norm.weight")):
        with refused(CheckpointError, 3, "consolidated.safetensors", "changed while it was read"):
            read()


def test_weights_of_an_integer_dtype_are_refused_by_name(native_folder, refused):
    folder = native_folder(change=lambda arrays: arrays.update({"norm.weight": np.ones(32, np.int64)}))
    with refused(CheckpointError, 3, "norm.weight in consolidated.safetensors", "dtype I64", "BF16, F16, F32"):
        open_checkpoint(folder)
