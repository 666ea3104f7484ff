"""Texts and tokenizer files that the tests of this folder share."""

import base64
from pathlib import Path

import mistral_common

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": ("tokenizer.model.v1", 32000),
    "v2": ("mistral_instruct_tokenizer_240216.model.v2", 32768),
    "v3": ("mistral_instruct_tokenizer_240323.model.v3", 32768),
    "v7": ("mistral_instruct_tokenizer_241114.model.v7", 32768),
    "v7m1": ("mistral_instruct_tokenizer_241114.model.v7m1", 32768),
    "tekken": ("tekken_240718.json", 131072),
    "tekken-image": ("tekken_240911.json", 131072),
}
TEXTS = [
    "",
    " ",
    "  two spaces, and two after  ",
    "This is a test",
    "Où est passé l'été ? Ça, c'est naïf.",
    "日本語のテキスト и русский текст",
    "🦊👩‍👩‍👧 emoji 🇫🇷",
    "line\nline\r\n\n\ttabbed\n",
    "<s>[INST] not control [/INST]</s> <0x41> <unk> [control_8]",
    "\x00\x07\u2028\ufeff▁ ▁▁",
    "def f(x):\n    return x ** 2  # square\n",
]

CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]"),
)


def tiny_tekken(version="v7", n_controls=32):
    """A tekken file of a few hundred words, as a dictionary."""
    words = [bytes([i]) for i in range(256)] + [b" t", b"he", b" the", "é".encode()]
    return {
        "config": {
            "pattern": r" ?\p{L}+|\s+|[^\s\p{L}]+",
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + n_controls,
            "default_num_special_tokens": n_controls,
            "version": version,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for i, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(CONTROLS[:n_controls])
        ],
    }
