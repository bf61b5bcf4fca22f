// One task: what it is, what may be done with it, and how far its biases moved.

import * as api from "./api.js";
import { byTerm, heatTable, layersOf } from "./heat.js";
import {
  ago, byId, bytes, count, digits, empty, failure, isolated, make, notify, score, shorten, words,
} from "./dom.js";
import { headline, markOpened } from "./shelf.js";
import { confirm, openKey } from "./manage.js";
import { chosen, choose, MOST_CHOSEN, news, tell } from "./state.js";

const LABELS = 60;

let opened = null;
let running = null;

/** Start: the open task is drawn anew when it, or the key, changes. */
export function startTask() {
  news.addEventListener("tasks", () => opened && openTask(opened, { isQuiet: true }));
  news.addEventListener("key", () => opened && openTask(opened));
}

/** Show the task `name`; without a name, what to do. */
export async function openTask(name, { isQuiet = false } = {}) {
  running?.abort();
  opened = name;
  markOpened(name);
  byId("task-title").textContent = name ?? "Task";
  if (!name) {
    byId("task").replaceChildren(empty("Open a task: its name in the list is a link."));
    return;
  }
  if (!api.isName(name)) {
    byId("task-title").textContent = "Task";
    byId("task").replaceChildren(empty("“", isolated(name), "” cannot be the name of a task."));
    return;
  }
  const mine = new AbortController();
  running = mine;
  if (!isQuiet) byId("task").replaceChildren(make("p", { class: "hint" }, "Loading …"));
  byId("task").setAttribute("aria-busy", "true");
  try {
    const info = await api.details(name, mine.signal);
    if (!mine.signal.aborted) byId("task").replaceChildren(...parts(info));
  } catch (error) {
    if (error.name === "AbortError") return;
    const box = failure(error, () => openTask(name));
    if (error.wantsKey) {
      box.append(make("button", { type: "button", on: { click: openKey } }, "Enter a key"));
    }
    byId("task").replaceChildren(box);
  }
  byId("task").setAttribute("aria-busy", "false");
}

function parts(info) {
  return [
    info.description ? description(String(info.description)) : null,
    actions(info),
    make("div", { class: "split" }, facts(info), labels(info)),
    make("h3", {}, "How far its biases moved"),
    change(info.change ?? []),
    recipe(info.recipe),
  ].filter(Boolean);
}

function description(text) {
  const box = make("p", { class: "description", dir: "auto" }, shorten(text, 400));
  if (text.length <= 400) return box;
  const more = make("button", { type: "button", class: "plain" }, "Show all");
  more.addEventListener("click", () => {
    box.textContent = text;
    more.remove();
  });
  return make("div", {}, box, more);
}

function actions(info) {
  const button = (text, click, style = null) =>
    make("button", { type: "button", class: style, on: { click } }, text);
  const roll = button("Roll back", () => rollBack(info));
  if (!info.can_roll_back) {
    roll.disabled = true;
    roll.title = "There is no version before this one";
  }
  return make(
    "div", { class: "row actions" },
    button("Try a text", () => tryIt(info), "main"),
    make("a", { class: "button", href: `#compare/${encodeURIComponent(info.name)}` }, "Compare"),
    make("span", { class: "gap" }),
    button("Download", () => save(info)), roll, button("Remove", () => remove(info), "danger"),
  );
}

function tryIt(info) {
  if (!chosen.has(info.name) && !choose(info, true)) {
    notify(`A text can be tried on ${MOST_CHOSEN} tasks at once.`, "bad");
    return;
  }
  location.hash = byId("chosen-count").closest("a").getAttribute("href");
}

function facts(info) {
  const lines = [
    ["Kind", info.kind + (info.is_pair ? ", two texts" : "")],
    ["Score", headline(info)],
    ...Object.entries(info.scores ?? {})
      .filter(([metric, value]) => metric !== info.metric && value !== null)
      .map(([metric, value]) => [isolated(metric), score(value)]),
    ["Version", `${info.version}`],
    ["Size", bytes(info.bytes)],
    ["Longest text", `${count(info.max_length)} tokens`],
    ["Terms", info.terms ? isolated(info.terms) : null],
    ["In memory", (info.resident ? "yes" : "no, on disk") + (info.pinned ? ", pinned" : "")],
    ["Last used", ago(info.last_used)],
    ["Licence", info.licence ? isolated(info.licence) : null],
    ["Source", info.source ? isolated(info.source) : null],
    ["Fingerprint", make("code", {}, String(info.fingerprint ?? ""))],
  ];
  return make(
    "dl", { class: "facts" },
    ...lines
      .filter(([, value]) => value !== null)
      .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
  );
}

