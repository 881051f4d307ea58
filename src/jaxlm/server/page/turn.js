// One turn of the chat on the page: the message of the user, and the answer.

import { renderMarkdown } from "./markdown.js";

export function newTurn(user) {
  return { user, ...emptyAnswer() };
}

// status: waiting, streaming, done, stopped or failed. Times are in seconds.
export function emptyAnswer() {
  return {
    status: "waiting", content: "", reasoning: "", calls: [], error: null, wait: null, finishReason: null, tokens: null,
    firstToken: null, lastToken: null, thinking: null,
  };
}

// Whether the answer is part of the chat. A message that got no answer is not sent again.
export function isAnswered(turn) {
  return turn.status === "done" || Boolean(turn.content || turn.reasoning || turn.calls.length);
}

// Adds a chunk of the stream. seconds: since the request.
export function addChunk(turn, chunk, seconds) {
  if (chunk.usage) turn.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
  turn.status = "streaming";
  turn.firstToken ??= seconds;
  turn.lastToken = seconds;
  if (reasoning) turn.reasoning += reasoning;
  if (content) turn.content += content;
  if (turn.reasoning && turn.content) turn.thinking ??= seconds - turn.firstToken;
  for (const call of calls ?? []) {
    turn.calls[call.index] ??= { name: "", arguments: "" };
    turn.calls[call.index].name += call.function?.name ?? "";
    turn.calls[call.index].arguments += call.function?.arguments ?? "";
  }
  turn.finishReason = choice.finish_reason ?? turn.finishReason;
}

// The line below an answer.
export function statisticsOf(turn) {
  const parts = [];
  if (turn.tokens !== null) parts.push(turn.tokens === 1 ? "1 token" : `${turn.tokens.toLocaleString("en-US")} tokens`);
  const seconds = turn.lastToken - turn.firstToken;
  if (turn.tokens > 1 && seconds > 0) parts.push(`${((turn.tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (turn.firstToken !== null) parts.push(`first token after ${turn.firstToken.toFixed(2)} s`);
  if (turn.status === "stopped") parts.push("stopped");
  if (turn.finishReason === "length") parts.push("ended at the token limit");
  return parts.join(" · ");
}

// The elements of a turn. handlers: edit, retry, regenerate.
export class TurnView {
  constructor(turn, handlers) {
    this.turn = turn;
    this.root = document.getElementById("turn-template").content.firstElementChild.cloneNode(true);
    this.find(".user-text").textContent = turn.user;
    this.find(".edit").addEventListener("click", handlers.edit);
    this.find(".retry").addEventListener("click", handlers.retry);
    this.find(".regenerate").addEventListener("click", handlers.regenerate);
    this.frame = null;
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  // Draws at most once per frame, however fast chunks come.
  schedule(afterwards) {
    this.frame ??= requestAnimationFrame(() => {
      this.draw();
      afterwards();
    });
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const { turn } = this;
    const isBusy = turn.status === "waiting" || turn.status === "streaming";
    this.drawReasoning(isBusy);
    renderMarkdown(this.find(".markdown"), turn.content);
    this.find(".calls").replaceChildren(...turn.calls.map(callNode));
    this.find(".waiting").hidden = turn.status !== "waiting" || turn.wait !== null;
    this.find(".error").hidden = turn.error === null && turn.wait === null;
    this.find(".error p").textContent = turn.wait ?? turn.error ?? "";
    this.find(".retry").hidden = turn.error === null;
    this.find(".answer").setAttribute("aria-busy", String(isBusy));
    this.find(".foot").hidden = isBusy || (turn.status === "failed" && !isAnswered(turn));
    this.find(".copy").hidden = !turn.content;
    this.find(".statistics").textContent = isBusy ? "" : statisticsOf(turn);
  }

  drawReasoning(isBusy) {
    const { turn } = this;
    const isThinking = isBusy && !turn.content;
    const seconds = turn.thinking === null ? "" : ` for ${turn.thinking.toFixed(1)} s`;
    this.find(".reasoning").hidden = !turn.reasoning;
    this.find(".reasoning").classList.toggle("busy", isThinking);
    this.find(".reasoning summary").textContent = isThinking ? "Thinking…" : `Thought${seconds}`;
    this.find(".reasoning-text").textContent = turn.reasoning.trim();
  }
}

function callNode(call) {
  const box = document.createElement("div");
  const head = document.createElement("div");
  const pre = document.createElement("pre");
  box.className = "code";
  head.textContent = `Tool call: ${call.name}`;
  pre.textContent = call.arguments;
  pre.tabIndex = 0;
  box.append(head, pre);
  return box;
}
