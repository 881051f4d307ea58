// Markdown as DOM nodes: the blocks of CommonMark that models write, and tables. Text never becomes markup: HTML in it
// stays text. A line break is kept.

import { renderInline } from "./inline.js";

const MAX_DEPTH = 16; // of lists and quotes: deeper ones are plain text, so that no text exhausts the stack
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])(?:( {1,4})(?! )|( )|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const rendered = new WeakMap(); // container -> the sources of its blocks

// Shows a text that grows: blocks that have not changed stay, so that a selection in them survives.
export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.replaceAll("\t", "    ").split("\n"));
  const sources = blocks.map((block) => block.lines.join("\n"));
  const before = rendered.get(container) ?? [];
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => renderBlock(block, 0)));
  rendered.set(container, sources);
}

// Lines -> [{kind, lines}]
function splitBlocks(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const kind = kindOf(lines, i);
    const end = endOf(kind, lines, i);
    blocks.push({ kind, lines: lines.slice(i, end) });
    i = end;
  }
  return blocks;
}

function kindOf(lines, i) {
  const line = lines[i];
  if (line.startsWith("    ")) return "indented";
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && i + 1 < lines.length && isTable(line, lines[i + 1])) return "table";
  return "paragraph";
}

function isTable(line, next) {
  return next.includes("-") && DELIMITERS.test(next) && cellsOf(line).length === cellsOf(next).length;
}

// Whether a line ends the paragraph before it.
function interrupts(lines, i) {
  const kind = kindOf(lines, i);
  if (kind !== "list") return kind !== "paragraph" && kind !== "indented";
  const [marker, , , number] = ITEM.exec(lines[i]);
  return lines[i].length > marker.length && (number === undefined || number === "1");
}

// The index after the last line of the block that begins at line i.
function endOf(kind, lines, i) {
  let end = i + 1;
  if (kind === "fence") {
    const fence = FENCE.exec(lines[i])[1];
    while (end < lines.length && !closes(lines[end], fence)) end += 1;
    return Math.min(end + 1, lines.length);
  }
  if (kind === "list") return endOfList(lines, i);
  if (kind === "heading" || kind === "rule") return end;
  const goesOn = {
    indented: (line) => line.startsWith("    ") || !line.trim(),
    quote: (line, at) => QUOTE.test(line) || (line.trim() && !interrupts(lines, at)),
    table: (line, at) => line.trim() && !interrupts(lines, at),
    paragraph: (line, at) => line.trim() && !interrupts(lines, at),
  }[kind];
  while (end < lines.length && goesOn(lines[end], end)) end += 1;
  while (!lines[end - 1].trim()) end -= 1;
  return end;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length) && !line.startsWith("    ");
}

function endOfList(lines, i) {
  const bullet = bulletOf(lines[i]);
  let width = widthOf(lines[i]);
  let end = i + 1;
  for (let at = i + 1; at < lines.length; at += 1) {
    const line = lines[at];
    if (!line.trim()) continue;
    const isInside = indentOf(line) >= width;
    const isItem = !isInside && ITEM.test(line) && !RULE.test(line) && bulletOf(line) === bullet;
    const isLazy = at === end && !isInside && !isItem && !interrupts(lines, at); // goes on with a paragraph
    if (!isInside && !isItem && !isLazy) break;
    if (isItem) width = widthOf(line);
    end = at + 1;
  }
  return end;
}

function bulletOf(line) {
  return ITEM.exec(line)[2].at(-1);
}

