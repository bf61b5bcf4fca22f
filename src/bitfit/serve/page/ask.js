// Trying a text on the chosen tasks.

import * as api from "./api.js";
import { answerCard, spoken } from "./answers.js";
import { byId, counted, empty, failure, isolated, make, milliseconds, say } from "./dom.js";
import { chosen, choose, needsPair, news } from "./state.js";

let running = null;

/** Start the form. */
export function startAsk() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      ask();
    }
  });
  news.addEventListener("chosen", showChosen);
  showChosen();
  byId("answers").replaceChildren(
    empty("The answers of the chosen tasks will stand here, side by side."),
  );
}

function showChosen() {
  const chips = [...chosen.values()].map((info) =>
    make(
      "span", { class: "chip" },
      make("a", { href: `#task/${encodeURIComponent(info.name)}` }, info.name),
      make("button", {
        type: "button", "aria-label": `Do not try on ${info.name}`, "data-name": info.name,
        on: { click: () => leaveOut(info) },
      }, "×"),
    ),
  );
  byId("chosen").replaceChildren(
    ...(chips.length
      ? chips
      : [make("p", { class: "hint" }, "Choose one or more tasks in the list: tick their boxes.")]),
  );
  const infos = [...chosen.values()];
  const pairs = infos.filter(needsPair);
  const isQuestion = infos.length > 0 && infos.every((info) => info.kind === "span");
  byId("pair-field").hidden = pairs.length === 0;
  byId("text-label").textContent = isQuestion ? "Question" : "Text";
  byId("pair-label").textContent = isQuestion ? "Text that has the answer" : "Second text";
  byId("pair-hint").textContent =
    pairs.length === infos.length ? "" : `Read by ${listed(pairs)} only.`;
  if (pairs.length && !isQuestion && pairs.some((info) => info.kind === "span")) {
    byId("pair-hint").textContent +=
      " To a task that answers questions, the first text is the question.";
  }
  byId("chosen-count").textContent = chosen.size;
  byId("chosen-count").hidden = chosen.size === 0;
}

function listed(infos) {
  const names = infos.slice(0, 3).map((info) => info.name);
  return names.join(", ") + (infos.length > 3 ? ` and ${infos.length - 3} more` : "");
}

function leaveOut(info) {
  const buttons = [...byId("chosen").querySelectorAll("button")];
  const at = buttons.findIndex((button) => button.dataset.name === info.name);
  choose(info, false);
  const left = [...byId("chosen").querySelectorAll("button")];
  (left[Math.min(at, left.length - 1)] ?? byId("text")).focus();
}

function complain(text, field) {
  byId("ask-error").textContent = text;
  for (const id of ["text", "pair"]) byId(id).removeAttribute("aria-invalid");
  if (!field) return;
  byId(field).setAttribute("aria-invalid", "true");
  byId(field).focus();
}

function readForm() {
  const [text, pair] = [byId("text").value, byId("pair").value];
  const infos = [...chosen.values()];
  if (!infos.length) return complain("Choose at least one task in the list.");
  if (!text.trim()) return complain("Write a text first.", "text");
  if (infos.some(needsPair) && !pair.trim()) {
    return complain(`${listed(infos.filter(needsPair))}: needs a second text.`, "pair");
  }
  const number = (id, low, high) => {
    const value = Number(byId(id).value);
    return Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : low;
  };
  const options = {
    top_k: Math.round(number("top-k", 1, 1000)),
    min_confidence: number("min-confidence", 0, 100) / 100,
  };
  const items = infos.map((info, i) => ({
    task: info.name, text, id: String(i), ...(needsPair(info) ? { text_pair: pair } : {}),
    ...(["classification", "multilabel"].includes(info.kind) ? { top_k: options.top_k } : {}),
    ...(info.kind === "classification" ? { min_confidence: options.min_confidence } : {}),
  }));
  complain("");
  return { items, infos, options };
}

async function ask() {
  const form = readForm();
  if (!form) return;
  running?.abort();
  const mine = new AbortController();
  running = mine;
  const answers = byId("answers");
  answers.setAttribute("aria-busy", "true");
  byId("ask-button").textContent = "Answering …";
  if (answers.querySelector(".empty")) answers.replaceChildren(empty("Answering …"));
  try {
    const found = await api.predict({ items: form.items }, mine.signal);
    if (!mine.signal.aborted) show(form, found);
  } catch (error) {
    if (error.name !== "AbortError") showFailure(form, error);
  } finally {
    if (running === mine) {
      running = null;
      answers.setAttribute("aria-busy", "false");
      byId("ask-button").textContent = "Answer";
    }
  }
}

function show({ items, infos, options }, found) {
  const byItem = new Map((found.answers ?? []).map((answer) => [answer.id, answer]));
  const cards = items.map((item, i) => {
    const answer = byItem.get(item.id) ?? found.answers?.[i];
    const missing = { error: { code: "missing", message: "The server gave no answer." } };
    return answerCard(infos[i], item, answer ?? missing, options);
  });
  const line = `${counted(cards.length, "answer")} in ${milliseconds(found.ms)} ms`;
  byId("answers").replaceChildren(make("p", { class: "hint wide" }, line), ...cards);
  const all = items.slice(0, 3).map((item, i) => spoken(item.task, byItem.get(item.id), infos[i]));
  say(`${line}. ${all.join(" ")}`);
}

function showFailure({ infos }, error) {
  const box = failure(error, ask);
  box.classList.add("wide");
  if (error.wantsKey) {
    const open = () => byId("key-button").click();
    box.append(make("button", { type: "button", on: { click: open } }, "Enter a key"));
  }
  if (error.status === 404 && infos.length === 1) {
    box.querySelector("p").replaceChildren(
      "The server no longer has ", isolated(infos[0].name), `: ${error.message}`,
    );
  }
  byId("answers").replaceChildren(box);
}
