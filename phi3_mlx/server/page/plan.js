// The picture of a model's memory plan, by length.

const PARTS = { weights: "weights", cache: "keys and values", work: "work" };
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [420, 170, 62, 410, 14, 146];

export const total = (plan) => plan.weights + plan.cache + plan.work;
export const size = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e9).toFixed(1)} GB`);

function draw(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** The plan from short to long: an SVG, and a caption that says the same. `here`: tokens of the conversation. */
export function picture({ limit, lengths }, here) {
  const first = lengths[0], last = lengths.at(-1);
  const near = limit < 3 * total(last); // a limit that is far away would leave nothing to see below it
  const most = 1.05 * Math.max(total(last), near ? limit : 0);
  const span = Math.log2(last.tokens / first.tokens) || 1;
  const x = (tokens) => LEFT + ((RIGHT - LEFT) * Math.log2(tokens / first.tokens)) / span;
  const y = (bytes) => BOTTOM - ((BOTTOM - TOP) * bytes) / most;
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });

  let below = lengths.map(() => 0);
  for (const part of Object.keys(PARTS)) {
    const above = lengths.map((plan, n) => below[n] + plan[part]);
    const edge = (heights) => lengths.map((plan, n) => `${x(plan.tokens)},${y(heights[n])}`);
    svg.append(draw("polygon", { class: part, points: [...edge(above), ...edge(below).reverse()].join(" ") }));
    below = above;
  }
  const across = (name, bytes) => draw("line", { class: name, x1: LEFT, x2: RIGHT, y1: y(bytes), y2: y(bytes) });
  const beside = (bytes) => draw("text", { x: LEFT - 5, y: y(bytes) + 4, "text-anchor": "end" }, size(bytes));
  svg.append(across("axis", 0), beside(total(last)));
  if (near) svg.append(across("limit", limit), beside(limit));
  for (const [plan, anchor] of [[first, "start"], [last, "end"]]) {
    const says = `${plan.tokens.toLocaleString()} tokens`;
    svg.append(draw("text", { x: x(plan.tokens), y: HEIGHT - 8, "text-anchor": anchor }, says));
  }
  if (here > first.tokens) svg.append(draw("line", { class: "here", x1: x(here), x2: x(here), y1: TOP, y2: BOTTOM }));
  const says = summary(limit, lengths);
  svg.append(draw("title", {}, `Memory by length, from below: ${Object.values(PARTS).join(", ")}. ${says}`));
  return [svg, caption(says)];
}

function summary(limit, lengths) {
  const fits = lengths.filter((plan) => total(plan) <= limit).at(-1);
  const shown = fits ?? lengths[0];
  const needs = `${size(total(shown))} at ${shown.tokens.toLocaleString()} tokens`;
  return `${needs}; ${fits ? "" : "only "}${size(limit)} may be used.`;
}

function caption(says) {
  const element = document.createElement("figcaption");
  for (const [part, name] of Object.entries(PARTS)) {
    const swatch = document.createElement("i");
    swatch.className = part;
    element.append(swatch, name);
  }
  element.append(`. ${says}`);
  return element;
}
