// The page: which view is shown, by the address's hash, and what starts it all.
//
//   #tasks               the list (on narrow screens; on wide ones it is always there)
//   #try/NAME,NAME       a text on these tasks
//   #task/NAME           one task
//   #compare/NAME/NAME   two tasks
//   #server              rates and latencies

import * as api from "./api.js";
import { startAsk } from "./ask.js";
import { openCompare, startCompare } from "./compare.js";
import { byId, notify } from "./dom.js";
import { startManage } from "./manage.js";
import { startServer } from "./server.js";
import { markOpened, startShelf } from "./shelf.js";
import { chosen, MOST_CHOSEN, news, tell } from "./state.js";
import { openTask, startTask } from "./task.js";

const TITLES = { tasks: "Tasks", try: "Try", task: "Task", compare: "Compare", server: "Server" };
const HEADINGS = {
  tasks: "shelf-title", try: "try-title", task: "task-title", compare: "compare-title",
  server: "server-title",
};
const narrow = window.matchMedia("(max-width: 59.99rem)");

function route() {
  const [head, ...rest] = location.hash.slice(1).split("/");
  let parts;
  try {
    parts = rest.map(decodeURIComponent);
  } catch {
    parts = [];
  }
  if (Object.hasOwn(TITLES, head)) return [head, parts];
  return [narrow.matches ? "tasks" : "try", []];
}

function tryHash() {
  return `#try${chosen.size ? `/${[...chosen.keys()].join(",")}` : ""}`;
}

function show(isFirst) {
  let [view, parts] = route();
  if (view === "tasks" && !narrow.matches) view = "try";
  document.body.dataset.view = view;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.dataset.to === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const name = view === "task" ? (parts[0] ?? null) : null;
  document.title = `${name && api.isName(name) ? name : TITLES[view]} · bitfit`;
  if (view === "task") {
    openTask(name);
    const target = name ? `#task/${encodeURIComponent(name)}` : "#task";
    document.querySelector(".views a[data-to=task]").setAttribute("href", target);
  } else markOpened(null);
  if (view === "compare") openCompare(parts[0], parts[1]);
  if (view === "try" && parts[0]) chooseByName(parts[0].split(","));
  if (!isFirst) byId(HEADINGS[view]).focus({ preventScroll: true });
  if (!isFirst) window.scrollTo(0, 0);
}

/** Choose the tasks of a link: those that are not chosen yet are asked for by name. */
async function chooseByName(names) {
  const wanted = [...new Set(names)].filter(api.isName).slice(0, MOST_CHOSEN);
  if (wanted.join() === [...chosen.keys()].join()) return;
  const found = await Promise.all(
    wanted.map(async (name) => {
      if (chosen.has(name)) return chosen.get(name);
      try {
        return await api.details(name);
      } catch (error) {
        notify(`${name}: ${error.message}`, "bad");
        return null;
      }
    }),
  );
  chosen.clear();
  for (const info of found) if (info) chosen.set(info.name, info);
  tell("chosen");
}

function followChoice() {
  document.querySelector(".views a[data-to=try]").setAttribute("href", tryHash());
  if (document.body.dataset.view === "try") history.replaceState(null, "", tryHash());
}

function startTheme() {
  const root = document.documentElement;
  const button = byId("theme-button");
  const showTheme = () => button.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
  button.addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("bitfit-theme", root.dataset.theme);
    } catch {
      // storage is switched off: for this page view
    }
  });
  new MutationObserver(showTheme).observe(root, { attributeFilter: ["data-theme"] });
  showTheme();
}

function startSkipping() {
  for (const link of document.querySelectorAll(".skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      if (link.dataset.skip === "search" && narrow.matches) location.hash = "#tasks";
      byId(link.dataset.skip).focus();
    });
  }
}

startTheme();
startSkipping();
startManage();
startAsk();
startTask();
startCompare();
startShelf();
news.addEventListener("chosen", followChoice);
window.addEventListener("hashchange", () => show(false));
narrow.addEventListener("change", () => {
  if (!location.hash || route()[0] === "tasks") show(true);
});
show(true);
startServer();
