"""What a program written for Mistral's client does, unchanged: python mistral_client.py URL [KEY]."""

import sys

try:
    from mistralai.client import Mistral
except ImportError:
    from mistralai import Mistral

url, key = sys.argv[1], (sys.argv[2:] or ["none"])[0]
client = Mistral(api_key=key, server_url=url)
(model,) = client.models.list().data
assert model.capabilities.completion_chat is True
assert client.models.retrieve(model_id=model.id).id == model.id

ask = {"model": model.id, "messages": [{"role": "user", "content": "Tell me of a fox."}], "max_tokens": 12}
plain = client.chat.complete(**ask, temperature=0.0)
assert plain.choices[0].finish_reason in ("length", "stop")
assert plain.usage.completion_tokens == 12 or plain.choices[0].finish_reason == "stop"
chunks = list(client.chat.stream(**ask, temperature=0.0))
assert "".join(c.data.choices[0].delta.content or "" for c in chunks) == plain.choices[0].message.content
seeded = [client.chat.complete(**ask, random_seed=5, n=2) for _ in range(2)]
assert [c.message.content for c in seeded[0].choices] == [c.message.content for c in seeded[1].choices]
vectors = client.embeddings.create(model=model.id, inputs=["A fox", "A hen"])
assert len(vectors.data) == 2
try:
    client.fim.complete(model=model.id, prompt="def f(", suffix="return 1", max_tokens=4)
except Exception as error:  # the bundled model has no tokens for it, and says so
    assert "fill in the middle" in str(error), error  # noqa: PT017
else:
    assert model.capabilities.completion_fim
print("ok")
