// The chat page: its state, its requests, and what its controls do.

import { ApiError, listModels, streamChat } from "./api.js";
import { setUpSettings, setUpTheme } from "./settings.js";
import { TurnView, addChunk, emptyAnswer, isAnswered, newTurn } from "./turn.js";

const MAX_RETRIES = 4; // of a request that the server refuses because it is busy; the waits double
const AT_END = 48; // pixels: this close to the end, the page follows the answer

const $ = (id) => document.getElementById(id);
const [composer, message, conversation] = [$("composer"), $("message"), $("conversation")];

const turns = [];
const views = new Map(); // turn -> TurnView
let models = [];
let controller = null; // of the request that runs
let edited = null; // the turn whose message is edited
let draft = ""; // what was typed before editing
let isFollowing = true; // the end of the page
let lastScroll = 0;
const settings = setUpSettings();

// Requests

async function loadModels() {
  models = await listModels(sessionStorage.getItem("jaxlm.key"));
  $("model-name").textContent = models.length === 1 ? shortName(models[0]) : "jaxlm";
  $("model-name").classList.toggle("visually-hidden", models.length > 1); // the list has their names
  $("model-name").title = models.length === 1 ? models[0] : "";
  document.title = `${$("model-name").textContent} · jaxlm`;
  $("model-select").hidden = models.length < 2;
  $("model-select").replaceChildren(...models.map((name) => new Option(shortName(name), name)));
  const chosen = sessionStorage.getItem("jaxlm.model");
  if (models.includes(chosen)) $("model-select").value = chosen;
}

// A name of the hub as it is, the end of a path.
function shortName(name) {
  return name.split("/").slice(-2).join("/");
}

function messagesUpTo(turn) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const each of turns.slice(0, turns.indexOf(turn)).filter(isAnswered)) {
    messages.push({ role: "user", content: each.user }, { role: "assistant", content: each.content });
  }
  return [...messages, { role: "user", content: turn.user }];
}

// Answers the last turn.
async function answer() {
  const turn = turns.at(-1);
  Object.assign(turn, emptyAnswer());
  views.get(turn).draw();
  controller = new AbortController();
  const { signal } = controller;
  showState("The model is answering.");
  follow();
  try {
    await streamWithRetries(turn, signal);
    turn.status = "done";
  } catch (error) {
    if (!signal.aborted && !(error instanceof ApiError)) throw error;
    turn.status = signal.aborted ? "stopped" : "failed";
    turn.error = signal.aborted ? null : error.message;
    if (error.status === 401) askForKey();
  } finally {
    turn.wait = null;
    controller = null;
    views.get(turn)?.draw(); // absent after New chat
    showState({ done: "The answer is complete.", stopped: "The answer was stopped." }[turn.status] ?? "");
    keepFollowing();
    save();
  }
}

async function streamWithRetries(turn, signal) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await stream(turn, signal);
    } catch (error) {
      if (error.status !== 429 || attempt === MAX_RETRIES) throw error;
      await wait(turn, error, error.retryAfter * 2 ** attempt, signal);
    }
  }
}

async function stream(turn, signal) {
  const key = sessionStorage.getItem("jaxlm.key");
  if (!models.length) await loadModels();
  const body = { model: $("model-select").value, messages: messagesUpTo(turn), ...settings.sampling };
  const start = performance.now();
  for await (const chunk of streamChat(body, key, signal)) {
    addChunk(turn, chunk, (performance.now() - start) / 1000);
    views.get(turn)?.schedule(keepFollowing);
  }
}

