// One answer: its text, token by token, the calls of tools in it, and what it took.

const tooltip = document.getElementById("token");

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export class Answer {
  constructor(place) {
    this.text = make("div", { className: "text", tabIndex: 0 });
    this.text.setAttribute("aria-label", "Answer; the arrow keys go from token to token");
    this.figures = make("p", { className: "figures", textContent: "…" });
    this.element = make("div", { className: "answer" }, this.text, this.figures);
    this.element.dataset.place = place;
    this.content = "";
    this.calls = [];
    this.tokens = new Map(); // a part of the text -> the tokens that made it
    this.unshown = []; // tokens whose text is to come
    this.begun = performance.now();
    this.first = this.last = null;
    this.count = 0;
    this.text.onpointerover = (event) => this.point(event.target);
    this.text.onpointerleave = () => this.point(null);
    this.text.onblur = () => this.point(null);
    this.text.onkeydown = (event) => this.move(event);
  }

  get said() {
    return this.content !== "" || this.calls.length > 0;
  }

  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    const tokens = choice.logprobs?.content ?? [];
    if (tokens.length) {
      this.last = performance.now();
      this.first ??= this.last;
      this.count += tokens.length;
      this.unshown.push(...tokens);
    }
    if (choice.delta.content) this.addText(choice.delta.content);
    for (const call of choice.delta.tool_calls ?? []) this.addCall(call);
  }

  addText(text) {
    this.content += text;
    const likely = this.unshown.length ? Math.exp(Math.min(...this.unshown.map((token) => token.logprob))) : 1;
    const span = make("span", { textContent: text, className: likely < 0.2 ? "unlikely" : likely < 0.6 ? "doubtful" : "" });
    this.tokens.set(span, this.unshown);
    this.unshown = [];
    this.text.append(span);
  }

  addCall({ index, id, function: { name, arguments: more } }) {
    if (id) {
      const shown = make("pre", { className: "call" });
      this.calls[index] = { id, type: "function", function: { name, arguments: "" }, shown };
      this.element.insertBefore(shown, this.figures);
    }
    const call = this.calls[index];
    call.function.arguments += more ?? "";
    call.shown.textContent = `${call.function.name}(${call.function.arguments})`;
    this.unshown = [];
  }

  message() {
    const message = { role: "assistant", content: this.content || null };
    if (this.calls.length) message.tool_calls = this.calls.map(({ shown, ...call }) => call);
    return message;
  }

  fail(message) {
    this.element.append(make("p", { className: "problem", role: "alert", textContent: message }));
    this.reason = "failed";
  }

  /** Where tools were called: a field for what each has given. */
  offerResults(take) {
    if (!this.calls.length || this.reason !== "tool_calls") return;
    const fields = this.calls.map((call) => make("input", { placeholder: `what ${call.function.name} gives`, required: true }));
    const form = make("form", { className: "result" }, ...fields, make("button", { textContent: "Go on" }));
    form.onsubmit = (event) => {
      event.preventDefault();
      form.remove();
      take(this.calls.map((call, n) => ({ role: "tool", tool_call_id: call.id, content: fields[n].value })));
    };
    this.element.append(form);
  }

  showFigures(memory) {
    const seconds = (this.last - this.first) / 1000;
    const parts = [];
    if (this.first !== null) parts.push(`first token ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    if (this.count > 1 && seconds > 0) parts.push(`${((this.count - 1) / seconds).toFixed(1)} tokens/s`);
    if (memory) parts.push(`${memory} planned`);
    if (this.usage) parts.push(`${this.usage.prompt_tokens.toLocaleString()} + ${this.usage.completion_tokens.toLocaleString()} tokens`);
    if (this.reason && this.reason !== "stop") parts.push({ length: "cut at the most tokens", tool_calls: "calls tools" }[this.reason] ?? this.reason);
    this.figures.textContent = parts.join(" · ");
  }

  /** Show what is known of the tokens behind a part of the text; of none, hide it. */
  point(span) {
    this.text.querySelector(".pointed")?.classList.remove("pointed");
    const tokens = this.tokens.get(span) ?? [];
    tooltip.hidden = !tokens.length;
    if (!tokens.length) return;
    span.classList.add("pointed");
    tooltip.replaceChildren(...tokens.map(alternatives));
    const place = span.getBoundingClientRect(), box = tooltip.getBoundingClientRect();
    const above = place.bottom + box.height + 8 > innerHeight;
    tooltip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.width - 8))}px`;
    tooltip.style.top = `${above ? Math.max(4, place.top - box.height - 4) : place.bottom + 4}px`;
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const spans = [...this.tokens.keys()];
    const now = spans.indexOf(this.text.querySelector(".pointed"));
    this.point(spans[Math.max(0, Math.min(spans.length - 1, now < 0 ? 0 : now + step))]);
  }
}

/** A table: the token, the likeliest in its place, and how likely each was. */
function alternatives(token) {
  const rows = token.top_logprobs.some((other) => other.token === token.token)
    ? token.top_logprobs
    : [token, ...token.top_logprobs];
  const table = make("table");
  for (const row of rows) {
    const shown = JSON.stringify(row.token).slice(1, -1);
    const cells = [make("td", { textContent: shown }), make("td", { textContent: percent(row.logprob) })];
    table.append(make("tr", { className: row.token === token.token ? "chosen" : "" }, ...cells));
  }
  return table;
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}
