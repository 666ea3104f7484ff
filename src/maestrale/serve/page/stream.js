// Talking with the server: its model's card, and answers as they come.

// Beside this page, wherever a proxy has put it; without the name and key that the page's own address may bear.
const at = (path) => new URL(path, location.origin + location.pathname);

export async function card() {
  const answer = await fetch(at("v1/models"));
  if (!answer.ok) throw new Error(await reason(answer));
  return (await answer.json()).data[0];
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

// Yields the events of a streamed completion, as objects, until [DONE]. An error, before or within it, is thrown.
export async function* events(path, body, signal) {
  const answer = await fetch(at(path), {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!answer.ok) throw new Error(await reason(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The tokens of one event: {bytes or text, logprob, others: [[text, logprob]], experts}, from either route's form.
export function tokensOf(choice) {
  const experts = choice.experts ?? [];
  const told = choice.logprobs;
  if (!told) return [];
  if (told.content)
    return told.content.map((token, i) => ({
      bytes: token.bytes,
      logprob: token.logprob,
      others: token.top_logprobs.map((other) => [other.token, other.logprob]),
      experts: experts[i],
    }));
  return told.tokens.map((name, i) => ({
    bytes: bytesOf(name),
    logprob: told.token_logprobs[i],
    others: Object.entries(told.top_logprobs[i] ?? {})
      .map(([other, logprob]) => [text(bytesOf(other)), logprob])
      .sort((a, b) => b[1] - a[1]),
    experts: experts[i],
  }));
}

function bytesOf(name) {
  if (name.startsWith("bytes:")) return (name.match(/[0-9a-f]{2}(?=\\|$)/g) ?? []).map((pair) => parseInt(pair, 16));
  return [...new TextEncoder().encode(name)];
}

export function text(bytes) {
  return new TextDecoder().decode(new Uint8Array(bytes));
}