// Where the text of an item begins.
function widthOf(line) {
  const [, indent, marker, , spaces] = ITEM.exec(line);
  return indent.length + marker.length + (spaces?.length ?? 1);
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function renderBlock(block, depth) {
  const { kind, lines } = block;
  if (depth > MAX_DEPTH) return element("p", document.createTextNode(lines.join("\n")));
  if (kind === "fence" || kind === "indented") return renderCode(kind, lines);
  if (kind === "heading") return renderHeading(lines[0]);
  if (kind === "rule") return element("hr");
  if (kind === "list") return renderList(lines, depth);
  if (kind === "table") return renderTable(lines);
  if (kind === "quote") {
    const inner = lines.map((line) => line.replace(QUOTE, ""));
    return element("blockquote", ...splitBlocks(inner).map((each) => renderBlock(each, depth + 1)));
  }
  return element("p", ...renderInline(lines.map((line) => line.trimStart()).join("\n").trimEnd()));
}

// The page has headings of levels 1 and 2.
function renderHeading(line) {
  const [, marks, text] = HEADING.exec(line);
  const content = (text ?? "").trim().replace(/(^|[ \t])#+$/, "").trimEnd();
  return element(`h${Math.min(marks.length + 2, 6)}`, ...renderInline(content));
}

function renderCode(kind, lines) {
  let body = lines.map((line) => line.slice(4));
  let language = "";
  if (kind === "fence") {
    const [, fence, info] = FENCE.exec(lines[0]);
    const isClosed = lines.length > 1 && closes(lines.at(-1), fence);
    const indent = new RegExp(`^ {0,${indentOf(lines[0])}}`);
    body = lines.slice(1, isClosed ? -1 : undefined).map((line) => line.replace(indent, ""));
    language = info.trim().split(/\s/)[0];
  }
  const pre = element("pre", element("code", document.createTextNode(body.join("\n"))));
  pre.tabIndex = 0; // wide code is scrolled with the keyboard
  const copy = element("button", document.createTextNode("Copy"));
  copy.type = "button";
  copy.className = "copy-code";
  copy.setAttribute("aria-label", "Copy code");
  const name = element("span", document.createTextNode(language || "code"));
  const box = element("div", element("div", name, copy), pre);
  box.className = "code";
  return box;
}

function renderList(lines, depth) {
  const number = ITEM.exec(lines[0])[3];
  const list = element(number === undefined ? "ul" : "ol");
  if (number !== undefined && number !== "1") list.start = Number(number);
  const items = splitItems(lines);
  const blocks = items.map(splitBlocks);
  const isLoose = items.some((item, i) => {
    const isLast = i === items.length - 1;
    return (!isLast && item.length > 1 && !item.at(-1).trim()) || hasGap(item, blocks[i]);
  });
  for (const inner of blocks) {
    const nodes = inner.map((block) => renderBlock(block, depth + 1));
    list.append(element("li", ...(isLoose ? nodes : nodes.flatMap((n) => (n.tagName === "P" ? [...n.childNodes] : [n])))));
  }
  return list;
}

// The lines of each item, without its marker and indentation.
function splitItems(lines) {
  const items = [];
  let width = 0;
  for (const line of lines) {
    const isFirst = items.length === 0;
    if (isFirst || (ITEM.test(line) && indentOf(line) < width)) {
      width = widthOf(line);
      items.push([line.slice(width)]);
    } else {
      items.at(-1).push(line.slice(Math.min(width, indentOf(line))));
    }
  }
  return items;
}

// Whether a blank line is between two blocks of an item.
function hasGap(lines, blocks) {
  const used = blocks.reduce((sum, block) => sum + block.lines.length, 0);
  const blankAtEnd = lines.length - lines.findLastIndex((line) => line.trim()) - 1;
  return lines.length - blankAtEnd - used > 0 && blocks.length > 1;
}

function renderTable(lines) {
  const align = cellsOf(lines[1]).map((cell) => [cell.startsWith(":"), cell.endsWith(":")]);
  const row = (line, tag) => {
    const cells = cellsOf(line);
    const nodes = align.map(([left, right], i) => {
      const cell = element(tag, ...renderInline(cells[i] ?? ""));
      if (right) cell.className = left ? "center" : "right";
      return cell;
    });
    return element("tr", ...nodes);
  };
  const table = element("table", element("thead", row(lines[0], "th")));
  if (lines.length > 2) table.append(element("tbody", ...lines.slice(2).map((line) => row(line, "td"))));
  const box = element("div", table); // wide tables are scrolled
  box.className = "table";
  box.tabIndex = 0;
  return box;
}

// The cells of a line: | separates them, \| does not.
function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function element(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}
