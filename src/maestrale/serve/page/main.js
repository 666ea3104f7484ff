// The page: a list of conversations, the one that is open, its settings and its model view.

import { make, show } from "./markdown.js";
import { add, conversation, drop, exported, imported, load, path, save, settings as stored, siblings, tip, titleOf } from "./store.js";
import { card as fetchCard, events, tokensOf } from "./stream.js";
import { View } from "./view.js";
import { keepView, recallViews } from "./views.js";
import { showSettings, sampling } from "./settings.js";

const $ = (id) => document.getElementById(id);
const wide = matchMedia("(min-width: 62rem)");
const STARTS = {
  text: ["Once upon a time there was a fisherman who", "The old king had three sons, and the youngest", "Far behind the mountains, where the north wind lives,"],
  chat: ["Tell me a story about a fox and a hen.", "Tell me a story about a king with three daughters.", "How does a sail pull a boat against the wind?"],
};

let card, view, talks = load(), talk, writing = null, followed = null;
recallViews(talks);
let options = { panel: wide.matches ? "view" : null, theme: "auto", ...stored() };

// Opening

async function begin() {
  theme();
  try {
    card = await fetchCard();
  } catch (error) {
    $("model").textContent = "No answer";
    return problem(`The server cannot be asked: ${error.message}. Reload to try again.`);
  }
  const { layers, experts, experts_per_token: each, windows, context } = card.maestrale;
  $("model").textContent = card.id;
  document.title = `${card.id} · Maestrale`;
  $("facts").title = $("facts").textContent = [
    `${layers} layers`, experts && `${experts} experts, ${each} a token`,
    windows.some(Boolean) && `window ${[...new Set(windows.filter(Boolean))].join(", ")}`, `context ${context.toLocaleString("en")}`,
  ].filter(Boolean).join(" · ");
  view = new View($("view"), card);
  panel(wide.matches ? options.panel : null);
  grow($("say"));
  open(talks.toSorted((a, b) => b.changed - a.changed)[0] ?? conversation(card.maestrale.chats ? "chat" : "text"));
}

function open(next) {
  stop();
  talk = next;
  if (!talks.includes(talk)) talks.push(talk);
  problem();
  render();
  showSettings($("settings"), { talk, options, card, changed: settingsChanged });
  follow(path(talk).findLast((node) => node.role === "assistant"));
  document.body.classList.remove("side");
}

function settingsChanged(formChanged) {
  stored(options);
  keep();
  if (formChanged) render();
}

function keep() {
  talk.changed = Date.now();
  talk.title = titleOf(talk) || talk.title;
  if (!save(talks)) problem("This browser keeps no more: export conversations, then delete some.");
  renderList();
}

// What is shown

