// Elements, words for numbers, and what is said to screen readers. All text goes in as text.

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * Return a new element. `properties` are attributes, but for `on` (handlers by event); null and
 * false leave an attribute out. Children are nodes or text; null is left out.
 */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Return text of unknown direction, kept apart from what stands around it. */
export const isolated = (text, properties = {}) =>
  make("bdi", { dir: "auto", ...properties }, shorten(String(text)));

/** Return `text` with at most `limit` characters, the last one an ellipsis if it was longer. */
export function shorten(text, limit = 300) {
  if (text.length <= limit) return text;
  return `${[...text.slice(0, 2 * limit)].slice(0, limit - 1).join("")}…`;
}

/** Say `text` to screen readers without showing it. */
export function say(text) {
  byId("say").textContent = "";
  requestAnimationFrame(() => {
    byId("say").textContent = text;
  });
}

/** Show a message above the page until it is closed. `tone` is "good" or "bad". */
export function notify(text, tone = "good") {
  const note = make("div", { class: `note ${tone}` }, make("p", {}, shorten(text, 600)));
  note.append(
    make("button", { type: "button", class: "plain", on: { click: () => note.remove() } }, "Close"),
  );
  const notices = byId("notices");
  while (notices.childElementCount > 2) notices.firstElementChild.remove();
  notices.append(note);
}

/** Return a box that says that nothing is there, and why. */
export const empty = (...words) => make("div", { class: "empty" }, make("p", {}, ...words));

/** Return a box for an error, with a button that tries again where `retry` is given. */
export function failure(error, retry) {
  const box = make("div", { class: "note bad", role: "alert" }, make("p", {}, words(error)));
  if (retry) box.append(make("button", { type: "button", on: { click: retry } }, "Try again"));
  return box;
}

/** Return the words of an error, short enough to be shown. */
export const words = (error) => shorten(String(error?.message ?? error), 600);

const whole = new Intl.NumberFormat("en");
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** 3000 -> "3,000"; a dash where there is no number. */
export const count = (value) => (isNumber(value) ? whole.format(Math.round(value)) : "–");

/** count(1), "task" -> "1 task"; 3 -> "3 tasks". */
export const counted = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** 0.9123 -> "91.2 %". */
export const percent = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)} %` : "–");

/** 0.9123 -> "91.2": scores as the literature prints them. */
export const score = (value) => (isNumber(value) ? (100 * value).toFixed(1) : "–");

/** A number with three significant digits: 1234 -> "1,234", 0.01234 -> "0.0123". */
export function digits(value, significant = 3) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(significant - 1);
  const decimals = Math.max(0, significant - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", {
    minimumFractionDigits: decimals,
    maximumFractionDigits: decimals,
  });
}

/** Milliseconds: 7.99 -> "8.0", 27.84 -> "28". */
export function milliseconds(value) {
  if (!isNumber(value)) return "–";
  return value < 10 ? value.toFixed(1) : count(value);
}

/** 93210 -> "93 KB". */
export function bytes(value) {
  if (!isNumber(value)) return "–";
  if (value < 1000) return `${value} B`;
  if (value < 1e6) return `${Math.round(value / 1000)} KB`;
  return `${(value / 1e6).toFixed(1)} MB`;
}

/** 4000 -> "1 h 6 min". */
export function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

/** Seconds since 1970 -> "5 min ago", "never" without. */
export function ago(time) {
  if (!isNumber(time)) return "never";
  const passed = Date.now() / 1000 - time;
  return passed < 10 ? "just now" : `${duration(passed)} ago`;
}

/** Return a bias term as the paper writes it: b_LN1 with the subscript LN1. */
export function symbol(text) {
  const found = /^b_(\w{1,8})$/.exec(text);
  return found ? make("span", { class: "symbol" }, "b", make("sub", {}, found[1])) : null;
}
