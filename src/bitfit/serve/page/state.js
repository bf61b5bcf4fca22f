// What several parts of the page share: the chosen tasks, and news of changes.

/** News: "chosen" (the choice changed), "tasks" (the shelf changed), "key" (another key). */
export const news = new EventTarget();

export const tell = (what) => news.dispatchEvent(new Event(what));

export const MOST_CHOSEN = 64;

/** Name -> information of the tasks that a text is tried on, in the order of choice. */
export const chosen = new Map();

/** Add a task to the choice, or take it out; return false where the choice is full. */
export function choose(info, isChosen) {
  if (!isChosen) chosen.delete(info.name);
  else if (chosen.size >= MOST_CHOSEN && !chosen.has(info.name)) return false;
  else chosen.set(info.name, info);
  tell("chosen");
  return true;
}

/** Whether a task reads two texts. */
export const needsPair = (info) => Boolean(info.is_pair) || info.kind === "span";
