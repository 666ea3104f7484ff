// How replies are drawn: the fields of a request, with the bounds that the server has for them.

import { make } from "./markdown.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: { chat: 0.7, text: 0.7 }, help: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: { chat: 0.95, text: 0.9 }, help: "draw from the likeliest tokens up to this share" },
  { name: "min_p", label: "Min p", min: 0, max: 0.5, step: 0.01, value: { chat: 0, text: 0 }, help: "leave out tokens less likely than this share of the likeliest" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: { chat: 1, text: 1.1 }, help: "above 1, tokens that stand already become less likely" },
  { name: "max_tokens", label: "Longest reply, in tokens", min: 1, max: 4096, step: 1, value: { chat: 1024, text: 160 }, number: true },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, value: {}, number: true, help: "the same seed draws the same text; empty is another one each time" },
];

// The sampling fields of a request.
export function sampling(options, form) {
  const chosen = options[form] ?? {};
  const found = FIELDS.map(({ name, value }) => [name, chosen[name] ?? value[form]]);
  if (chosen.stop) found.push(["stop", chosen.stop.split("\n").filter(Boolean)]);
  return Object.fromEntries(found.filter(([, value]) => value != null));
}

export function showSettings(root, { talk, options, card, changed }) {
  const chosen = (options[talk.form] ??= {});
  const set = (name, value) => {
    if (value == null) delete chosen[name];
    else chosen[name] = value;
    changed(false);
  };
  const form = make("select", { id: "form" }, make("option", { value: "chat", text: "Chat: messages in turns" }), make("option", { value: "text", text: "Story: one text, written in turns" }));
  form.value = talk.form;
  form.disabled = Boolean(talk.leaf);
  form.addEventListener("change", () => {
    talk.form = form.value;
    changed(true);
    showSettings(root, { talk, options, card, changed });
  });
  const system = make("textarea", { id: "system", rows: 4, placeholder: "You are …" });
  system.value = talk.system;
  system.addEventListener("input", () => { talk.system = system.value; changed(false); });
  const stop = make("textarea", { id: "stops", rows: 2, placeholder: "one a line" });
  stop.value = chosen.stop ?? "";
  stop.addEventListener("input", () => set("stop", stop.value || null));
  root.replaceChildren(
    setting("form", "Form", form, card.maestrale.chats ? "" : "this model has not learnt to chat"),
    ...(talk.form === "chat" ? [setting("system", "System prompt", system)] : []),
    ...FIELDS.map((field) => slider(field, chosen[field.name] ?? field.value[talk.form], (value) => set(field.name, value))),
    setting("stops", "Stop strings", stop),
    make("button", { class: "quiet", type: "button", text: "Back to the defaults", on: { click: () => { options[talk.form] = {}; changed(false); showSettings(root, { talk, options, card, changed }); } } }),
  );
}

function setting(id, label, input, help) {
  return make("div", { class: "setting" }, make("label", { for: id, text: label }), input, ...(help ? [make("small", { text: help })] : []));
}

function slider({ name, label, min, max, step, number, help }, value, set) {
  const input = make("input", { id: name, type: number ? "number" : "range", min, max, step, inputmode: number ? "numeric" : false });
  input.value = value ?? "";
  const shown = make("output", { for: name, text: number ? "" : value });
  input.addEventListener("input", () => {
    if (!input.validity.valid) return;
    const given = input.value === "" ? null : Number(input.value);
    if (!number) shown.textContent = given;
    set(given);
  });
  const row = setting(name, label, input, help);
  row.firstChild.append(shown);
  return row;
}
