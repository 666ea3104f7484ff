"""What a program written for OpenAI's client does, unchanged, of any major: python openai_client.py URL [KEY]"""

import sys

import openai

url, key = sys.argv[1], (sys.argv[2:] or ["none"])[0]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
(model,) = client.models.list().data
assert client.models.retrieve(model.id).id == model.id

ask = {"model": model.id, "messages": [{"role": "user", "content": "Tell me of a fox."}], "max_tokens": 12}
plain = client.chat.completions.create(**ask, temperature=0)
(choice,) = plain.choices
assert choice.message.role == "assistant"
assert choice.finish_reason in ("length", "stop")
assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens

chunks = list(client.chat.completions.create(**ask, temperature=0, stream=True, stream_options={"include_usage": True}))
assert chunks[0].choices[0].delta.role == "assistant"
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens  # of which more may lie in the cache by now
assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
assert len({chunk.id for chunk in chunks}) == 1

many = client.chat.completions.create(**ask, n=3, seed=7, logprobs=True, top_logprobs=4)
assert [c.index for c in many.choices] == [0, 1, 2]
assert all(len(entry.top_logprobs) == 4 for c in many.choices for entry in c.logprobs.content)
again = client.chat.completions.create(**ask, n=3, seed=7)
assert [c.message.content for c in again.choices] == [c.message.content for c in many.choices]

two = ["A fox", "A hen"]
texts = client.completions.create(model=model.id, prompt=two, max_tokens=4, temperature=0, echo=True, logprobs=2)
assert [c.text[:5] for c in texts.choices] == two
for c in texts.choices:
    assert c.logprobs.token_logprobs[0] is None
    assert len(c.logprobs.tokens) == len(c.logprobs.top_logprobs) == len(c.logprobs.text_offset)
    assert all(c.text[a:b].strip() in token for a, b, token in zip(
        c.logprobs.text_offset, c.logprobs.text_offset[1:], c.logprobs.tokens, strict=False))  # fmt: skip
streamed = client.completions.create(model=model.id, prompt="A fox", max_tokens=6, temperature=0, stream=True)
whole = client.completions.create(model=model.id, prompt="A fox", max_tokens=6, temperature=0)
assert "".join(c.choices[0].text for c in streamed) == whole.choices[0].text

vectors = client.embeddings.create(model=model.id, input=["A fox", "A hen"])
assert len(vectors.data) == 2
assert len(vectors.data[0].embedding) == len(vectors.data[1].embedding) > 1

for wrong, error in (
    ({"temperature": 3}, openai.BadRequestError),
    ({"model": "gpt-4"}, openai.NotFoundError),
    ({"messages": []}, openai.BadRequestError),
):
    try:
        client.chat.completions.create(**{**ask, **wrong})
    except error as raised:
        assert raised.request_id.startswith("req_")  # noqa: PT017
        assert raised.param in wrong  # noqa: PT017
    else:
        raise AssertionError(f"{wrong} was accepted")
print("ok", openai.__version__)
