// One task's answer: bars of scores, words marked in the text, a number.

import { count, counted, digits, isolated, make, percent, shorten } from "./dom.js";

const BARS = 10;
const HUES = 6;

/** Return a card for `answer` to `item` (what was sent to the task `info`). */
export function answerCard(info, item, answer, options) {
  const card = make(
    "article", { class: "card", "data-task": info.name },
    make(
      "header", {},
      make("h3", {}, make("a", { href: `#task/${encodeURIComponent(info.name)}` }, info.name)),
      make("span", { class: "muted" }, answer.version ? `v${answer.version}` : ""),
    ),
  );
  if (answer.error) {
    card.append(make("p", { class: "error" }, shorten(String(answer.error.message), 600)));
    return card;
  }
  const show = VIEWS[answer.kind ?? info.kind];
  const parts = show ? show(answer.result ?? {}, item, options, info) : [unknown(answer)];
  card.append(...parts.filter(Boolean));
  const length = counted(answer.tokens, "token");
  card.append(
    make(
      "footer", { class: "muted" }, answer.truncated ? make("strong", {}, "cut off, ") : null,
      answer.truncated ? `${length} were read` : length,
    ),
  );
  return card;
}

/** Return one sentence for screen readers. */
export function spoken(name, answer) {
  if (!answer) return "";
  if (answer.error) return `${name}: no answer.`;
  const result = answer.result ?? {};
  const said = {
    __proto__: null,
    classification: () => (result.abstained ? "abstained" : result.label),
    multilabel: () => (result.labels?.length ? result.labels.slice(0, 5).join(", ") : "no label"),
    regression: () => digits(result.value),
    tokens: () => counted(pieces(result).length, "marked piece"),
    span: () => result.answer || "no answer found",
  }[answer.kind];
  return `${name}: ${shorten(String(said?.() ?? ""), 100)}.`;
}

const VIEWS = {
  __proto__: null,
  classification: (result, item, { min_confidence: least }) => [
    result.abstained || result.label === null || result.label === undefined
      ? make(
          "p", { class: "result abstained" }, "No answer ",
          make(
            "small", {},
            `${percent(result.confidence)} is below ${percent(least)}: the task abstains`,
          ),
        )
      : make(
          "p", { class: "result" }, isolated(result.label, { class: "clamp" }),
          make("small", {}, percent(result.confidence)),
        ),
    bars(result.scores ?? [], result.abstained ? [] : [result.label]),
  ],

  multilabel: (result) => [
    result.labels?.length
      ? make(
          "p", { class: "result labels" },
          ...result.labels.slice(0, 30).map((label) => isolated(label, { class: "mark on clamp" })),
          result.labels.length > 30 ? `and ${count(result.labels.length - 30)} more` : null,
        )
      : make("p", { class: "result abstained" }, "No label"),
    bars(result.scores ?? [], result.labels ?? []),
  ],

  regression: (result) => [make("p", { class: "result number" }, digits(result.value, 4))],

  tokens: (result, item) => {
    const found = pieces(result);
    return [
      found.length ? null : make("p", { class: "result abstained" }, "Nothing marked"),
      marked(item.text, found, true),
      wordTable(result.spans ?? []),
    ];
  },

  span: (result, item) => {
    const context = item.text_pair ?? item.text;
    const isFound = Boolean(result.answer) && result.end > result.start;
    return [
      isFound
        ? make(
            "p", { class: "result" }, isolated(result.answer, { class: "clamp" }),
            make("small", {}, `score ${digits(result.score)}`),
          )
        : make("p", { class: "result abstained" }, "No answer found in the text"),
      marked(context, isFound ? [result] : [], false),
    ];
  },
};

const unknown = (answer) =>
  make("pre", { class: "raw" }, shorten(JSON.stringify(answer.result, null, 1) ?? "", 4000));

/** Return a list of labels with a bar each; those in `best` stand out. */
function bars(scores, best) {
  const winners = new Set(best);
  const list = make("ul", { class: "bars" });
  const add = (from, to) => {
    for (const { label, score } of scores.slice(from, to)) {
      const bar = make("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${Math.min(100, Math.max(0, 100 * score))}%`;
      list.append(
        make(
          "li", { class: winners.has(label) ? "on" : null },
          isolated(label, { class: "bar-label clip" }),
          make("span", { class: "bar-value" }, percent(score)),
          make("span", { class: "track" }, bar),
        ),
      );
    }
  };
  add(0, BARS);
  if (scores.length <= BARS) return scores.length ? list : null;
  const more = make("button", { type: "button", class: "plain" });
  more.textContent = `Show ${count(scores.length - BARS)} more`;
  more.addEventListener("click", () => {
    add(BARS, undefined);
    more.remove();
  });
  return make("div", {}, list, more);
}

/** Return what to mark: entities where there are any, else each word that has a tag. */
function pieces(result) {
  if (result.entities?.length) return result.entities;
  return (result.spans ?? []).filter((span) => span.label && span.label !== "O");
}

/** Return `text` with pieces marked. Offsets count characters as Python does, not UTF-16 units. */
function marked(text, found, isTagged) {
  const characters = [...text];
  const box = make("p", { class: "marked", dir: "auto" });
  let at = 0;
  for (const piece of [...found].sort((a, b) => a.start - b.start)) {
    if (!(piece.start >= at && piece.end > piece.start && piece.end <= characters.length)) continue;
    const inside = characters.slice(piece.start, piece.end).join("");
    box.append(characters.slice(at, piece.start).join(""));
    if (isTagged) {
      const tag = make("span", { class: "tag" }, isolated(shorten(piece.label, 40)));
      const title = `${shorten(piece.label, 80)}, ${percent(piece.confidence)}`;
      box.append(make("mark", { class: `hue-${hue(piece.label)}`, title }, inside, " ", tag));
    } else {
      box.append(make("mark", { class: "found" }, inside));
    }
    at = piece.end;
  }
  box.append(characters.slice(at).join(""));
  return box;
}

function hue(label) {
  let sum = 0;
  for (let i = 0; i < Math.min(label.length, 100); i += 1) sum = (sum * 31 + label.charCodeAt(i)) % 9973;
  return sum % HUES;
}

function wordTable(spans) {
  if (!spans.length) return null;
  const table = make(
    "table", {},
    make(
      "thead", {},
      make("tr", {}, ...["Word", "Tag", "Confidence"].map((name) => make("th", { scope: "col" }, name))),
    ),
    make(
      "tbody", {},
      ...spans.slice(0, 2000).map((span) =>
        make(
          "tr", {},
          make("td", {}, isolated(span.text ?? "")), make("td", {}, isolated(span.label)),
          make("td", { class: "number" }, percent(span.confidence)),
        ),
      ),
    ),
  );
  const words = make("summary", {}, `Every word (${count(spans.length)})`);
  const box = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Words and tags" });
  box.append(table);
  return make("details", {}, words, box);
}
