// The model view: how likely each token was and what else might have come, which experts gave it, what the cache holds.

import { make } from "./markdown.js";

const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "<0.1%");
const FULL = 7; // nats of surprise at which the shade is full: one in a thousand
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

export function colour(expert, count) {
  const turn = count <= 12 ? expert / count : (expert * 0.381966) % 1;
  return `hsl(${Math.round(360 * turn + 15)} ${58 - 8 * (expert % 2)}% ${44 + 18 * (expert % 2)}%)`;
}

export class View {
  constructor(root, card) {
    this.card = card.maestrale;
    this.tokens = [];
    this.chosen = -1;
    this.memory = make("div", { class: "memory" });
    this.text = make("div", { class: "tokens", tabindex: "0", role: "listbox", "aria-label": "Tokens of the reply; the arrow keys go through them" });
    this.detail = make("div", { class: "detail", "aria-live": "polite" });
    this.canvas = make("canvas", { class: "strip", role: "img" });
    this.legend = make("ul", { class: "legend" });
    this.experts = make("section", { class: "experts" }, make("h3", { text: "Experts" }), make("p", { class: "note", text:
      "A column for each token, a row for each layer; above the router’s first choice, below its second." }), this.canvas, this.legend);
    root.replaceChildren(
      make("section", {}, make("h3", { text: "Tokens" }), make("p", { class: "note legend-line" }, "The warmer, the less the model expected it.",
        make("span", { class: "scale", "aria-hidden": "true" })), this.text),
      make("section", { class: "one" }, this.detail),
      this.experts,
      make("section", {}, make("h3", { text: "Memory" }), this.memory),
    );
    this.text.addEventListener("pointerover", (event) => this.choose(Number(event.target.dataset?.i ?? -1)));
    this.text.addEventListener("focus", () => this.choose(this.chosen < 0 ? 0 : this.chosen));
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("pointermove", (event) => this.choose(this.at(event)));
    this.show(null);
  }

  // A reply's tokens, or none; `push` adds what comes while it is being written.
  show(node) {
    this.node = node;
    this.tokens = [];
    this.counts = new Array(this.card.experts ?? 0).fill(0);
    this.chosen = -1;
    this.text.replaceChildren();
    this.detail.replaceChildren();
    this.push(node?.tokens ?? []);
    this.experts.hidden = !(this.card.experts && this.tokens.length);
    this.memory.parentElement.hidden = !node?.cache;
    if (!this.tokens.length)
      this.text.replaceChildren(make("p", { class: "note", text: "Tokens of new replies appear here; those of older ones are forgotten." }));
    this.fill(node?.cache);
  }

  push(tokens) {
    if (tokens.length && !this.tokens.length) this.text.replaceChildren();
    for (const token of tokens) {
      const span = make("span", { class: "token", role: "option", id: `token-${this.tokens.length}`, "data-i": this.tokens.length, text: token.text || "·" });
      span.style.setProperty("--surprise", Math.min(1, -token.logprob / FULL));
      if (token.text.includes("\n")) span.classList.add("line-end");
      this.text.append(span);
      this.tokens.push(token);
      for (const layer of token.experts ?? []) for (const expert of layer) this.counts[expert]++;
    }
    if (tokens.length && this.card.experts) {
      this.experts.hidden = false;
      this.draw();
    }
  }

  choose(i) {
    if (!(i >= 0 && i < this.tokens.length)) return;
    this.text.querySelector(".chosen")?.classList.remove("chosen");
    const span = this.text.children[i], token = this.tokens[i];
    span.classList.add("chosen");
    this.text.setAttribute("aria-activedescendant", span.id);
    this.chosen = i;
    const rows = [[visible(token.text), token.logprob, true], ...token.others.filter(([other]) => other !== token.text).map(([t, l]) => [visible(t), l, false])];
    rows.sort((a, b) => b[1] - a[1]);
    const bars = make("ul", { class: "bars", "aria-label": `Token ${i + 1} of ${this.tokens.length}` }, ...rows.map(([text, logprob, own]) => {
      const bar = make("li", { class: own ? "own" : false }, make("code", { text }), make("span", { class: "bar" }), make("b", { text: percent(Math.exp(logprob)) }));
      bar.style.setProperty("--share", Math.exp(logprob));
      return bar;
    }));
    this.detail.replaceChildren(bars);
    if (token.experts)
      this.detail.append(make("p", { class: "layers" }, make("span", { class: "note", text: "Experts, by layer:" }), ...token.experts.map((layer, i) => make("span", { title: `layer ${i}: experts ${layer.join(" and ")}` },
        make("small", { text: i }), ...layer.map((expert) => chip(expert, this.card.experts))))));
    if (this.card.experts) this.draw();
  }

