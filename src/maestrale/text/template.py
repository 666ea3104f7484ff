"""Turns to ids through mistral-common's templates, one for each version of the tokenizers.

Only its templates are used. Its validator refuses chats that clients do send (foreign call ids, any order of roles);
its sampling fields are narrower than ours and never set. It is imported at the first chat: half a second.
"""

from __future__ import annotations

import copy
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from maestrale.checkpoint.jsonfile import parse_json, read_bounded
from maestrale.errors import CheckpointError, RequestError, UsageError, first_line
from maestrale.text.chat import Turn
from maestrale.text.tools import TOOL_CONTROLS, require_tools
from maestrale.text.vocabulary import V2_CONTROLS, V7_CONTROLS, V11_CONTROLS, Vocabulary

# Version → mistral-common's class that merges messages, and the control tokens without which there is no chat.
_VERSIONS: dict[str | None, tuple[str, Set[str]]] = {
    "v1": ("InstructRequestNormalizer", set()),
    "v2": ("InstructRequestNormalizer", V2_CONTROLS),
    "v3": ("InstructRequestNormalizer", V2_CONTROLS),
    "v7": ("InstructRequestNormalizerV7", V7_CONTROLS),
    "v11": ("InstructRequestNormalizerV13", V11_CONTROLS),
    "v13": ("InstructRequestNormalizerV13", V11_CONTROLS),
}


def other_template(folder: Path) -> Path | None:
    """The file in a model's folder that holds a chat template (of Jinja, for transformers) of another form than
    Mistral's, if there is one."""
    config = folder / "tokenizer_config.json"
    with suppress(OSError, CheckpointError, UnicodeDecodeError):
        for path in (config, folder / "chat_template.jinja"):
            if path.is_file():
                content = read_bounded(path)
                found = parse_json(content, str(path)).get("chat_template") if path == config else content.decode()
                if found and "[INST]" not in str(found):
                    return path
    return None


def has_chat(vocabulary: Vocabulary) -> bool:
    """Whether a chat can be written with these tokens (whether the model has learnt to chat, no file says)."""
    return vocabulary.chat_version in _VERSIONS and _VERSIONS[vocabulary.chat_version][1] <= vocabulary.controls.keys()


def has_tools(vocabulary: Vocabulary) -> bool:
    """Whether there are tokens for tools and their calls."""
    return has_chat(vocabulary) and vocabulary.controls.keys() >= TOOL_CONTROLS


class ChatTemplate:
    """The chat form of one tokenizer. RequestError where it has none; UsageError where the extra is not installed."""

    def __init__(self, vocabulary: Vocabulary):
        version = vocabulary.chat_version
        normalizer, needed = _VERSIONS.get(version, ("", {"a known version"}))
        if not needed <= vocabulary.controls.keys():
            raise RequestError(
                f"{vocabulary.path.name}: no chat form ({vocabulary.kind}, version {version or 'not stated'}): "
                "use a plain prompt, or an instruct model with its own tokenizer",
                param="messages",
            )
        try:
            from mistral_common.protocol.instruct import normalize
            from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage
            from mistral_common.tokens.tokenizers import instruct
        except ImportError as error:
            raise UsageError(
                f"chats need {str(error.name).partition('.')[0]}: run  pip install 'maestrale[chat]'"
            ) from None

        self._vocabulary = vocabulary
        self._normalizer = getattr(normalize, normalizer).normalizer()
        self._normalizer._assistant_message_class = FinetuningAssistantMessage  # the one that keeps its weight
        tokenizer: Any = _Encoder(vocabulary)
        if version == "v13":  # its template insists on mistral-common's own class
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer

            tokenizer = Tekkenizer.from_file(vocabulary.path)
        self._template = getattr(instruct, f"InstructTokenizer{str(version).upper()}")(tokenizer)
        # Up to v3 a system message goes into a user's, and an assistant's message holds either text or calls.
        self._splits_calls = version in ("v1", "v2", "v3")

    def encode(self, turns: list[Turn], tools: list[dict[str, Any]]) -> list[int]:
        """Ids of the chat. RequestError for tools where the tokenizer has no tokens for them, and for what the
        template cannot say (version 2: two results for one message of calls)."""
        return self._encode(self._template, turns, tools)

    def encode_finished(self, turns: list[Turn], tools: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
        """(ids, weight of each), as Tokenizer.encode_conversation says."""
        answers: list[tuple[list[int], float]] = []
        template = copy.copy(self._template)

        def recorded(message: Any, is_before_last_user_message: bool) -> list[int]:
            ids = self._template.encode_assistant_message(message, is_before_last_user_message)
            answers.append((ids, message.weight))
            return ids

        template.encode_assistant_message = recorded
        ids = self._encode(template, turns, tools)
        weights, start = [0.0] * len(ids), 0
        for answer, weight in answers:
            if answer:  # version 2 leaves out calls of long ago
                end = ids.index(self._vocabulary.eos_id, start) + 1  # no other message has an end-of-sequence token
                weights[end - len(answer) : end] = [weight] * len(answer)
                start = end
        return ids, weights

    def _encode(self, template: Any, turns: list[Turn], tools: list[dict[str, Any]]) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.protocol.instruct.tool_calls import Function, Tool

        if tools or any(turn.calls or turn.answers for turn in turns):
            require_tools(self._vocabulary, "tools" if tools else "messages")
        offered = [Tool(function=Function(**function)) for function in tools]
        request = ChatCompletionRequest(messages=self._messages(turns), tools=offered or None)
        try:
            merged = self._normalizer.from_chat_completion_request(request)
            ids: list[int] = template.encode_instruct(merged).tokens
        except (MistralCommonException, ValueError, RecursionError) as error:
            raise RequestError(f"messages: {first_line(error)}", param="messages") from None
        return ids

    def _messages(self, turns: list[Turn]) -> list[Any]:
        from mistral_common.protocol.instruct.messages import (
            FinetuningAssistantMessage,
            SystemMessage,
            ToolMessage,
            UserMessage,
        )
        from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall

        messages: list[Any] = []
        for turn in turns:
            if turn.role == "system":
                messages.append(SystemMessage(content=turn.text))
            elif turn.role == "user":
                messages.append(UserMessage(content=turn.text))
            elif turn.answers is not None:
                messages.append(ToolMessage(content=turn.text, tool_call_id=turn.answers.id, name=turn.answers.name))
            else:
                calls = [
                    ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
                    for call in turn.calls
                ]
                said = [(turn.text, []), ("", calls)] if self._splits_calls else [(turn.text, calls)]
                for text, made in said:
                    if not text and not made:
                        continue
                    last = messages[-1] if messages else None
                    if self._splits_calls and last and last.role == "assistant" and bool(last.tool_calls) != bool(made):
                        # Says nothing, and keeps the normalizer from merging what the template would then refuse.
                        messages.append(SystemMessage(content=""))
                    messages.append(
                        FinetuningAssistantMessage(
                            content=text, tool_calls=made or None, prefix=turn.prefix, weight=turn.weight
                        )
                    )
        return messages


class _Encoder:
    """A vocabulary as mistral-common's templates see one."""

    model_settings_builder = None

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        try:
            return self._vocabulary.encode_text(text)
        except RequestError as error:
            raise RequestError(str(error), param="messages") from None

    def get_special_token(self, name: str) -> int:
        """-1 for one that is missing: templates look up all at the start; those of a chat are checked before."""
        return self._vocabulary.controls.get(name, -1)

    def decode(self, tokens: list[int], special_token_policy: object) -> str:
        return ""  # a debugging text that the templates make of every chat, and nobody reads
