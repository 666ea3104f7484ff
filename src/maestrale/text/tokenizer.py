"""The tokenizer of a model's folder: text to ids and back, chats to ids."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maestrale.checkpoint.jsonfile import read_bounded
from maestrale.errors import CheckpointError, RequestError
from maestrale.sampling.constraint import Constraint
from maestrale.sampling.grammar import Grammars
from maestrale.text.chat import read_messages, read_tools
from maestrale.text.stream import StreamDecoder
from maestrale.text.template import ChatTemplate, has_chat, has_tools, other_template
from maestrale.text.tools import CallReader, short_id, tool_constraint
from maestrale.text.vocabulary import Vocabulary, require_size, require_text

# The file names that people use; which tokenizer a file holds is read from the file.
_TEKKEN = re.compile(r"tekken.*\.json")
_SENTENCEPIECE = re.compile(r".*tokenizer.*\.model(\.v\d+(m\d+)?)?")
_HF = re.compile(r"tokenizer\.json")
V1_SIZE = 32_000  # pieces of the v1 tokenizer that Mistral AI published
_ACCEPTED = "tekken.json, tokenizer.model (or tokenizer.model.v3 and the like), tokenizer.json"


def is_tokenizer_file(name: str) -> bool:
    """Whether `load_tokenizer` looks into a file of that name."""
    return any(pattern.fullmatch(name) for pattern in (_TEKKEN, _SENTENCEPIECE, _HF))


class Tokenizer:
    """Text to token ids and back, for one model.

    vocab_size: the model's; every id below it can be decoded. has_chat, has_tools, has_fim: whether there are tokens
    for a chat, for tools in one, for filling in the middle. grammars: what holds a text to a constraint.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._template: ChatTemplate | None = None
        self.kind, self.path = vocabulary.kind, vocabulary.path
        self.vocab_size = vocabulary.size
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.has_chat, self.has_tools = has_chat(vocabulary), has_tools(vocabulary)
        self.has_fim = {"[PREFIX]", "[SUFFIX]"} <= vocabulary.controls.keys()
        self._control_names = {token_id: name for name, token_id in vocabulary.controls.items()}
        self.grammars = Grammars(vocabulary)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, after the begin-of-text token if `bos`. A control token's name in the text is text.

        RequestError for what is no text: another type, a lone surrogate.
        """
        ids = self._vocabulary.encode_text(require_text(text, "prompt"))
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens show nothing. RequestError for an id outside the vocabulary."""
        return _run(self.stream(), ids)

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Iterable[int]) -> str:
        """What `ids` add to the text of `prompt_ids`: a space between the two stays.

        A character that the prompt leaves unfinished belongs to the continuation.
        """
        return _run(self.stream(after=prompt_ids), ids)

    def stream(self, after: Sequence[int] = ()) -> StreamDecoder:
        """A decoder of ids that come one at a time and continue the ids `after`, whose own text it does not give."""
        decoder = StreamDecoder(self._vocabulary.pieces)
        decoder.follow(after)
        return decoder

    @property
    def chats(self) -> bool:
        """Whether a model with this tokenizer may have learnt to chat: it has tokens for turns, or it is the v1 of
        32,000 pieces, whose turns are spelled as text, or its file's name tells the form (tokenizer.model.v1). A
        tokenizer of one's own making, without any of these, has not.
        """
        vocabulary = self._vocabulary
        told = vocabulary.path.suffix == f".{vocabulary.chat_version}"
        published = vocabulary.chat_version == "v1" and vocabulary.size == V1_SIZE
        return "[INST]" in vocabulary.controls or published or told

    @property
    def untold_form(self) -> str | None:
        """The ending (v1) that its file's name must get (tokenizer.model.v1) where a model has learnt to chat with it;
        None where it tells the form of chats already."""
        return None if self.chats or self.kind in ("tekken", "hf") else self._vocabulary.chat_version

    def piece(self, token_id: int) -> bytes:
        """What a token shows within a text, perhaps a part of a character; the name of one that shows nothing."""
        shown = self._vocabulary.pieces.shown[token_id]
        return self._control_names.get(token_id, "").encode() if shown is None else shown

    def encode_fim(self, prompt: str, suffix: str) -> list[int]:
        """Ids that ask for what stands between `prompt` and `suffix`: the suffix comes first, the prompt last.

        RequestError (param "model") where the tokenizer has no tokens for it.
        """
        controls = self._vocabulary.controls
        if not self.has_fim:
            raise RequestError("model: it has no tokens to fill in the middle: use a code model", param="model")
        before = self._vocabulary.encode_text(require_text(prompt, "prompt"))
        # A SentencePiece encoder puts a space before a text; behind a sign of its own, which is cut off, it does not.
        sign = self._vocabulary.encode_text("☺")
        after = self._vocabulary.encode_text("☺" + require_text(suffix, "suffix"))[len(sign) :] if suffix else []
        return [self.bos_id, controls["[SUFFIX]"], *after, controls["[PREFIX]"], *before]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Ids of an OpenAI-style chat, ready for the assistant's next words.

        Messages of one role in a row are merged; system and developer messages may stand anywhere. An assistant's
        last message is continued if its "prefix" is true. RequestError for an impossible chat (`param` "messages"
        or "tools"), and where the tokenizer has no chat form or no tokens for tools.
        """
        return self._chat().encode(read_messages(messages), read_tools(tools))

    def encode_conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[float]]:
        """(ids, weights) of a finished chat to learn from, by the same template: an id's weight is that of the
        assistant's message that it stands in (its `weight`, 1 where it has none), its end-of-sequence token included,
        and 0 outside. RequestError as for `encode_chat`, and where the last message is not the assistant's."""
        return self._chat().encode_finished(read_messages(messages, finished=True), read_tools(tools))

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            if (other := other_template(self.path.parent)) is not None:
                warnings.warn(
                    f"{other}: its chat template is none of Mistral's and is not read: chats are written between "
                    "[INST] and [/INST]; a model that has learnt another form needs its prompts written in that form",
                    stacklevel=2,
                )
            self._template = ChatTemplate(self._vocabulary)
        return self._template

    def tool_constraint(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: Any = None,
        parallel: Any = None,
        content: Constraint | None = None,
    ) -> Constraint | None:
        """What an answer may be where OpenAI-style `tools` are offered: see `text.tools.tool_constraint`."""
        return tool_constraint(self._vocabulary, read_tools(tools), choice, parallel, content)

    def read_calls(self, salt: str) -> CallReader:
        """A reader of the calls in one answer of a chat. salt: the same gives the calls the same ids."""
        return CallReader(self._vocabulary, self.stream(), lambda index: short_id(f"{salt} {index}"))


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a model's folder, or in a GGUF file, which must fit the model's `vocab_size`.

    Files of several kinds are taken for copies of one tokenizer; the choice is fixed: tekken.json, then
    tokenizer.model, then tokenizer.json, then a GGUF file's. CheckpointError if there is none, if two different files
    of one kind compete, if the file is damaged, or if the sizes differ. A tokenizer.json alone may be smaller than the
    model, whose embedding may be padded: ids above it decode to nothing.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        return _from_gguf(folder, vocab_size)
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot look for a tokenizer: {error.strerror}") from None
    if found := [path for path in paths if _TEKKEN.fullmatch(path.name)]:
        from maestrale.text.tekken_room import read_tekken

        path = _only(found)
        vocabulary = read_tekken(path, read_bounded(path))
    elif found := [path for path in paths if _SENTENCEPIECE.fullmatch(path.name)]:
        from maestrale.text.sentencepiece_room import read_sentencepiece

        path = _only(found)
        vocabulary = read_sentencepiece(path, read_bounded(path))
    elif found := [path for path in paths if _HF.fullmatch(path.name)]:
        from maestrale.text.hf_room import read_hf

        path = _only(found)
        vocabulary = read_hf(path, read_bounded(path), vocab_size)
    elif found := [path for path in paths if path.suffix == ".gguf"]:
        return _from_gguf(found[0], vocab_size)
    else:
        raise CheckpointError(f"{folder}: no tokenizer; expected one of {_ACCEPTED}")
    require_size(path, vocabulary.size, vocab_size)
    return Tokenizer(vocabulary)


def _from_gguf(path: Path, vocab_size: int) -> Tokenizer:
    from maestrale.checkpoint.gguf_vocab import from_gguf, to_file
    from maestrale.text.sentencepiece_room import read_sentencepiece

    vocabulary = read_sentencepiece(path, to_file(from_gguf(path)))
    require_size(path, vocabulary.size, vocab_size)
    return Tokenizer(vocabulary)


def _only(paths: list[Path]) -> Path:
    """The one file among copies; of copies, the one whose name says most (tokenizer.model.v3, not tokenizer.model)."""
    contents = {read_bounded(path) for path in paths}
    suffixes = {path.suffix for path in paths if path.suffix not in (".model", ".json")}
    if len(contents) > 1 or len(suffixes) > 1:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(f"{paths[0].parent}: several different tokenizers: {names}; keep the model's own")
    return max(paths, key=lambda path: (path.suffix in suffixes, -len(path.name)))


def _run(decoder: StreamDecoder, ids: Iterable[int]) -> str:
    texts = [decoder.push(token_id) for token_id in ids]
    texts.append(decoder.finish())
    return "".join(texts)
