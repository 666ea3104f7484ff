"""`maestrale merge` and `generate --adapter`: the same text either way."""

import json

from byte_models import CONFIGS, native_adapter


def test_merged_and_unmerged_say_the_same_and_something_else_than_the_base(command, models, tmp_path):
    assert CONFIGS["dense"].dim == 32
    adapter = native_adapter(tmp_path / "adapter")
    done = command("merge", models["dense"], adapter, tmp_path / "merged")
    assert (done.code, done.err) == (0, "")
    ask = ("-p", "A fox", "--max-tokens", 12, "--temperature", 0, "--json", "--ignore-eos")
    texts = [
        json.loads(command("generate", *arguments, *ask).out)["token_ids"]
        for arguments in ((tmp_path / "merged",), (models["dense"], "--adapter", adapter), (models["dense"],))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert (tmp_path / "merged" / "tekken.json").exists()


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(command, models, tmp_path):
    adapter = native_adapter(tmp_path / "adapter")
    (adapter / "params.json").write_text(json.dumps({"lora": {"rank": 3, "scaling": 0.5}}))
    done = command("merge", models["dense"], adapter, tmp_path / "merged")
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert "the rank is 3" in done.err
    assert not (tmp_path / "merged").exists()
