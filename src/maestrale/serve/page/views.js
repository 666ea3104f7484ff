// The model view of the newest replies, kept in this browser beside its conversations: what does not fit is forgotten.

const KEY = "maestrale.views";
const ROOM = 1_500_000; // characters, of the five million that browsers give to a site

const texts = () => {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((one) => typeof one === "string") : [];
  } catch {
    return [];
  }
};

function write(all) {
  let room = ROOM;
  const fitting = all.filter((one) => (room -= one.length) >= 0);
  try {
    localStorage.setItem(KEY, JSON.stringify(fitting));
  } catch {
    forgetViews(); // conversations come first
  }
}

const of = (text) => {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
};

// The newest first, each as a text of its own, so that its length is known.
export function keepView({ id, tokens, cache }) {
  if (!tokens?.length) return;
  const short = (logprob) => Number(logprob.toFixed(4));
  const packed = tokens.map(({ text, logprob, others, experts }) => [text, short(logprob), others.map(([other, p]) => [other, short(p)]), experts]);
  write([JSON.stringify({ id, cache, tokens: packed }), ...texts().filter((one) => of(one).id !== id)]);
}

// Gives the replies of these conversations what is kept of them, and forgets what belongs to none.
export function recallViews(talks) {
  const nodes = new Map(talks.flatMap((talk) => Object.values(talk.nodes)).map((node) => [node.id, node]));
  write(texts().filter((one) => {
    const { id, cache, tokens } = of(one), node = nodes.get(id);
    if (!node || !Array.isArray(tokens) || !tokens.every(sound)) return false;
    node.tokens ??= tokens.map(([text, logprob, others, experts]) => ({ text, logprob, others, experts: experts ?? undefined }));
    node.cache ??= cached(cache) ? cache : undefined;
    return true;
  }));
}

export function forgetViews() {
  try {
    localStorage.removeItem(KEY);
  } catch {
    // a browser that keeps nothing
  }
}

// The store may be damaged, or another version's: what is shown has the form that the view relies on.
const whole = (value) => Number.isInteger(value) && value >= 0;
const pair = (one) => Array.isArray(one) && typeof one[0] === "string" && Number.isFinite(one[1]);
const layer = (one) => Array.isArray(one) && one.every(whole);
const sound = (token) => pair(token) && Array.isArray(token[2]) && token[2].every(pair) && (token[3] == null || (Array.isArray(token[3]) && token[3].every(layer)));
const cached = (cache) => whole(cache?.tokens) && Array.isArray(cache.kinds)
  && cache.kinds.every((kind) => [kind?.held, kind?.kept, kind?.pages].every(whole) && (kind.window === null || whole(kind.window)));
