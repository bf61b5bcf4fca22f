// The list of tasks: search, pages, and the choice of those that a text is tried on.

import * as api from "./api.js";
import {
  ago, byId, bytes, count, counted, empty, failure, isolated, make, notify, say, score,
} from "./dom.js";
import { chosen, choose, MOST_CHOSEN, news, tell } from "./state.js";

const PAGE = 50;
const REFRESH_MS = 15000;

let query = "";
let offset = 0;
let total = 0;
let shown = [];
let opened = null;
let running = null;

/** Start the list. */
export function startShelf() {
  let timer;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      query = byId("search").value.trim();
      load({ from: 0, isSpoken: true });
    }, 200);
  });
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") step(event, -1, 1);
  });
  byId("list").addEventListener("keydown", (event) => {
    const at = links().indexOf(event.target);
    if (at >= 0 && event.key === "ArrowDown") step(event, at, 1);
    if (at >= 0 && event.key === "ArrowUp") step(event, at, -1);
  });
  byId("previous").addEventListener("click", () => turn(-PAGE));
  byId("next").addEventListener("click", () => turn(PAGE));
  byId("choose-shown").addEventListener("click", chooseShown);
  byId("choose-none").addEventListener("click", () => {
    chosen.clear();
    tell("chosen");
    byId("search").focus();
  });
  news.addEventListener("chosen", showChoice);
  news.addEventListener("tasks", () => load({ isQuiet: true }));
  news.addEventListener("key", () => load({}));
  setInterval(() => {
    if (!document.hidden) load({ isQuiet: true });
  }, REFRESH_MS);
  showChoice();
  load({});
}

/** Mark the task that is open, or none (null). */
export function markOpened(name) {
  opened = name;
  for (const link of links()) {
    if (link.dataset.name === name) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

const links = () => [...byId("list").querySelectorAll("a")];

function step(event, at, by) {
  const next = links()[at + by];
  if (next) next.focus();
  else if (at + by < 0) byId("search").focus();
  event.preventDefault();
}

function turn(by) {
  load({ from: Math.max(0, offset + by), isSpoken: true }).then(() => {
    byId("list").scrollTop = 0;
    if (byId("list").getBoundingClientRect().top < 0) byId("search").scrollIntoView();
  });
}

async function load({ from = offset, isQuiet = false, isSpoken = false }) {
  if (isQuiet && running) return;
  running?.abort();
  const mine = new AbortController();
  running = mine;
  if (!isQuiet) byId("list").setAttribute("aria-busy", "true");
  if (!isQuiet && !shown.length) showMessage(make("p", { class: "hint" }, "Loading …"));
  try {
    const found = await api.tasks(query, from, PAGE, mine.signal);
    if (mine.signal.aborted) return;
    if (!found.tasks.length && from > 0 && found.total > 0) {
      running = null; // the last page went away
      await load({ from: Math.floor((found.total - 1) / PAGE) * PAGE, isQuiet });
      return;
    }
    [shown, total, offset] = [found.tasks, found.total, from];
    show();
    if (isSpoken) say(query ? `${counted(total, "task")} found` : rangeText());
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!isQuiet) fail(error);
  } finally {
    if (running === mine) {
      running = null;
      byId("list").setAttribute("aria-busy", "false");
    }
  }
}

function fail(error) {
  [shown, total, offset] = [[], 0, 0];
  show();
  const box = failure(error, () => load({}));
  if (error.wantsKey) {
    const open = () => byId("key-button").click();
    box.append(make("button", { type: "button", on: { click: open } }, "Enter a key"));
  }
  showMessage(box);
  byId("total").textContent = "";
}

function showMessage(node) {
  byId("list-message").replaceChildren(...(node ? [node] : []));
  byId("list-message").hidden = !node;
}

function show() {
  const list = byId("list");
  const held = list.contains(document.activeElement) ? document.activeElement : null;
  list.replaceChildren(...shown.map(item));
  if (held) {
    const again = [...list.querySelectorAll(held.tagName)];
    again.find((node) => node.dataset.name === held.dataset.name)?.focus({ preventScroll: true });
  }
  byId("total").textContent = count(total);
  byId("range").textContent = rangeText();
  byId("previous").disabled = offset === 0;
  byId("next").disabled = offset + shown.length >= total;
  byId("choose-shown").hidden = shown.length === 0;
  showMessage(
    shown.length
      ? null
      : query
        ? empty("No task matches “", isolated(query), "”.")
        : empty("No tasks yet. Add a task file, or start the server with a folder of them."),
  );
}

const rangeText = () =>
  shown.length
    ? `${count(offset + 1)}–${count(offset + shown.length)} of ${count(total)}`
    : "";

function item(info) {
  const box = make("input", {
    type: "checkbox", "data-name": info.name, "aria-label": `Try on ${info.name}`,
    on: { change: () => pick(info, box) },
  });
  box.checked = chosen.has(info.name);
  const facts = [info.kind, bytes(info.bytes), `v${info.version}`].join(" · ");
  const used = typeof info.last_used === "number" ? ago(info.last_used) : "never used";
  const marks = [];
  if (info.pinned) marks.push(make("span", { class: "mark" }, "pinned"));
  if (!info.resident) marks.push(make("span", { class: "mark" }, "on disk"));
  return make(
    "li", {},
    make("label", { class: "box" }, box),
    make(
      "div", { class: "item" },
      make(
        "div", { class: "item-top" },
        make("a", {
          href: `#task/${encodeURIComponent(info.name)}`, "data-name": info.name,
          "aria-current": info.name === opened ? "true" : null,
        }, info.name),
        make("span", { class: "item-score" }, headline(info)),
      ),
      make(
        "div", { class: "item-facts" },
        make(
          "span", { class: "clip" }, `${facts} · `,
          make("span", { class: "hidden-text" }, "last used "), used,
        ),
        ...marks,
      ),
      labelLine(info),
    ),
  );
}

/** Return "f1 84.6", or a dash where the task has no score. */
export function headline(info) {
  if (typeof info.score !== "number") return make("span", { class: "muted" }, "no score");
  return [make("span", { class: "muted" }, `${info.metric} `), score(info.score)];
}

function labelLine(info) {
  if (!info.labels?.length) return null;
  const few = info.labels.slice(0, 6).flatMap((label, i) => [i ? ", " : "", isolated(label)]);
  return make(
    "div", { class: "item-labels clip" },
    info.labels.length > 6 ? `${count(info.labels.length)} labels: ` : "", ...few,
    info.labels.length > 6 ? " …" : "",
  );
}

function pick(info, box) {
  if (choose(info, box.checked)) return;
  box.checked = false;
  notify(`A text can be tried on ${MOST_CHOSEN} tasks at once.`, "bad");
}

function chooseShown() {
  for (const info of shown) {
    if (!chosen.has(info.name) && chosen.size >= MOST_CHOSEN) {
      notify(`A text can be tried on ${MOST_CHOSEN} tasks at once.`, "bad");
      break;
    }
    chosen.set(info.name, info);
  }
  tell("chosen");
}

function showChoice() {
  byId("chosen-text").textContent = chosen.size ? `${chosen.size} chosen` : "None chosen";
  byId("choose-none").hidden = chosen.size === 0;
  for (const box of byId("list").querySelectorAll("input")) {
    box.checked = chosen.has(box.dataset.name);
  }
}
