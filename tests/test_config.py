"""params.json and config.json as they are found in the wild: what is read, warned of and refused."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import DENSE, MIXED, MIXTURE, TIED, WINDOWED, hf_model

from maestrale.checkpoint.jsonfile import read_json
from maestrale.config import ModelConfig, MoeConfig
from maestrale.errors import ConfigError, MaestraleError

PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
}
HF = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}


# Windows and their spellings


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ({}, (None,) * 4),
        ({"sliding_window": None}, (None,) * 4),
        ({"sliding_window": 4096}, (4096,) * 4),
        ({"sliding_window": 4096.0}, (4096,) * 4),
        ({"sliding_window": "4096"}, (4096,) * 4),
        ({"sliding_window": " 4096 "}, (4096,) * 4),
        ({"_sliding_window": 4096}, (4096,) * 4),
        ({"_sliding_window": "4096", "sliding_window": None}, (4096,) * 4),
        ({"sliding_window": [None, 8]}, (None, 8, None, 8)),
        ({"sliding_window": [None, "8", 8, 4]}, (None, 8, 8, 4)),
        ({"_sliding_window": [8]}, (8,) * 4),
    ],
)
def test_every_spelling_of_a_window_is_read(spelled, expected):
    assert ModelConfig.from_mistral(PARAMS | {"n_layers": 4} | spelled).sliding_window == expected


@pytest.mark.parametrize(
    "wrong", [0, -1, 2.5, True, "x", "-4", "４", "", [], [8, 8, 8], [8] * 8, [[8]], {}, 1 << 31, "9" * 99]
)
def test_an_impossible_window_is_refused_with_its_key_and_file(wrong):
    with pytest.raises(ConfigError, match=r"^some/params\.json: .*sliding_window") as error:
        ModelConfig.from_mistral(PARAMS | {"n_layers": 4, "sliding_window": wrong}, "some/params.json")
    assert "\n" not in str(error.value)


def test_kinds_of_layers_stand_in_order_of_first_appearance():
    assert replace(DENSE, n_layers=4, sliding_window=(7, None, 7, 3)).windows == (7, None, 3)


# Defaults


def test_theta_when_absent_depends_on_the_window():
    assert ModelConfig.from_mistral(PARAMS).rope_theta == 1e6
    assert ModelConfig.from_mistral(PARAMS | {"sliding_window": 4096}).rope_theta == 1e4
    assert ModelConfig.from_mistral(PARAMS | {"sliding_window": [None, 4096]}).rope_theta == 1e4
    assert ModelConfig.from_mistral(PARAMS | {"sliding_window": 4096, "rope_theta": 5e5}).rope_theta == 5e5


def test_head_dim_and_kv_heads_when_absent_follow_from_dim_and_heads():
    silent = {key: value for key, value in PARAMS.items() if key not in ("head_dim", "n_kv_heads", "norm_eps")}
    config = ModelConfig.from_mistral(silent)
    assert (config.head_dim, config.n_kv_heads, config.norm_eps) == (128, 32, 1e-5)


def test_head_dim_need_not_be_dim_over_heads():
    assert ModelConfig.from_mistral(PARAMS | {"dim": 5120}).head_dim == 128


def test_the_context_is_read_under_both_names():
    assert ModelConfig.from_mistral(PARAMS | {"max_seq_len": 4096}).max_position_embeddings == 4096
    assert ModelConfig.from_mistral(PARAMS | {"max_position_embeddings": 128}).max_position_embeddings == 128
    assert ModelConfig.from_mistral(PARAMS).max_position_embeddings is None


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "ministral"])
@pytest.mark.parametrize(
    "missing", [(), ("sliding_window",), ("rope_theta",), ("rms_norm_eps",), ("num_key_value_heads",)]
)
def test_hf_defaults_are_those_of_the_config_classes(kind, missing):
    values = {key: value for key, value in HF.items() if key not in missing} | {"model_type": kind}
    values |= {"num_hidden_layers": 4}
    classes = {
        "mistral": transformers.MistralConfig,
        "mixtral": transformers.MixtralConfig,
        "ministral": transformers.MinistralConfig,
    }
    theirs = classes[kind](**{key: value for key, value in values.items() if key != "model_type"})
    config = ModelConfig.from_hf(values)
    assert config.sliding_window == (theirs.sliding_window,) * 4
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.n_kv_heads == theirs.num_key_value_heads
    if kind == "mixtral":
        assert config.moe == MoeConfig(theirs.num_local_experts, theirs.num_experts_per_tok)


# Unknown and unsupported keys


def test_unknown_keys_are_warned_of_by_name_and_ignored():
    with pytest.warns(UserWarning, match=r"some\.json: ignoring unknown keys: flux, zeta") as caught:
        config = ModelConfig.from_mistral(PARAMS | {"zeta": 1, "flux": None}, "some.json")
    assert len(caught) == 1
    assert config == ModelConfig.from_mistral(PARAMS)
    with pytest.warns(UserWarning, match=r"unknown keys: flux"):
        ModelConfig.from_hf(HF | {"flux": 1})
    with pytest.warns(UserWarning, match=r"unknown keys: moe\.flux"):
        ModelConfig.from_mistral(PARAMS | {"moe": {"num_experts": 8, "num_experts_per_tok": 2, "flux": 1}})


@pytest.mark.parametrize("key", ["vision_encoder", "mamba", "ssm_cfg"])
def test_vision_and_mamba_models_are_refused(key):
    with pytest.raises(ConfigError, match=rf"params\.json: {key} is set: text models only"):
        ModelConfig.from_mistral(PARAMS | {key: {"x": 1}})


@pytest.mark.parametrize(
    "values",
    [
        {"vision_config": {}},
        {"text_config": {}},
        {"model_type": "mamba"},
        {"model_type": "pixtral"},
        {"model_type": None},
    ],
)
def test_hf_models_of_other_kinds_are_refused(values):
    with pytest.raises(ConfigError, match=r"c\.json: .*text models only"):
        ModelConfig.from_hf(HF | values, "c.json")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "only rope_type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "only rope_type 'default'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "rope_scaling = .*only rope_type 'default'",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 32"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types holds 'chunked_attention'"),
    ],
)
def test_hf_features_that_change_the_numbers_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(HF | values)


def test_the_window_of_early_mixtral_configs_is_a_known_mistake():
    values = HF | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
    with pytest.warns(UserWarning, match="known mistake in early Mixtral"):
        assert ModelConfig.from_hf(values).windows == (None,)
    assert ModelConfig.from_hf(values | {"num_hidden_layers": 4}).windows == (4096,)


# Faults 17 to 19


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"dim": 1, "dim": 2}', '{"dim": NaN}', '{"dim": Infinity}', "", "\xff"]
)
def test_fault_17_bad_json_is_an_error_in_one_line(tmp_path, content):
    path = tmp_path / "params.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(MaestraleError, match=r"params\.json") as error:
        read_json(path)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key in PARAMS if key not in ("head_dim", "n_kv_heads", "norm_eps")])
def test_fault_18_a_missing_value_is_named(key):
    values = {name: value for name, value in PARAMS.items() if name != key and name != "head_dim"}
    with pytest.raises(ConfigError, match=rf"^p\.json: {key} is missing: expected a whole number"):
        ModelConfig.from_mistral(values, "p.json")


@pytest.mark.parametrize("key", [key for key in PARAMS if key != "norm_eps"])
@pytest.mark.parametrize("wrong", [0, -4, 1.5, "8", True, [8], 1 << 40, math.nan])
def test_fault_18_a_size_that_is_none_is_refused_with_key_value_and_file(key, wrong):
    with pytest.raises(ConfigError, match=rf"^p\.json: {key} = ") as error:
        ModelConfig.from_mistral(PARAMS | {key: wrong}, "p.json")
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_kv_heads": 6}, "n_heads = 32 is not a multiple of n_kv_heads = 6"),
        ({"n_kv_heads": 64}, "n_heads = 32 is not a multiple of n_kv_heads = 64"),
        ({"head_dim": 7}, "head_dim = 7: must be even"),
        ({"norm_eps": 0}, "norm_eps = 0"),
        ({"norm_eps": 1.0}, "norm_eps = 1"),
        ({"norm_eps": "1e-5"}, "norm_eps = '1e-5': expected a finite number"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        ({"rope_theta": math.inf}, "rope_theta = inf: expected a finite number"),
        ({"rope_theta": 10**400}, "00000: expected a finite number"),
        ({"tied_embeddings": 1}, "tied_embeddings = 1: expected true or false"),
        ({"max_seq_len": 0}, "max_position_embeddings = 0"),
        ({"moe": 8}, "moe = 8: expected an object"),
        ({"moe": {"num_experts": 8}}, r"moe\.num_experts_per_tok is missing"),
        (
            {"moe": {"num_experts": 2, "num_experts_per_tok": 3}},
            r"num_experts_per_tok = 3 is more than moe\.num_experts = 2",
        ),
        ({"moe": {"num_experts": 0, "num_experts_per_tok": 0}}, r"moe\.num_experts = 0"),
    ],
)
def test_fault_18_impossible_values_are_refused_with_the_formula(values, words):
    with pytest.raises(ConfigError, match=rf"^params\.json: .*{words}") as error:
        ModelConfig.from_mistral(PARAMS | values)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


# Round trips


def configs() -> st.SearchStrategy[ModelConfig]:
    def build(draw: st.DrawFn) -> ModelConfig:
        n_layers, n_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        experts = draw(st.none() | st.integers(1, 8))
        window = st.none() | st.integers(1, 100)
        return ModelConfig(
            dim=draw(st.integers(1, 100)),
            n_layers=n_layers,
            head_dim=2 * draw(st.integers(1, 50)),
            hidden_dim=draw(st.integers(1, 100)),
            n_heads=n_kv_heads * draw(st.integers(1, 4)),
            n_kv_heads=n_kv_heads,
            vocab_size=draw(st.integers(1, 100)),
            norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
            rope_theta=draw(st.sampled_from([1e4, 1e6])),
            sliding_window=tuple(draw(st.lists(window, min_size=n_layers, max_size=n_layers))),
            moe=experts and MoeConfig(experts, draw(st.integers(1, experts))),
            tied_embeddings=draw(st.booleans()),
            max_position_embeddings=draw(st.none() | st.integers(1, 1 << 20)),
        )

    return st.composite(build)()


@given(configs())
def test_params_json_keeps_everything(config):
    text = json.dumps(config.to_mistral())
    assert ModelConfig.from_mistral(json.loads(text)) == config


@given(configs())
def test_config_json_keeps_everything_that_it_has_words_for(config):
    sizes = {window for window in config.windows if window}
    if len(sizes) > 1 or (config.moe and len(config.windows) > 1):
        with pytest.raises(ConfigError, match="keep the native layout"):
            config.to_hf()
        return
    found = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert found == config


@pytest.mark.parametrize("config", [DENSE, WINDOWED, MIXED, MIXTURE, TIED])
def test_what_transformers_writes_is_read_without_a_warning(config):
    theirs = hf_model(config).config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    assert found == replace(config, max_position_embeddings=512)


@pytest.mark.parametrize("config", [DENSE, WINDOWED, MIXED, MIXTURE, TIED])
def test_transformers_reads_what_to_hf_writes(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("float32")))
    theirs, expected = transformers.AutoConfig.from_pretrained(tmp_path), hf_model(config).config
    assert type(theirs) is type(expected)
    for name in ("hidden_size", "head_dim", "sliding_window", "rms_norm_eps", "num_key_value_heads", "vocab_size"):
        assert getattr(theirs, name) == getattr(expected, name)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert getattr(theirs, "layer_types", None) == getattr(expected, "layer_types", None)
    assert theirs.tie_word_embeddings == config.tied_embeddings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 8}),
        ("use_biases", True),
        ("attn_bias", True),
        ("causal", False),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_mistral({**PARAMS, key: value})


@pytest.mark.parametrize(
    "change", [{"n_layers": 2**31 - 1}, {"n_layers": 999, "moe": {"num_experts": 10**6, "num_experts_per_tok": 2}}]
)
def test_a_table_of_tensors_without_end_is_refused_at_once(change):
    with pytest.raises(ConfigError, match="expected a whole number from 1 to"):
        ModelConfig.from_mistral({**PARAMS, **change})


@pytest.mark.parametrize("wrong", ["x" * 5000, 10**4000, ["y" * 5000] * 50, {"z": [[[["deep"] * 9] * 9] * 9] * 9}])
def test_a_long_wrong_value_is_cut_in_the_message(wrong):
    with pytest.raises(ConfigError, match=r"^params\.json: dim = ") as caught:
        ModelConfig.from_mistral({"n_layers": 2, "n_heads": 4, "dim": wrong})
    assert len(str(caught.value)) < 1000
