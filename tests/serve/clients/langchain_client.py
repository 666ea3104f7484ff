"""What a program written for langchain-openai does, unchanged: python langchain_client.py URL [KEY]."""

import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

url, key = sys.argv[1], (sys.argv[2:] or ["none"])[0]
common = {"base_url": f"{url}/v1", "api_key": key, "model": "stories"}
chat = ChatOpenAI(**common, temperature=0, max_tokens=12, stream_usage=True)
talk = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Hello."), HumanMessage("Tell me of a fox.")]
plain = chat.invoke(talk)
assert plain.content
assert plain.usage_metadata["output_tokens"] <= 12
pieces = list(chat.stream(talk))
assert "".join(piece.content for piece in pieces) == plain.content
assert [p.content for p in chat.batch([talk, talk])] == [plain.content] * 2
scored = chat.bind(logprobs=True, top_logprobs=2).invoke(talk)
assert scored.response_metadata["logprobs"]["content"]
text = OpenAI(**common, temperature=0, max_tokens=6)
assert "".join(text.stream("A fox")) == text.invoke("A fox")
vectors = OpenAIEmbeddings(**common, check_embedding_ctx_length=False).embed_documents(["A fox", "A hen"])
assert len(vectors) == 2
print("ok")
