// Markdown to DOM nodes. Text only ever becomes text: nothing here parses HTML, and a link leads to the web or nowhere.
// Every pattern is bounded, so that no message, however odd, costs more than its length.

const SAFE = /^(https?:\/\/|mailto:)/i;
const DEEP = 8; // of what stands within each other
const SPAN = 1000; // the longest emphasis or link text, in characters

const INLINE = new RegExp(
  [
    "(`{1,3})([^\\n]{1,LONG}?)\\1(?!`)",
    "\\*\\*(?=\\S)([^]{1,LONG}?)\\*\\*(?!\\*)",
    "(?<![\\w])__(?=\\S)([^]{1,LONG}?)__(?![\\w])",
    "\\*(?=[^\\s*])([^*]{1,LONG}?)\\*",
    "(?<![\\w])_(?=[^\\s_])([^_]{1,LONG}?)_(?![\\w])",
    "~~(?=\\S)([^~]{1,LONG}?)~~",
    "!?\\[([^\\[\\]]{0,LONG})\\]\\(\\s{0,4}<?([^()\\s<>]{0,LONG})>?[^()]{0,200}\\)",
    "<(https?:\\/\\/[^\\s<>]{1,LONG})>",
    "(https?:\\/\\/[^\\s<>()\\[\\]\"'`]{1,LONG})",
    "\\\\([!-/:-@\\[-`{-~])",
    "( {2,9}\\n|\\\\\\n)",
  ].join("|").replaceAll("LONG", String(SPAN)),
  "g",
);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function link(address, ...children) {
  if (!SAFE.test(address)) return children;
  return [make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children)];
}

export function inline(text, depth = 0) {
  const nodes = [];
  let from = 0;
  if (depth < DEEP) {
    for (const m of text.matchAll(INLINE)) {
      if (m.index > from) nodes.push(text.slice(from, m.index));
      from = m.index + m[0].length;
      const [, , code, strong, strong2, em, em2, strike, label, target, angled, bare, escaped, newline] = m;
      if (code !== undefined) nodes.push(make("code", { text: code.replace(/^ (.*) $/, "$1") }));
      else if (strong ?? strong2) nodes.push(make("strong", {}, ...inline(strong ?? strong2, depth + 1)));
      else if (em ?? em2) nodes.push(make("em", {}, ...inline(em ?? em2, depth + 1)));
      else if (strike) nodes.push(make("del", {}, ...inline(strike, depth + 1)));
      else if (target !== undefined) nodes.push(...link(target, ...inline(label || target, depth + 1)));
      else if (angled) nodes.push(...link(angled, angled));
      else if (bare) {
        const address = bare.replace(/[.,;:!?]+$/, "");
        nodes.push(...link(address, address), bare.slice(address.length));
      } else if (newline) nodes.push(make("br"));
      else nodes.push(escaped);
    }
  }
  nodes.push(text.slice(from));
  return nodes.filter((node) => node !== "");
}

// Blocks

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const TABLE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const BREAK = /^ {0,3}([-*_])( *\1){2,}\s*$/;

// The top-level blocks of a text, as strings: a block that is finished never changes as the text grows.
export function blocks(text) {
  const found = [];
  let lines = [], fence = null, inList = false;
  const end = () => {
    if (lines.length) found.push(lines.join("\n"));
    lines = [];
    inList = false;
  };
  for (const line of text.split("\n")) {
    if (fence) {
      lines.push(line);
      if (line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "")) {
        fence = null;
        if (!inList) end();
      }
      continue;
    }
    const opened = line.match(FENCE);
    if (opened) {
      if (!(inList && /^\s/.test(line))) end();
      fence = opened[1];
      lines.push(line);
    } else if (!line.trim()) {
      if (inList) lines.push(line);
      else end();
    } else if (inList && (ITEM.test(line) || /^\s{2,}/.test(line))) lines.push(line);
    else {
      const starts = ITEM.test(line) && !BREAK.test(line);
      const afterGap = lines.length && !lines.at(-1).trim();
      if (starts || afterGap || /^ {0,3}#{1,6}\s/.test(line) || BREAK.test(line)) end();
      lines.push(line);
      if (starts) inList = true;
      else if (/^ {0,3}#{1,6}\s/.test(line) || BREAK.test(line)) end();
    }
  }
  end();
  return found;
}

function block(source, depth = 0) {
  const lines = source.split("\n");
  const fence = lines[0].match(FENCE);
  if (fence) {
    const last = lines.at(-1).trim();
    const closed = lines.length > 1 && last.startsWith(fence[1]) && !last.replaceAll(fence[1][0], "");
    return codeBlock(lines.slice(1, closed ? -1 : undefined).join("\n"), fence[2]);
  }
  const heading = source.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/);
  if (heading) return make(`h${Math.min(heading[1].length + 2, 6)}`, {}, ...inline(heading[2]));
  if (BREAK.test(source)) return make("hr");
  if (ITEM.test(lines[0]) && depth < DEEP) return list(lines, depth);
  if (/^ {0,3}>/.test(lines[0]) && depth < DEEP) {
    const inner = lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n");
    return make("blockquote", {}, ...blocks(inner).map((part) => block(part, depth + 1)));
  }
  if (lines.length > 1 && lines[0].includes("|") && TABLE.test(lines[1])) return table(lines);
  return make("p", {}, ...inline(source.trim()));
}

function codeBlock(code, language) {
  const copy = make("button", { class: "copy", type: "button", text: "Copy" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(code);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const head = make("div", { class: "code-head" }, make("span", { text: language || "code" }), copy);
  return make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, make("code", { text: code })));
}

function list(lines, depth) {
  const first = lines[0].match(ITEM);
  const ordered = /\d/.test(first[2]);
  const node = make(ordered ? "ol" : "ul", ordered ? { start: String(parseInt(first[2], 10)) } : {});
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= first[1].length + 1) items.push({ indent: item[0].length, lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(line.replace(new RegExp(`^ {0,${Math.max(items.at(-1).indent, 2)}}`), ""));
  }
  for (const { lines: inside } of items) {
    const nodes = blocks(inside.join("\n")).map((part) => block(part, depth + 1));
    if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
    node.append(make("li", {}, ...nodes));
  }
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const sides = cells(lines[1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : ""));
  const row = (line, tag) =>
    make("tr", {}, ...cells(line).map((cell, i) => make(tag, { class: sides[i] || false }, ...inline(cell))));
  const body = make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return make("div", { class: "table" }, make("table", {}, make("thead", {}, row(lines[0], "th")), body));
}

// Shows `text` in `element`; blocks that are the same as before keep their nodes, so that a selection survives.
export function show(element, text) {
  const sources = blocks(text);
  const shown = element.shownBlocks ?? [];
  let same = 0;
  while (same < shown.length && same < sources.length && shown[same] === sources[same]) same++;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...sources.slice(same).map((source) => block(source)));
  element.shownBlocks = sources;
}
