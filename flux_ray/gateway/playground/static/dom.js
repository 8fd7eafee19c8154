// Build and find elements. Texts go in as text, never as HTML: prompts and errors are untrusted.

const SVG = "http://www.w3.org/2000/svg";

/** Return the element of that id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Return a new element: `props` are properties, `aria-*`, `data-*` and `role` attributes. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else if (name === "onclick") element.addEventListener("click", value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return one of the icons in playground.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Return a button with an icon and a text; `props` as in `el`. */
export function button(name, text, onclick, props = {}) {
  return el("button", { type: "button", className: "quiet", onclick, ...props }, icon(name), text);
}

/** Say something to screen readers. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Show an error beside its field; an empty text takes it away. */
export function markField(input, problem, text) {
  problem.textContent = text;
  input.setAttribute("aria-invalid", text === "" ? "false" : "true");
}

/** Copy a text. Pages of plain http have no clipboard, and use the old way. */
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = el("textarea", { value: text, className: "unseen" });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Return seconds as people read them. */
export function seconds(value) {
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}