function labels(info) {
  if (!info.labels?.length) return null;
  const list = make("ul", { class: "label-list" });
  const add = (some) =>
    list.append(...some.map((label) => make("li", { class: "mark" }, isolated(label, { class: "clamp" }))));
  add(info.labels.slice(0, LABELS));
  const rest = info.labels.slice(LABELS);
  const more = make("button", { type: "button", class: "plain" }, `Show ${count(rest.length)} more`);
  more.addEventListener("click", () => {
    add(rest);
    more.remove();
  });
  return make(
    "div", {}, make("h3", {}, `Labels (${count(info.labels.length)})`), list,
    rest.length ? more : null,
  );
}

function change(entries) {
  const terms = byTerm(entries).map((term) => {
    const values = [...term.layers.values()].map((entry) => entry.mean_abs);
    const total = values.reduce((sum, value) => sum + value, 0);
    return { ...term, total, average: total / values.length };
  });
  const top = Math.max(0, ...entries.map((entry) => entry.mean_abs));
  if (!terms.length || !(top > 0)) {
    return empty("This task leaves every bias of the base as it is: only its head was trained.");
  }
  terms.sort((a, b) => b.total - a.total || (a.term < b.term ? -1 : 1));
  const layers = layersOf(terms);
  const scale = top < 0.1 ? 1000 : 1;
  const cell = (value, where) => ({
    text: scale > 1 ? (scale * value).toFixed(1) : value.toFixed(2),
    step: `heat-${Math.min(8, Math.round((8 * value) / top))}`,
    said: `${where}: ${digits(value)}, mean absolute change of a bias`,
  });
  const rows = terms.map((term) => ({
    term: term.term,
    symbol: term.symbol,
    cells: [
      ...layers.map((layer) => {
        const entry = term.layers.get(layer);
        return entry ? cell(entry.mean_abs, `${shorten(term.symbol, 60)}, layer ${layer}`) : null;
      }),
      cell(term.average, `${shorten(term.symbol, 60)}, average`),
    ],
  }));
  return heatTable({
    caption: `Mean absolute change of each bias term by layer${scale > 1 ? ", in thousandths" : ""}`,
    columns: [
      ...layers.map((layer) => ({ name: String(layer) })), { name: "avg", isApart: true },
    ],
    rows,
    hint: `Mean absolute change against the base${scale > 1 ? ", in thousandths" : ""}, by layer; the terms that moved most on top.`,
  });
}

function recipe(values) {
  if (!values || !Object.keys(values).length) return null;
  return make(
    "details", {}, make("summary", {}, "Recipe"),
    make("pre", { class: "raw", tabindex: "0" }, shorten(JSON.stringify(values, null, 2), 20000)),
  );
}

async function save(info) {
  try {
    const blob = await api.download(info.name);
    const address = URL.createObjectURL(blob);
    const link = make("a", { href: address, download: `${info.name}.bitfit.safetensors` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    notify(`${info.name}: ${bytes(blob.size)} downloaded.`);
  } catch (error) {
    notify(words(error), "bad");
    if (error.wantsKey) openKey();
  }
}

function rollBack(info) {
  confirm({
    title: `Roll back ${info.name}?`,
    text: `The version before becomes the current one, as version ${info.version + 1}. Requests that run finish on version ${info.version}.`,
    verb: "Roll back",
    act: async (signal) => {
      const now = await api.rollback(info.name, signal);
      notify(`${info.name} is rolled back: version ${now.version} is what version ${info.version} replaced.`);
      tell("tasks");
    },
  });
}

function remove(info) {
  confirm({
    title: `Remove ${info.name}?`,
    text: "The server stops answering for this task, and its versions here are gone. Keep a copy of the file if you may need it.",
    verb: "Remove",
    isDanger: true,
    act: async (signal) => {
      await api.remove(info.name, signal);
      chosen.delete(info.name);
      opened = null;
      tell("chosen");
      tell("tasks");
      notify(`${info.name} is removed.`);
      location.hash = "#task";
    },
  });
}
