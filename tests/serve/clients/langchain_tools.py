"""Tools and structured answers by langchain-openai, unchanged: python langchain_tools.py URL MODEL. The model may be
random."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict


class Wind(BaseModel):
    """A wind."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["bora", "maestrale"]
    strong: bool


@tool
def blow(name: Literal["bora", "maestrale"]) -> str:
    """Lets a wind blow."""
    return f"{name} blows"


url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=1, seed=3, max_tokens=150)
ask = [HumanMessage("Which wind?")]
calling = chat.bind_tools([blow], tool_choice="required", parallel_tool_calls=False)
said = calling.invoke(ask)
(call,) = said.tool_calls
assert call["name"] == "blow"
assert call["args"]["name"] in ("bora", "maestrale")
assert not said.invalid_tool_calls

total = None
for chunk in calling.stream(ask):
    total = chunk if total is None else total + chunk
assert [(c["name"], c["args"]) for c in total.tool_calls] == [(call["name"], call["args"])]

result = ToolMessage(blow.invoke(call["args"]), tool_call_id=call["id"])
assert chat.bind_tools([blow], tool_choice="none").invoke([*ask, said, result]).content is not None
for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(Wind, method=method).invoke(ask), Wind)
print("ok")
