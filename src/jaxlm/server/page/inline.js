// The inline part of Markdown: code, bold, italic, strikethrough, links and line breaks, as DOM nodes. Emphasis follows
// the algorithm of CommonMark (https://spec.commonmark.org/0.31.2/#phase-2-inline-structure). The time is linear.

const MAX_DEPTH = 16; // of nested elements: browsers lay out nested elements recursively
const SAFE = new Set(["http:", "https:", "mailto:"]);
const PLAIN = /[^\\`*_~[\]!<h\n]+/y;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const TICKS = /`+/y;
const DELIMITER = /\*+|_+|~+/y;
const BARE_URL = /https?:\/\/[^\s<>"`]{1,2000}/y;
const IN_BRACKETS = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const DESTINATION = /\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))?\s*\)/y;
const SPACE = /^\s?$/u; // also the beginning and the end
const PUNCTUATION = /[\p{P}\p{S}]/u;

export function renderInline(text, depth = 0) {
  const parts = scan(text, depth);
  pairDelimiters(parts);
  return parts.map((part) => part.node ?? document.createTextNode(part.text));
}

// Text -> parts: {text}, {node}, or {text, mark, count, opens, closes, width} for a run of * _ or ~.
function scan(text, depth) {
  const parts = [];
  const brackets = matchBrackets(text);
  const missing = new Set(); // lengths of backtick runs that occur no more
  const add = (string) => {
    if (parts.at(-1)?.isPlain) parts.at(-1).text += string;
    else parts.push({ text: string, isPlain: true });
  };
  const match = (pattern, at) => {
    pattern.lastIndex = at;
    return pattern.exec(text);
  };
  for (let i = 0; i < text.length; ) {
    const found = match(PLAIN, i) ?? match(ESCAPED, i);
    if (found) {
      add(found[1] ?? found[0]);
      i += found[0].length;
      continue;
    }
    const part = codeAt(text, i, match, missing) ?? linkAt(text, i, match, brackets, depth) ?? runAt(text, i, match);
    if (part) parts.push(part);
    else if (text[i] === "\n") parts.push({ node: document.createElement("br"), length: 1 });
    else add(text[i]);
    i += part?.length ?? 1;
    if (text[i - 1] === "`" && !part) i = addTicks(text, i, add); // a run without an end is text as a whole
  }
  return parts;
}

function addTicks(text, i, add) {
  let end = i;
  while (text[end] === "`") end += 1;
  add(text.slice(i, end));
  return end;
}

function codeAt(text, i, match, missing) {
  const ticks = match(TICKS, i)?.[0];
  if (!ticks || missing.has(ticks.length)) return null;
  for (let at = i + ticks.length; (at = text.indexOf(ticks, at)) >= 0; ) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === ticks.length) {
      let code = text.slice(i + ticks.length, at).replaceAll("\n", " ");
      if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
      return { node: wrap("code", [document.createTextNode(code)]), length: end - i };
    }
    at = end;
  }
  missing.add(ticks.length);
  return null;
}