  key(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.tokens.length - 1, this.chosen + steps[event.key])));
    this.text.querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
  }

  // The strip: as many columns as the panel is wide, then further rows of them.
  geometry() {
    const width = this.canvas.parentElement.clientWidth || 320, layers = this.card.layers;
    const cell = 8, high = Math.max(6, Math.min(16, Math.floor(96 / layers)));
    const columns = Math.max(1, Math.floor(width / cell));
    return { width, layers, cell, high, columns, band: layers * high + 8, rows: Math.ceil(this.tokens.length / columns) };
  }

  at(event) {
    const { cell, columns, band } = this.geometry(), box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / cell);
    return column < columns ? Math.floor((event.clientY - box.top) / band) * columns + column : -1;
  }

  draw() {
    const { width, layers, cell, high, columns, band, rows } = this.geometry(), scale = devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = rows * band * scale;
    this.canvas.style.height = `${rows * band}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    this.tokens.forEach((token, i) => {
      const x = (i % columns) * cell, y = Math.floor(i / columns) * band;
      (token.experts ?? []).forEach((layer, l) => layer.slice(0, 2).forEach((expert, k, { length }) => {
        pen.fillStyle = colour(expert, this.card.experts);
        const [from, to] = length === 1 ? [0, 1] : [[0, 0.62], [0.62, 1]][k]; // the first choice weighs more
        pen.fillRect(x, y + l * high + from * (high - 1), cell - 1, (to - from) * (high - 1));
      }));
      if (i === this.chosen) {
        pen.strokeStyle = getComputedStyle(this.canvas).color;
        pen.lineWidth = 2;
        pen.strokeRect(x - 1, y, cell + 1, layers * high - 1);
      }
    });
    const total = this.counts.reduce((a, b) => a + b, 0) || 1;
    const shares = this.counts.map((count, e) => [e, count / total]);
    this.canvas.setAttribute("aria-label", `Experts of ${this.tokens.length} tokens in ${layers} layers: ${shares.map(([e, s]) => `expert ${e} ${percent(s)}`).join(", ")}`);
    this.legend.replaceChildren(...shares.map(([e, share]) => make("li", {}, chip(e, this.card.experts), percent(share))));
  }

  // What a stream says of the cache: the tokens of this sequence, and the pages held in all, for each kind of layer.
  fill(cache) {
    if (this.node) this.node.cache = cache;
    if (!cache) return;
    this.memory.parentElement.hidden = false;
    const meters = [meter("Context", cache.tokens, this.card.context, "tokens")];
    for (const { window, held, kept, pages } of cache.kinds) {
      if (window) meters.push(meter(`Window of ${window.toLocaleString("en")}`, Math.min(cache.tokens, window), window,
        cache.tokens > window ? `· ${(cache.tokens - window).toLocaleString("en")} rolled out` : "tokens"));
      meters.push(meter(window ? "Its pages, over all sequences" : "Pages, over all sequences", held, pages, `held · ${kept.toLocaleString("en")} kept`));
    }
    this.memory.replaceChildren(...meters);
  }
}

function chip(expert, count) {
  const node = make("i", { class: "chip", text: expert });
  node.style.setProperty("--colour", colour(expert, count));
  return node;
}

function meter(name, value, most, words) {
  const figure = `${value.toLocaleString("en")} of ${most.toLocaleString("en")} ${words}`;
  return make("label", { class: "meter" }, make("span", { text: name }), make("small", { text: figure }),
    make("meter", { min: 0, max: most, value, text: figure }));
}
