"""Tools and structured answers by Mistral's client, unchanged: python mistral_tools.py URL. The model may be random."""

import json
import sys

try:
    from mistralai.client import Mistral
except ImportError:
    from mistralai import Mistral

client = Mistral(api_key="none", server_url=sys.argv[1])
(model,) = client.models.list().data
assert model.capabilities.function_calling is True

parameters = {"type": "object", "properties": {"from": {"enum": ["NE", "NW"]}}, "required": ["from"]}
tool = {"type": "function", "function": {"name": "wind", "parameters": parameters | {"additionalProperties": False}}}
messages = [{"role": "user", "content": "Which wind?"}]
ask = {"model": model.id, "max_tokens": 120, "random_seed": 1, "tools": [tool], "tool_choice": "any"}
plain = client.chat.complete(messages=messages, **ask, parallel_tool_calls=False)
(call,) = plain.choices[0].message.tool_calls
assert plain.choices[0].finish_reason == "tool_calls"
assert call.function.name == "wind"
assert json.loads(call.function.arguments)["from"] in ("NE", "NW")

made = [
    piece
    for event in client.chat.stream(messages=messages, **ask, parallel_tool_calls=False)
    for piece in event.data.choices[0].delta.tool_calls or []
]
assert "".join(piece.function.arguments for piece in made) == call.function.arguments

said = {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}
result = {"role": "tool", "name": "wind", "tool_call_id": call.id, "content": "12 knots"}
assert client.chat.complete(messages=[*messages, said, result], **ask | {"tool_choice": "none"}).choices

form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema_definition": parameters}}
answer = client.chat.complete(model=model.id, messages=messages, response_format=form, max_tokens=120, random_seed=2)
assert answer.choices[0].finish_reason == "length" or "from" in json.loads(answer.choices[0].message.content)
print("ok")
