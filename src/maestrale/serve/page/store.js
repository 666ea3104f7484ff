// Conversations, kept in this browser. Each is a tree: an edited message or a second reply is a branch beside the first.

import { forgetViews } from "./views.js";

const KEY = "maestrale.conversations", SETTINGS = "maestrale.settings";
const ROLES = ["user", "assistant"];

export const id = () => crypto.randomUUID?.() ?? String(Math.random()).slice(2) + Date.now();

export function conversation(form) {
  return { id: id(), form, title: "", system: "", nodes: Object.create(null), leaf: null, changed: Date.now() };
}

export function add(talk, parent, role, content) {
  const node = { id: id(), parent, role, content };
  talk.nodes[node.id] = node;
  talk.leaf = node.id;
  return node;
}

// The messages from the first to the one that is shown last.
export function path(talk, leaf = talk.leaf) {
  const found = [];
  for (let node = talk.nodes[leaf]; node; node = talk.nodes[node.parent]) found.unshift(node);
  return found;
}

export function siblings(talk, node) {
  return Object.values(talk.nodes).filter((other) => other.parent === node.parent && other.role === node.role);
}

// The newest end of the branch that `node` begins.
export function tip(talk, node) {
  const children = Object.values(talk.nodes).filter((other) => other.parent === node.id);
  return children.length ? tip(talk, children.at(-1)) : node;
}

export function drop(talk, node) {
  for (const other of Object.values(talk.nodes)) if (other.parent === node.id) drop(talk, other);
  delete talk.nodes[node.id];
}

// What is kept and exported of a conversation; `messages`, the branch that is shown, is what `maestrale chat` loads.
const kept = ({ id, form, title, system, nodes, leaf, changed }) => ({
  id, form, title, system, leaf, changed,
  nodes: Object.fromEntries(
    Object.values(nodes).map((n) => [n.id, { id: n.id, parent: n.parent, role: n.role, content: n.content, stats: n.stats }]),
  ),
});

export function save(talks) {
  const text = JSON.stringify(talks.filter((talk) => talk.leaf).map(kept));
  for (const last of [false, true]) {
    try {
      localStorage.setItem(KEY, text);
      return true;
    } catch {
      if (!last) forgetViews(); // the browser's room is full, or it keeps nothing
    }
  }
  return false;
}

export function load() {
  try {
    return read(JSON.parse(localStorage.getItem(KEY) ?? "[]"));
  } catch {
    return [];
  }
}

export function exported(talk) {
  const messages = path(talk).map(({ role, content }) => ({ role, content }));
  if (talk.system) messages.unshift({ role: "system", content: talk.system });
  const text = talk.form === "text" ? { text: path(talk).map((node) => node.content).join("") } : {};
  return { ...text, messages, maestrale: [kept(talk)] };
}

// From a file: one that was exported here, or {"messages": […]} or {"text": …} as `maestrale chat` saves it.
export function imported(content) {
  if (Array.isArray(content?.maestrale)) return read(content.maestrale);
  const talk = conversation(typeof content?.text === "string" ? "text" : "chat");
  const said = talk.form === "text" ? [{ role: "user", content: content.text }] : content?.messages;
  if (!Array.isArray(said)) throw new Error("it holds no conversation");
  for (const { role, content } of said) {
    if (typeof content !== "string") throw new Error("a message is no text");
    if (role === "system" || role === "developer") talk.system = content;
    else if (ROLES.includes(role)) add(talk, talk.leaf, role, content);
    else throw new Error(`a message's role is ${String(role).slice(0, 40)}`);
  }
  talk.title = titleOf(talk);
  return [talk];
}

export function titleOf(talk) {
  const first = path(talk).find((node) => node.content.trim());
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 60) : "";
}

// Whatever a file or the browser's store holds, checked: what comes out has the form that this page relies on.
function read(talks) {
  if (!Array.isArray(talks)) throw new Error("it holds no conversations");
  return talks.map((talk) => {
    const made = conversation(talk.form === "text" ? "text" : "chat");
    const said = Object.values(talk.nodes ?? {});
    for (const node of said) {
      if (typeof node.id !== "string" || typeof node.content !== "string" || !ROLES.includes(node.role))
        throw new Error("a message is damaged");
      const rate = { tokens: Number(node.stats?.tokens) || 0, seconds: Number(node.stats?.seconds) || 0 };
      made.nodes[node.id] = { id: node.id, parent: node.parent ?? null, role: node.role, content: node.content, stats: rate };
    }
    const order = new Set();
    for (let node = made.nodes[talk.leaf]; node; node = made.nodes[node.parent]) {
      if (order.has(node.id)) throw new Error("its messages go round in a circle");
      order.add(node.id);
    }
    made.leaf = made.nodes[talk.leaf] ? talk.leaf : null;
    made.id = typeof talk.id === "string" ? talk.id : made.id;
    made.title = String(talk.title ?? "").slice(0, 200);
    made.system = String(talk.system ?? "");
    made.changed = Number(talk.changed) || Date.now();
    return made;
  });
}

export function settings(value) {
  try {
    if (value) localStorage.setItem(SETTINGS, JSON.stringify(value));
    return JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
  } catch {
    return value ?? {};
  }
}