function render() {
  renderList();
  const nodes = path(talk);
  document.body.dataset.form = talk.form;
  $("messages").replaceChildren(...nodes.map((node) => message(node, node === nodes.at(-1))));
  $("empty").hidden = nodes.length > 0;
  $("empty").replaceChildren(
    make("p", { class: "hello", text: talk.form === "text" ? "Begin a story, and the model goes on." : "What would you like to talk about?" }),
    ...STARTS[talk.form].map((start) => make("button", { class: "start", type: "button", text: start, on: { click: () => send(start) } })),
  );
  $("say").placeholder = talk.form === "text" ? (nodes.length ? "Write on…" : "Once upon a time…") : "Message";
  $("hint").textContent = card.maestrale.chats || talk.form === "chat" ? "Enter sends, Shift+Enter begins a new line" : "This model has not learnt to chat: it goes on with your text.";
  controls();
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function renderList() {
  $("list").replaceChildren(...talks.filter((one) => one.leaf || one === talk).toSorted((a, b) => b.changed - a.changed).map((one) => {
    const remove = make("button", { class: "icon remove", "aria-label": `Delete ${one.title || "the new conversation"}`, text: "✕" });
    remove.addEventListener("click", () => {
      if (remove.classList.contains("sure")) return forget(one);
      remove.classList.add("sure");
      remove.textContent = "Delete?";
      setTimeout(() => { remove.classList.remove("sure"); remove.textContent = "✕"; }, 3000);
    });
    return make("li", { class: one === talk ? "open" : false },
      make("button", { class: "talk", "aria-current": one === talk ? "true" : false, text: one.title || "New conversation", on: { click: () => open(one) } }), remove);
  }));
}

function forget(one) {
  if (one === talk) stop();
  talks = talks.filter((other) => other !== one);
  save(talks);
  recallViews(talks); // and nothing is kept of it
  if (one === talk) open(talks.at(-1) ?? conversation(talk.form));
  else renderList();
}

function message(node, last) {
  const body = make("div", { class: "body" });
  const item = make("li", { class: `message ${node.role}`, "data-id": node.id },
    make("span", { class: "who", text: node.role === "user" ? "You" : card.id }), body, make("div", { class: "actions" }, ...actions(node, last)));
  if (talk.form === "text" || node.role === "user") body.textContent = node.content;
  else show(body, node.content);
  if (node.role === "assistant") item.addEventListener("click", () => follow(node));
  return item;
}

function actions(node, last) {
  const button = (text, label, click) => make("button", { class: "quiet", type: "button", text, "aria-label": label, on: { click } });
  const made = [], all = siblings(talk, node), at = all.indexOf(node);
  if (all.length > 1) {
    const go = (step) => { stop(); talk.leaf = tip(talk, all[(at + step + all.length) % all.length]).id; render(); keep(); follow(talk.nodes[talk.leaf]); };
    made.push(make("span", { class: "branch" }, button("‹", "The version before", () => go(-1)), `${at + 1}/${all.length}`, button("›", "The next version", () => go(1))));
  }
  if (node === writing?.node) return made;
  if (node.role === "assistant") {
    if (last && talk.form === "text") made.push(button("Go on", "Let the model go on", () => send("")));
    made.push(button(talk.form === "text" ? "Another version" : "Regenerate", "Another version of this reply", () => write(talk.nodes[node.parent])));
    made.push(button("Copy", "Copy this reply", () => navigator.clipboard?.writeText(node.content)));
  }
  if (node.role === "user" && talk.form === "chat") made.push(button("Edit", "Edit this message; what follows becomes another branch", () => edit(node)));
  if (talk.form === "text" && last) made.push(button("Edit text", "Edit the whole text", () => edit(null)));
  if (node.role === "user" && last) made.push(button("Try again", "Ask for a reply", () => write(node)));
  if (node.stats?.tokens) made.push(make("span", { class: "stats", text: stats(node.stats) }));
  return made;
}

const stats = ({ tokens, seconds }) => `${tokens} tokens${seconds > 0 && tokens > 1 ? ` · ${((tokens - 1) / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s` : ""}`;

// A message, or the whole text of a story, in a field of its own; what comes of it is a new branch.
function edit(node) {
  stop();
  const before = node ? node.content : path(talk).map((one) => one.content).join("");
  const field = make("textarea", { "aria-label": "Edit", rows: 3 });
  field.value = before;
  const done = make("button", { type: "submit", text: node ? "Send" : "Keep" });
  const form = make("form", { class: "edit" }, field, make("div", {}, done, make("button", { type: "button", class: "quiet", text: "Cancel", on: { click: render } })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    const made = add(talk, node?.parent ?? null, "user", field.value);
    render();
    keep();
    if (node) write(made);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") render();
    if (event.key === "Enter" && !event.shiftKey && node) { event.preventDefault(); form.requestSubmit(); }
  });
  if (node) $("messages").querySelector(`[data-id="${CSS.escape(node.id)}"]`).replaceChildren(form);
  else $("messages").replaceChildren(make("li", { class: "message" }, form));
  grow(field);
  field.focus();
}

// What is sent, and what comes back

function send(said) {
  if (writing) return;
  problem();
  const nodes = path(talk);
  if (!said.trim() && !(talk.form === "text" && nodes.length)) return;
  let last = nodes.at(-1) ?? null;
  if (said.trim()) {
    const before = nodes.map((node) => node.content).join("");
    const gap = talk.form === "text" && before && !/\s$/.test(before) && !/^\s/.test(said) ? " " : "";
    last = add(talk, last?.id ?? null, "user", gap + said);
  }
  $("say").value = "";
  grow($("say"));
  write(last);
}

// A reply to `parent`, beside any that there are.
async function write(parent) {
  stop();
  problem();
  const nodes = path(talk, parent.id), mine = talk;
  const node = add(talk, parent.id, "assistant", "");
  Object.assign(node, { tokens: [], stats: { tokens: 0, seconds: 0 } });
  const decoder = new TextDecoder(), now = { node, abort: new AbortController() };
  writing = now;
  render();
  follow(node);
  keep();
  announce("The model is writing.");
  const asked = { model: card.id, model_view: true, ...sampling(options, talk.form) };
  const system = talk.system ? [{ role: "system", content: talk.system }] : [];
  const [route, body] = talk.form === "text"
    ? ["v1/completions", { ...asked, prompt: nodes.map((one) => one.content).join(""), logprobs: 6 }]
    : ["v1/chat/completions", { ...asked, messages: [...system, ...nodes.map(({ role, content }) => ({ role, content }))], logprobs: true, top_logprobs: 6 }];
  let first = 0, frame = 0, saved = performance.now(), fresh = [], cache = null;
  const draw = () => {
    frame = 0;
    if (talk !== mine) return;
    const near = $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 90;
    const shown = $("messages").querySelector(`[data-id="${CSS.escape(node.id)}"] .body`);
    if (shown && talk.form === "text") shown.textContent = node.content;
    else if (shown) show(shown, node.content);
    $("rate").textContent = stats(node.stats);
    if (followed === node) { view.push(fresh); view.fill(cache ?? node.cache); }
    fresh = [];
    if (near) $("scroll").scrollTop = $("scroll").scrollHeight;
  };
  try {
    for await (const event of events(route, body, now.abort.signal)) {
      if (event.cache) node.cache = cache = event.cache;
      for (const choice of event.choices) {
        node.content += choice.text ?? choice.delta.content ?? "";
        for (const token of tokensOf(choice)) {
          first ||= performance.now();
          const seen = { ...token, text: decoder.decode(new Uint8Array(token.bytes), { stream: true }) };
          node.tokens.push(seen);
          fresh.push(seen);
          node.stats = { tokens: node.stats.tokens + 1, seconds: (performance.now() - first) / 1000 };
        }
      }
      frame ||= requestAnimationFrame(draw);
      if (performance.now() - saved > 2000) { saved = performance.now(); save(talks); }
    }
    announce(`The reply is complete: ${node.stats.tokens} tokens.`);
  } catch (error) {
    if (error.name !== "AbortError") problem(`${error.message}`);
    announce(error.name === "AbortError" ? "Stopped." : "The reply failed.");
  }
  cancelAnimationFrame(frame);
  draw();
  if (writing === now) writing = null;
  if (!node.content && !node.tokens.length && mine.nodes[node.id]) {
    drop(mine, node);
    if (mine.leaf === node.id) mine.leaf = tip(mine, parent).id;  // what stood here before, if anything did
  }
  keepView(node);
  if (talk === mine) { render(); keep(); } else save(talks);
}

function stop() {
  writing?.abort.abort();
  writing = null;
  controls();
}

// Small things

function controls() {
  $("send").hidden = Boolean(writing);
  $("stop").hidden = !writing;
  $("send").textContent = talk?.form === "text" ? (talk.leaf && !$("say").value.trim() ? "Go on" : "Write") : "Send";
  if (!writing) $("rate").textContent = "";
}

function follow(node) {
  followed = node ?? null;
  if (view.node !== followed || !followed) view.show(followed);
  for (const item of $("messages").children) item.classList.toggle("followed", item.dataset.id === followed?.id);
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text ?? "";
}

function announce(text) {
  $("status").textContent = text;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function panel(which) {
  $("panel").hidden = !which;
  $("settings").hidden = which !== "settings";
  $("view").hidden = which !== "view";
  $("panel-title").textContent = which === "settings" ? "Settings" : "Model view";
  $("settings-open").setAttribute("aria-expanded", String(which === "settings"));
  $("view-open").setAttribute("aria-expanded", String(which === "view"));
  document.body.classList.toggle("with-panel", Boolean(which));
  if (options.panel !== which) stored(Object.assign(options, { panel: which }));
  if (which === "view" && view) view.show(followed);
}

function theme() {
  document.documentElement.dataset.theme = options.theme;
  const name = { auto: "Auto", light: "Light", dark: "Dark" }[options.theme] ?? "Auto";
  $("theme").textContent = name;
  $("theme").setAttribute("aria-label", `Colours: ${name}`);
}

async function bring(file) {
  try {
    const found = imported(JSON.parse(await file.text()));
    const ids = new Set(found.map((one) => one.id));
    talks = [...talks.filter((one) => !ids.has(one.id)), ...found];
    if (found.length) open(found[0]);
    keep();
  } catch (error) {
    problem(`${file.name}: ${error instanceof SyntaxError ? "no JSON" : error.message}`);
  }
}

function give() {
  const file = new Blob([JSON.stringify(exported(talk), null, 2)], { type: "application/json" });
  const anchor = make("a", { href: URL.createObjectURL(file), download: `${(talk.title || "conversation").replace(/[^\w -]+/g, "").slice(0, 40)}.json` });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); if (card) send($("say").value); });
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); }
});
$("say").addEventListener("input", () => { grow($("say")); controls(); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.target.closest(".edit")) return;
  if (document.body.classList.contains("side")) document.body.classList.remove("side");
  else if (!wide.matches && !$("panel").hidden) panel(null);
  else if (writing) stop();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => { if (card) { open(talks.find((one) => !one.leaf) ?? conversation(card.maestrale.chats ? "chat" : "text")); $("say").focus(); } });
$("export").addEventListener("click", () => talk?.leaf && give());
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { if ($("file").files[0]) bring($("file").files[0]); $("file").value = ""; });
$("theme").addEventListener("click", () => { options.theme = { auto: "light", light: "dark" }[options.theme] ?? "auto"; stored(options); theme(); });
$("settings-open").addEventListener("click", () => panel($("settings").hidden || $("panel").hidden ? "settings" : null));
$("view-open").addEventListener("click", () => panel($("view").hidden || $("panel").hidden ? "view" : null));
$("panel-close").addEventListener("click", () => panel(null));
$("side-open").addEventListener("click", () => document.body.classList.add("side"));
$("side-close").addEventListener("click", () => document.body.classList.remove("side"));
addEventListener("pagehide", () => save(talks));

begin();
