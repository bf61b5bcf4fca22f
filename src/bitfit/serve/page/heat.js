// A table of numbers, terms by layers, coloured by value. The numbers stand in it, so it is its own
// accessible table; arrow keys walk over its cells, and a line below says the one that is held.

import { make, shorten, symbol } from "./dom.js";

const SYMBOLS = {
  __proto__: null,
  query: "b_q", key: "b_k", value: "b_v", attention_output: "b_m1", attention_layernorm: "b_LN1",
  intermediate: "b_m2", output: "b_m3", output_layernorm: "b_LN2",
};

/**
 * Return entries `{term, layer, ...}` by term: `{term, symbol, layers: Map(layer, entry)}` in the
 * order in which the terms come; layer is null where a term stands once.
 */
export function byTerm(entries) {
  const terms = new Map();
  for (const entry of entries) {
    if (!terms.has(entry.term)) {
      const name = entry.symbol ?? SYMBOLS[entry.term] ?? entry.term;
      terms.set(entry.term, { term: entry.term, symbol: name, layers: new Map() });
    }
    terms.get(entry.term).layers.set(entry.layer, entry);
  }
  return [...terms.values()];
}

/** Return the layers of such terms, ascending. */
export function layersOf(terms) {
  const all = new Set(terms.flatMap((term) => [...term.layers.keys()]));
  all.delete(null);
  return [...all].sort((a, b) => a - b);
}

/**
 * Return the table.
 *
 * @param caption what it shows, in words
 * @param columns `[{name, title, isApart}]`
 * @param rows `[{term, symbol, cells: [{text, step, said} or null]}]`; step is a class of style.css
 * @param hint what the line below says while no cell is held
 */
export function heatTable({ caption, columns, rows, hint }) {
  const said = new WeakMap();
  const line = make("p", { class: "readout" }, hint);
  const apart = (i) => (columns[i].isApart ? " apart" : "");
  const head = make(
    "tr", { role: "row" },
    make("th", { scope: "col", role: "columnheader" }, make("span", { class: "hidden-text" }, "term")),
    ...columns.map((column, i) =>
      make("th", { scope: "col", role: "columnheader", class: apart(i).trim() || null }, column.name)),
  );
  const cell = (value, i) => {
    const node = make(
      "td", { role: "gridcell", tabindex: "-1", class: `heat ${value?.step ?? "none"}${apart(i)}` },
      value?.text ?? "–",
    );
    said.set(node, value?.said ?? "nothing here");
    return node;
  };
  const body = rows.map((row) =>
    make("tr", { role: "row" }, termHead(row), ...row.cells.map(cell)));
  const table = make(
    "table", { class: "grid", role: "grid", "aria-label": caption },
    make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...body),
  );
  const hold = (event) => {
    const node = event.target.closest?.("td");
    if (node && said.has(node)) line.textContent = said.get(node);
  };
  const leave = () => {
    const node = document.activeElement;
    line.textContent = table.contains(node) ? (said.get(node) ?? hint) : hint;
  };
  table.addEventListener("mouseover", hold);
  table.addEventListener("focusin", hold);
  table.addEventListener("mouseleave", leave);
  table.addEventListener("focusout", () => setTimeout(leave));
  walkable(table);
  return make(
    "figure", { class: "heat-map" }, make("div", { class: "scroll" }, table),
    make("figcaption", {}, line),
  );
}

function termHead({ term, symbol: name }) {
  const sign = symbol(name);
  return make(
    "th", { scope: "row", role: "rowheader", title: shorten(term, 200) },
    sign, sign ? " " : null, make("span", { class: "term" }, shorten(term.replaceAll("_", " "), 60)),
  );
}

/** Let the arrow keys, Home and End walk over a table's cells; one of them is in the tab order. */
function walkable(table) {
  const grid = [...table.tBodies[0].rows].map((row) => [...row.cells].slice(1));
  if (!grid.length) return;
  let [y, x] = [0, 0];
  const go = (toY, toX) => {
    grid[y][x].tabIndex = -1;
    y = Math.min(grid.length - 1, Math.max(0, toY));
    x = Math.min(grid[y].length - 1, Math.max(0, toX));
    grid[y][x].tabIndex = 0;
    return grid[y][x];
  };
  go(0, 0);
  table.addEventListener("keydown", (event) => {
    const last = grid[y].length - 1;
    const to = {
      ArrowUp: [y - 1, x], ArrowDown: [y + 1, x], ArrowLeft: [y, x - 1], ArrowRight: [y, x + 1],
      Home: [event.ctrlKey ? 0 : y, 0], End: [event.ctrlKey ? grid.length - 1 : y, last],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    go(...to).focus();
  });
  table.addEventListener("mousedown", (event) => {
    const node = event.target.closest?.("td");
    const row = grid.findIndex((cells) => cells.includes(node));
    if (row >= 0) go(row, grid[row].indexOf(node));
  });
}
