// The server's rates and latencies, asked every two seconds while the page can be seen.

import * as api from "./api.js";
import { byId, count, digits, duration, isolated, make, milliseconds, percent, shorten, words } from "./dom.js";
import { openKey } from "./manage.js";
import { news } from "./state.js";

const EVERY_MS = 2000;
const KEPT = 90;
const SVG = "http://www.w3.org/2000/svg";

const history = [];
let latest = null;
let timer = null;
let running = null;

/** Start asking. */
export function startServer() {
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stop();
    else look();
  });
  news.addEventListener("key", () => {
    stop();
    look();
  });
  byId("server").replaceChildren(make("p", { class: "hint" }, "Loading …"));
  look();
}

function stop() {
  clearTimeout(timer);
  running?.abort();
  running = null;
}

async function look() {
  if (running) return;
  const mine = new AbortController();
  running = mine;
  try {
    latest = await api.stats(mine.signal);
    history.push(latest);
    show();
  } catch (error) {
    if (error.name === "AbortError") return;
    history.push(null);
    fail(error);
    if (error.wantsKey) {
      running = null;
      return; // until there is another key
    }
  }
  while (history.length > KEPT) history.shift();
  if (running === mine) {
    running = null;
    timer = setTimeout(look, EVERY_MS);
  }
}

function show() {
  const { p50, p99 } = latest.latency_ms ?? {};
  byId("live").dataset.state = "good";
  byId("live-text").textContent = `${digits(latest.items_per_s)} items/s · p50 ${milliseconds(p50)} · p99 ${milliseconds(p99)} ms`;
  const line = chart([{ values: history.map((s) => s?.items_per_s), style: "a" }], 72, 18);
  byId("live-spark").replaceChildren(line.picture);
  byId("live-spark").hidden = line.top === 0; // a line of zeros looks like a stray stroke
  const base = latest.base ?? {};
  byId("base").textContent = [base.name, latest.version].filter(Boolean).map((part) => shorten(String(part), 60)).join(" · ");
  byId("server").replaceChildren(...parts());
}

function fail(error) {
  byId("live").dataset.state = "bad";
  byId("live-text").textContent = error.wantsKey ? "Key needed" : "No contact, trying again";
  const box = make("div", { class: "note bad" }, make("p", {}, words(error)));
  if (error.wantsKey) {
    box.append(make("button", { type: "button", on: { click: openKey } }, "Enter a key"));
  }
  byId("server").replaceChildren(box, ...(latest ? parts() : []));
}

function parts() {
  const { p50, p90, p99 } = latest.latency_ms ?? {};
  const seconds = (room(history) * EVERY_MS) / 1000;
  const items = chart([{ values: history.map((s) => s?.items_per_s), style: "a" }], 480, 110);
  const times = chart(
    [
      { values: history.map((s) => s?.latency_ms?.p99), style: "b" },
      { values: history.map((s) => s?.latency_ms?.p50), style: "a" },
    ], 480, 110,
  );
  const figure = (title, drawn, unit, legend) =>
    make(
      "figure", { class: "chart" }, make("figcaption", {}, title, ...legend),
      make("div", { class: "plot" }, make("span", { class: "top-value muted" }, `${digits(drawn.top)} ${unit}`), drawn.picture),
      make("div", { class: "axis muted" }, make("span", {}, `${duration(seconds)} ago`), make("span", {}, "now")),
    );
  const entry = (style, name) =>
    make("span", { class: "key" }, make("i", { class: `swatch ${style}`, "aria-hidden": "true" }), name);
  return [
    make(
      "div", { class: "tiles" },
      tile("Items / s", digits(latest.items_per_s)), tile("Median latency", `${milliseconds(p50)} ms`),
      tile("90 % are below", `${milliseconds(p90)} ms`), tile("99 % are below", `${milliseconds(p99)} ms`),
      tile("Waiting", count(latest.queue?.items), `${count(latest.queue?.tokens)} tokens`),
      tile("Batches filled", percent(latest.batch_fill)),
    ),
    make(
      "div", { class: "charts" },
      figure("Items per second", items, "items/s", []),
      figure("Latency", times, "ms", [entry("a", "median"), entry("b", "99 %")]),
    ),
    make("dl", { class: "facts panel" }, ...facts().flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
  ];
}

const tile = (name, value, more = "") =>
  make("div", { class: "tile" }, make("span", { class: "muted" }, name), make("strong", {}, value), more ? make("span", { class: "muted" }, more) : null);

function facts() {
  const base = Object.entries(latest.base ?? {}).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value));
  return [
    ["Tasks", count(latest.tasks)], ["In memory", count(latest.resident)],
    ["Requests", count(latest.requests)], ["Items", count(latest.items)],
    ["Running for", duration(latest.uptime_s)], ["bitfit", isolated(latest.version ?? "–")],
    ...base.map(([name, value]) => [["Base ", isolated(name.replaceAll("_", " "))], typeof value === "number" ? count(value) : isolated(value)]),
  ];
}

/** Return a picture of lines `[{values, style}]` and its highest value; no value leaves a gap. */
function chart(lines, width, height) {
  const all = lines.flatMap((line) => line.values).filter((value) => Number.isFinite(value));
  const top = Math.max(0, ...all);
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true"); // the numbers stand beside it
  picture.classList.add("lines");
  for (const { values, style } of lines) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", trace(values, top || 1, width, height));
    path.classList.add(style);
    picture.append(path);
  }
  return { picture, top };
}

/** How many intervals a picture is wide: at first it fills up from the right. */
const room = (values) => Math.max(values.length - 1, 14);

function trace(values, top, width, height) {
  let isDown = false;
  return values
    .map((value, i) => {
      if (!Number.isFinite(value)) {
        isDown = false;
        return "";
      }
      const x = width - ((values.length - 1 - i) * width) / room(values);
      const y = height - 2 - (value / top) * (height - 4);
      const move = isDown ? "L" : "M";
      isDown = true;
      return `${move}${x.toFixed(1)} ${y.toFixed(1)}`;
    })
    .join("");
}