function linkAt(text, i, match, brackets, depth) {
  const bare = match(BARE_URL, i)?.[0] ?? "";
  if (bare && !/\w/.test(text[i - 1] ?? "")) {
    const url = trimUrl(bare);
    return linkOf(url, [document.createTextNode(url)], url.length);
  }
  const inside = match(IN_BRACKETS, i);
  if (inside) return linkOf(inside[1], [document.createTextNode(inside[1])], inside[0].length);
  const start = text[i] === "!" ? i + 1 : i; // an image is a link: nothing is loaded from other hosts
  const end = text[start] === "[" ? brackets.get(start) : undefined;
  if (end === undefined || depth >= MAX_DEPTH) return null;
  const target = match(DESTINATION, end + 1);
  if (!target) return null;
  const url = (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  const label = text.slice(start + 1, end) || url;
  return linkOf(url, renderInline(label, depth + 1), end + 1 - i + target[0].length);
}

// A link, or null if following it could do anything but open a page or a mail.
function linkOf(url, children, length) {
  if (!URL.canParse(url) || !SAFE.has(new URL(url).protocol)) return null;
  const link = wrap("a", children);
  for (const inner of link.querySelectorAll("a")) inner.replaceWith(...inner.childNodes); // the outermost link counts
  link.href = url;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return { node: link, length };
}

// A URL in a sentence ends before the punctuation that follows it.
function trimUrl(url) {
  let end = url.length;
  while (/[.,;:!?'"*_~\])}]/.test(url[end - 1])) {
    if (url[end - 1] === ")" && url.slice(0, end).split("(").length >= url.slice(0, end).split(")").length) break;
    end -= 1;
  }
  return url.slice(0, end);
}

// Index of [ -> index of its ], outside of code.
function matchBrackets(text) {
  const found = new Map();
  const open = [];
  for (const { 0: token, index } of text.matchAll(/\\[^\n]|(?<!`)(`+)(?!`)[^`]*(?<!`)\1(?!`)|[[\]]/g)) {
    if (token === "[") open.push(index);
    else if (token === "]" && open.length) found.set(open.pop(), index);
  }
  return found;
}

function runAt(text, i, match) {
  const run = match(DELIMITER, i)?.[0];
  if (!run) return null;
  const before = [...text.slice(Math.max(0, i - 2), i)].at(-1) ?? "";
  const after = String.fromCodePoint(text.codePointAt(i + run.length) ?? 32);
  const [spaceBefore, spaceAfter] = [SPACE.test(before), SPACE.test(after)];
  const [signBefore, signAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  const isUnderscore = run[0] === "_"; // not inside of words
  const isTilde = run[0] === "~";
  return {
    text: run,
    mark: run[0],
    count: run.length,
    width: run.length,
    opens: left && (!isUnderscore || !right || signBefore) && (!isTilde || run.length === 2),
    closes: right && (!isUnderscore || !left || signAfter) && (!isTilde || run.length === 2),
    length: run.length,
  };
}

// Replaces pairs of runs, and what is between them, by <em>, <strong> and <del>. A stack of runs that may open.
function pairDelimiters(parts) {
  const out = [];
  const openers = []; // indices into out
  const bottoms = new Map(); // where the search for an opener of a kind ends: none is further down
  for (const part of parts) {
    if (part.closes) closeAll(part, out, openers, bottoms);
    if (!part.mark || part.count) out.push(part);
    if (part.opens && part.count) openers.push(out.length - 1);
  }
  for (const part of out) if (part.mark) part.text = part.mark.repeat(part.count);
  parts.splice(0, parts.length, ...out);
}

function closeAll(closer, out, openers, bottoms) {
  while (closer.count) {
    const kind = `${closer.mark}${closer.opens}${closer.width % 3}`;
    let at = openers.length - 1;
    while (at >= (bottoms.get(kind) ?? 0) && !pairs(out[openers[at]], closer)) at -= 1;
    if (at < (bottoms.get(kind) ?? 0)) {
      bottoms.set(kind, openers.length);
      return;
    }
    const index = openers[at];
    const opener = out[index];
    const level = 1 + out.slice(index + 1).reduce((most, part) => Math.max(most, part.level ?? 0), 0);
    if (level > MAX_DEPTH) {
      openers.length = 0; // what is around it would be deeper
      return;
    }
    const size = opener.count >= 2 && closer.count >= 2 ? 2 : 1;
    const inner = out.splice(index + 1).map((part) => part.node ?? document.createTextNode(plain(part)));
    const tag = closer.mark === "~" ? "del" : size === 2 ? "strong" : "em";
    opener.count -= size;
    closer.count -= size;
    openers.length = opener.count ? at + 1 : at;
    if (!opener.count) out.pop();
    out.push({ node: wrap(tag, inner), level });
    for (const [key, bottom] of bottoms) bottoms.set(key, Math.min(bottom, openers.length));
  }
}

function pairs(opener, closer) {
  if (opener.mark !== closer.mark) return false;
  const isAmbiguous = opener.closes || closer.opens; // "rule of 3"
  return !isAmbiguous || (opener.width + closer.width) % 3 !== 0 || (opener.width % 3 === 0 && closer.width % 3 === 0);
}

function plain(part) {
  return part.mark ? part.mark.repeat(part.count) : part.text;
}

function wrap(tag, children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}
