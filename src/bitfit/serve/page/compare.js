// Two tasks beside each other: how far each moved, and how much in one direction.

import * as api from "./api.js";
import { byTerm, heatTable, layersOf } from "./heat.js";
import { byId, digits, empty, failure, isolated, make, say, shorten } from "./dom.js";
import { openKey } from "./manage.js";

let running = null;

/** Start the form. */
export function startCompare() {
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const [a, b] = names();
    for (const [id, name] of [["compare-a", a], ["compare-b", b]]) {
      const isGood = api.isName(name);
      byId(id).setAttribute("aria-invalid", String(!isGood));
      if (isGood) continue;
      byId("compare-error").textContent = name
        ? `“${name}” cannot be the name of a task.`
        : "Name two tasks.";
      byId(id).focus();
      return;
    }
    byId("compare-error").textContent = "";
    const hash = `#compare/${encodeURIComponent(a)}/${encodeURIComponent(b)}`;
    if (location.hash === hash) openCompare(a, b);
    else location.hash = hash;
  });
  for (const id of ["compare-a", "compare-b"]) suggest(id);
}

const names = () => [byId("compare-a").value.trim(), byId("compare-b").value.trim()];

function suggest(id) {
  let timer;
  let asked = null;
  const look = async () => {
    asked?.abort();
    asked = new AbortController();
    try {
      const { tasks } = await api.tasks(byId(id).value.trim(), 0, 20, asked.signal);
      byId(`${id}-names`).replaceChildren(
        ...tasks.map((info) => make("option", { value: info.name })),
      );
    } catch {
      // without suggestions the name can still be written
    }
  };
  byId(id).addEventListener("focus", look, { once: true });
  byId(id).addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(look, 200);
  });
}

/** Compare `a` and `b`, or wait for what is missing. */
export async function openCompare(a, b) {
  running?.abort();
  if (a) byId("compare-a").value = shorten(a, 100);
  if (b) byId("compare-b").value = shorten(b, 100);
  byId("compare-error").textContent = "";
  const box = byId("compare");
  if (!a || !b || !api.isName(a) || !api.isName(b)) {
    if (!box.childElementCount) {
      box.append(empty("Where two tasks moved the base's biases in the same direction, the cosine is near 1; where they have nothing to do with each other, near 0."));
    }
    return;
  }
  const mine = new AbortController();
  running = mine;
  box.setAttribute("aria-busy", "true");
  box.replaceChildren(make("p", { class: "hint" }, "Loading …"));
  try {
    const found = await api.compare(a, b, mine.signal);
    if (mine.signal.aborted) return;
    box.replaceChildren(...parts(a, b, Array.isArray(found) ? found : (found.rows ?? [])));
  } catch (error) {
    if (error.name === "AbortError") return;
    const message = failure(error, () => openCompare(a, b));
    if (error.wantsKey) {
      message.append(make("button", { type: "button", on: { click: openKey } }, "Enter a key"));
    }
    box.replaceChildren(message);
  }
  box.setAttribute("aria-busy", "false");
}

function parts(a, b, rows) {
  const total = rows.find((row) => row.term === "total");
  const heads = rows.filter((row) => row.term.startsWith("head."));
  const sites = rows.filter((row) => row !== total && !heads.includes(row));
  say(`Compared. Cosine over all biases: ${digits(total?.cosine)}.`);
  return [
    total ? summary(a, b, total) : null,
    ...(sites.length
      ? [make("h3", {}, "Cosine by term and layer"), cosines(a, b, sites)]
      : [empty("Neither task moved a bias.")]),
    heads.length ? make("h3", {}, "Heads") : null,
    heads.length ? table(a, b, heads) : null,
    sites.length
      ? make("details", {}, make("summary", {}, "All numbers"), table(a, b, sites))
      : null,
  ].filter(Boolean);
}

function summary(a, b, total) {
  const fact = (name, value) => [make("dt", {}, name), make("dd", {}, value)];
  const longest = Math.max(total.norm_a, total.norm_b) || 1;
  const norm = (value, style) => {
    const bar = make("span", { class: `bar ${style}`, "aria-hidden": "true" });
    bar.style.width = `${(100 * value) / longest}%`;
    return [digits(value), make("span", { class: "track" }, bar)];
  };
  return make(
    "dl", { class: "facts totals" },
    ...fact("Cosine over all biases", make("strong", {}, digits(total.cosine))),
    ...fact(["Norm of ", isolated(a)], norm(total.norm_a, "a")),
    ...fact(["Norm of ", isolated(b)], norm(total.norm_b, "b")),
  );
}

const step = (value) =>
  value >= 0 ? `heat-${Math.round(8 * value)}` : `minus-${Math.max(1, Math.round(-4 * value))}`;

function cosines(a, b, sites) {
  const terms = byTerm(sites);
  const layers = layersOf(terms);
  const hasOnce = terms.some((term) => term.layers.has(null));
  const columns = layers.map((layer) => ({ name: String(layer), layer }));
  if (hasOnce) columns.push({ name: "once", layer: null, isApart: true });
  const rows = terms.map((term) => ({
    term: term.term,
    symbol: term.symbol,
    cells: columns.map(({ layer }) => {
      const row = term.layers.get(layer);
      if (!row) return null;
      const where = `${shorten(term.symbol, 60)}${layer === null ? "" : `, layer ${layer}`}`;
      const norms = `norms ${digits(row.norm_a)} and ${digits(row.norm_b)}`;
      if (row.cosine === null) {
        return { text: "–", step: "none", said: `${where}: one of them did not move; ${norms}` };
      }
      const clean = Math.min(1, Math.max(-1, row.cosine));
      return {
        text: clean.toFixed(2).replace("-", "−").replace("0.", "."), step: step(clean),
        said: `${where}: cosine ${clean.toFixed(3)}; ${norms}`,
      };
    }),
  }));
  return heatTable({
    caption: `Cosine between the changes of ${a} and ${b}, by term and layer`,
    columns,
    rows,
    hint: "1: the same direction; 0: unrelated; below 0: against each other. A dash: one of them did not move.",
  });
}

function table(a, b, rows) {
  const hasLayers = rows.some((row) => row.layer !== null);
  const head = ["Term", ...(hasLayers ? ["Layer"] : []), "Cosine", `Norm of ${a}`, `Norm of ${b}`, `Mean of ${a}`, `Mean of ${b}`];
  const cells = (row) => [
    digits(row.cosine), digits(row.norm_a), digits(row.norm_b), digits(row.mean_abs_a), digits(row.mean_abs_b),
  ];
  return make(
    "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers of the comparison" },
    make(
      "table", {},
      make("thead", {}, make("tr", {}, ...head.map((name, i) => make("th", { scope: "col", class: i ? "number" : null }, name)))),
      make(
        "tbody", {},
        ...rows.map((row) =>
          make(
            "tr", {},
            make("th", { scope: "row" }, isolated(row.term)),
            hasLayers ? make("td", { class: "number" }, String(row.layer ?? "–")) : null,
            ...cells(row).map((text) => make("td", { class: "number" }, text)),
          ),
        ),
      ),
    ),
  );
}