// Stop ends it.
async function wait(turn, error, seconds, signal) {
  turn.wait = `The server is busy: ${error.message}. Trying again in ${seconds} s.`;
  views.get(turn)?.draw();
  keepFollowing();
  await new Promise((resolve) => {
    setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", resolve);
  });
  signal.throwIfAborted();
  turn.wait = null;
  views.get(turn)?.draw();
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

async function useKey() {
  sessionStorage.setItem("jaxlm.key", $("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  message.focus();
  if (turns.at(-1)?.status === "failed") await answer();
  else await start();
}

// The names of the models, when the page opens.
async function start() {
  try {
    await loadModels();
    showNotice("");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) askForKey();
    else showNotice(error.message);
  }
}

// Turns

function addTurn(turn) {
  const view = new TurnView(turn, {
    edit: () => edit(turn),
    retry: answer,
    regenerate: answer,
  });
  turns.push(turn);
  views.set(turn, view);
  conversation.append(view.root);
  $("welcome").hidden = true;
  view.draw();
}

function removeFrom(index) {
  for (const turn of turns.splice(index)) {
    views.get(turn).root.remove();
    views.delete(turn);
  }
  $("welcome").hidden = turns.length > 0;
}

async function send() {
  const text = message.value.trim();
  if (!text || controller) return;
  if (edited) removeFrom(turns.indexOf(edited));
  endEdit("");
  addTurn(newTurn(text));
  isFollowing = true;
  save();
  await answer();
}

function edit(turn) {
  stop();
  if (!edited) draft = message.value;
  views.get(edited)?.root.classList.remove("edited");
  edited = turn;
  views.get(turn).root.classList.add("edited");
  $("edit-notice").hidden = false;
  setMessage(turn.user);
}

function endEdit(text) {
  views.get(edited)?.root.classList.remove("edited");
  edited = null;
  $("edit-notice").hidden = true;
  setMessage(text);
}

function newChat() {
  stop();
  if (edited) endEdit(draft);
  removeFrom(0);
  save();
  message.focus();
}

function stop() {
  controller?.abort();
}

// A reload keeps the chat: in this tab, until it is closed.
function save() {
  const text = JSON.stringify(turns.map((turn) => (isBusy(turn) ? { ...turn, status: "stopped", wait: null } : turn)));
  try {
    sessionStorage.setItem("jaxlm.turns", text);
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    showNotice("This chat is too long to be kept when the page is reloaded: copy what you need.");
  }
}

function isBusy(turn) {
  return turn.status === "waiting" || turn.status === "streaming";
}

// The page

function setMessage(text) {
  message.value = text;
  message.focus();
  fitMessage();
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
  $("send").disabled = !controller && !message.value.trim();
}

// The button, and what screen readers say. While an answer runs, the button stops it.
function showState(text) {
  const name = controller ? "Stop" : "Send";
  $("send").setAttribute("aria-label", name);
  $("send").title = name;
  $("send").querySelector("use").setAttribute("href", controller ? "#icon-stop" : "#icon-send");
  conversation.setAttribute("aria-busy", String(controller !== null));
  document.body.classList.toggle("busy", controller !== null);
  $("status").textContent = text;
  fitMessage();
}

function showNotice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function follow() {
  isFollowing = true;
  keepFollowing();
}

function keepFollowing() {
  if (isFollowing) window.scrollTo(0, document.documentElement.scrollHeight);
  updateScroll();
}

// Scrolling up ends following, scrolling to the end begins it again.
function updateScroll() {
  const distance = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  isFollowing = distance < AT_END || (isFollowing && window.scrollY >= lastScroll);
  lastScroll = window.scrollY;
  $("to-end").hidden = isFollowing || distance < AT_END;
}

// The Clipboard API needs a secure context, which plain HTTP from another machine is not.
async function copy(button, text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  $("status").textContent = "Copied.";
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1500);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (controller) stop();
  else send();
});
$("send").addEventListener("click", (event) => {
  if (event.detail > 1) event.preventDefault(); // the second click of a double click would stop the answer
});
message.addEventListener("input", fitMessage);
message.addEventListener("keydown", (event) => {
  const isComposing = event.isComposing || event.keyCode === 229; // Enter chooses a word of an input method
  if (event.key !== "Enter" || event.shiftKey || isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || $("settings").open) return;
  if (controller) stop();
  else if (edited) endEdit(draft);
});
conversation.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.matches(".copy-code")) copy(button, button.closest(".code").querySelector("code").textContent);
  const turn = turns.find((each) => views.get(each).root.contains(button));
  if (button?.matches(".copy")) copy(button, turn.content);
});
$("examples").addEventListener("click", (event) => {
  if (event.target.matches("button")) setMessage(event.target.textContent);
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
$("model-select").addEventListener("change", () => sessionStorage.setItem("jaxlm.model", $("model-select").value));
$("new-chat").addEventListener("click", newChat);
$("cancel-edit").addEventListener("click", () => endEdit(draft));
$("to-end").addEventListener("click", follow);
window.addEventListener("scroll", updateScroll, { passive: true });
window.addEventListener("pagehide", () => {
  stop(); // else the request would fail as if the connection was lost
  save();
});

setUpTheme();
for (const turn of JSON.parse(sessionStorage.getItem("jaxlm.turns") ?? "[]")) addTurn(turn);
fitMessage();
follow();
if (matchMedia("(hover: hover)").matches) message.focus(); // elsewhere, it would open the keyboard
start();
