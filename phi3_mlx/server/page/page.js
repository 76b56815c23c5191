// A chat with one of the server's models, or with two side by side. It asks nothing but this server.

import { Answer, make } from "./answer.js";
import { picture, size, total } from "./plan.js";

const $ = (id) => document.getElementById(id);
const sides = [];
let running = null; // an AbortController while answers are made
let ended = Promise.resolve(); // when they are

// ------------------------------------------------------------------------------------------------ the server

class Refused extends Error {}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  const fault = await response.json().catch(() => null);
  throw new Refused(fault?.error?.message ?? `the server answered ${response.status}`);
}

const asked = async (path) => (await ask(path)).json();

/** The values of a stream's data lines, up to [DONE]. */
async function* streamed(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (unread + value).split("\n");
    unread = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

// ------------------------------------------------------------------------------------------------ one side

class Side {
  constructor() {
    this.element = $("side").content.firstElementChild.cloneNode(true);
    this.name = this.find(".name");
    this.log = this.find(".messages");
    this.messages = [];
    this.length = 0; // tokens of the conversation so far
    this.name.onchange = () => this.drawPlan();
    this.find(".memory").ontoggle = () => this.drawPlan();
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** What the fields of this side say; an empty one leaves it to the server. */
  settings() {
    const fields = ["temperature", "top_p", "max_tokens", "seed"];
    const given = fields.map((field) => [field, this.find(`.${field}`).value]).filter(([, value]) => value !== "");
    return { model: this.name.value, ...Object.fromEntries(given.map(([field, value]) => [field, Number(value)])) };
  }

  addUser(text) {
    const place = this.messages.length;
    this.messages.push({ role: "user", content: text });
    const edit = make("button", { type: "button", textContent: "edit", onclick: () => editFrom(place) });
    const bubble = make("div", { className: "user" }, text, edit);
    bubble.dataset.place = place;
    this.log.append(bubble);
    bubble.scrollIntoView({ block: "nearest" });
  }

  /** Forget the messages from this place on. */
  cutAt(place) {
    this.messages.length = Math.min(place, this.messages.length);
    for (const child of [...this.log.children]) if (Number(child.dataset.place) >= place) child.remove();
  }

  /** Let the model answer, and show what it says as it says it. */
  async answer(shared, signal) {
    const answer = new Answer(this.messages.length);
    this.log.append(answer.element);
    const { system, ...fields } = shared;
    const messages = system ? [{ role: "system", content: system }, ...this.messages] : this.messages;
    const body = { ...this.settings(), ...fields, messages };
    Object.assign(body, { stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5 });
    try {
      const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
      for await (const chunk of streamed(response)) {
        if (chunk.error) throw new Refused(chunk.error.message);
        const follows = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
        answer.take(chunk);
        if (follows) this.log.scrollTop = this.log.scrollHeight;
      }
    } catch (error) {
      if (error.name === "AbortError") answer.reason = "stopped";
      else answer.fail(error instanceof Refused ? error.message : "the server cannot be reached");
    }
    if (answer.said) this.messages.push(answer.message());
    answer.offerResults((results) => {
      this.messages.push(...results);
      answerAll();
    });
    await this.tellFigures(answer);
  }

  async tellFigures(answer) {
    if (answer.usage) this.length = answer.usage.total_tokens;
    answer.showFigures();
    if (!answer.usage) return;
    const plan = await asked(`/plan?model=${encodeURIComponent(this.name.value)}&tokens=${this.length}`).catch(() => null);
    if (plan) answer.showFigures(size(total(plan.lengths[0])));
    await this.drawPlan();
  }

  async drawPlan() {
    if (!this.find(".memory").open) return;
    const figure = this.find(".plan");
    try {
      figure.replaceChildren(...picture(await asked(`/plan?model=${encodeURIComponent(this.name.value)}`), this.length));
    } catch (error) {
      figure.replaceChildren(make("p", { className: "problem", textContent: error.message }));
    }
  }
}

// ------------------------------------------------------------------------------------------------ the conversation

/** What both sides send: the system message, the schema and the tools. Raises Refused for what is no JSON. */
function shared() {
  const read = (id) => {
    const text = $(id).value.trim();
    try {
      return text ? JSON.parse(text) : null;
    } catch (error) {
      throw new Refused(`the ${id} field is no JSON: ${error.message}`);
    }
  };
  const schema = read("schema"), tools = read("tools");
  return {
    system: $("system").value.trim(),
    ...(schema && { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } }),
    ...(tools && { tools }),
  };
}

const active = () => ($("compare").checked ? sides : sides.slice(0, 1));

function tell(problem = "") {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

async function send() {
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  try {
    shared();
  } catch (error) {
    return tell(error.message);
  }
  $("prompt").value = "";
  for (const side of active()) side.addUser(text);
  await answerAll();
}

function answerAll() {
  if (!running) ended = answerInTurn();
  return ended;
}

async function answerInTurn() {
  tell();
  running = new AbortController();
  show(true);
  try {
    const fields = shared(), { signal } = running;
    const waiting = active().filter((side) => ["user", "tool"].includes(side.messages.at(-1)?.role));
    if ($("in-turn").checked) for (const side of waiting) signal.aborted || (await side.answer(fields, signal));
    else await Promise.all(waiting.map((side) => side.answer(fields, signal)));
  } catch (error) {
    tell(error.message);
  } finally {
    running = null;
    show(false);
    $("prompt").focus();
  }
}

function show(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

/** End the answers that are being made. */
function stop() {
  running?.abort();
  return ended;
}

/** Take a message back into the field, and forget it and what follows on both sides. */
async function editFrom(place) {
  await stop();
  const message = active().map((side) => side.messages[place]).find(Boolean);
  if (message?.role !== "user") return;
  $("prompt").value = message.content;
  for (const side of sides) side.cutAt(place);
  $("prompt").focus();
}

async function newChat() {
  await stop();
  for (const side of sides) Object.assign(side, { length: 0 }).cutAt(0);
  tell();
  $("prompt").focus();
}

async function listModels() {
  try {
    const { data } = await asked("/v1/models");
    for (const [n, side] of sides.entries()) {
      side.name.replaceChildren(...data.map((card) => make("option", { value: card.id, textContent: card.id, title: card.description ?? "" })));
      side.name.value = data[Math.min(n, data.length - 1)].id;
    }
    $("key-form").hidden = true;
    tell();
  } catch (error) {
    tell(error.message);
  }
}

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

$("composer").onsubmit = (event) => (event.preventDefault(), send());
$("stop").onclick = stop;
$("new-chat").onclick = newChat;
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  listModels();
};
$("compare").onchange = async () => {
  await newChat();
  $("sides").classList.toggle("two", $("compare").checked);
  $("in-turn-label").hidden = sides[1].element.hidden = !$("compare").checked;
};
$("prompt").onkeydown = (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("prompt").value) {
    const place = sides[0].messages.findLastIndex((message) => message.role === "user");
    if (place >= 0) (event.preventDefault(), editFrom(place));
  }
};
document.onkeydown = (event) => {
  if (event.key === "Escape") stop();
};
$("theme").onclick = () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  useTheme(theme);
};

const dark = matchMedia("(prefers-color-scheme: dark)");
const preferred = () => useTheme(localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light"));
dark.onchange = preferred;
preferred();
for (let n = 0; n < 2; n++) {
  sides.push(new Side());
  $("sides").append(sides[n].element);
}
sides[1].element.hidden = true;
listModels();
$("prompt").focus();
