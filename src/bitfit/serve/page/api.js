// The server's HTTP interface. The key goes into a header and nowhere else.

const KEY = "bitfit-key";
let remembered = null;

/** What the server, or the way to it, answered instead of a result. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }

  /** Whether a key, or another key, would help. */
  get wantsKey() {
    return this.status === 401 || this.status === 403;
  }
}

/** Return the key of this tab, or null. */
export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? remembered;
  } catch {
    return remembered; // storage is switched off: this page view only
  }
}

/** Keep `value` as the key of this tab; null forgets it. */
export function setKey(value) {
  remembered = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // remembered for this page view
  }
}

/** Whether `text` may stand in a header. */
export const isKey = (text) => /^[\x21-\x7e]{1,500}$/.test(text);

/** Whether `text` may be the name of a task. */
export const isName = (text) => /^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$/.test(text);

const WITHOUT_MESSAGE = {
  404: "The server does not have this.",
  408: "The server took too long.",
  413: "This is larger than the server takes.",
  429: "The server is busy.",
  503: "The server is starting or stopping.",
};

async function asError(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // not JSON: a proxy's page
  }
  const { code = `http_${response.status}`, message } = body?.error ?? {};
  let text = typeof message === "string" && message ? message : WITHOUT_MESSAGE[response.status];
  text ??= `The server answered with status ${response.status}.`;
  if (response.status === 401) {
    text = key()
      ? "The server does not know this key. Enter another one."
      : "The server wants a key for this. Enter one.";
  } else if (response.status === 403) {
    text = key()
      ? "This key may not do this. Enter a key with the role manage."
      : "The server wants a key with the role manage for this. Enter one.";
  }
  const wait = Number(response.headers.get("Retry-After"));
  if ((response.status === 429 || response.status === 503) && wait > 0) {
    text += ` Try again in ${wait} s.`;
  }
  return new ApiError(response.status, code, text);
}

async function send(path, { method = "GET", body, type, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (type) headers["Content-Type"] = type;
  const held = key();
  if (held) headers.Authorization = `Bearer ${held}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method, body, headers, signal, cache: "no-store", credentials: "omit", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The server cannot be reached.");
  }
  if (!response.ok) throw await asError(response);
  return response;
}

async function json(path, options) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(response.status, "not_json", "The server's answer is not JSON.");
  }
}

const task = (name) => `v1/tasks/${encodeURIComponent(name)}`;

export const tasks = (query, offset, limit, signal) =>
  json(`v1/tasks?${new URLSearchParams({ query, offset, limit })}`, { signal });

export const details = (name, signal) => json(task(name), { signal });

export const predict = (request, signal) =>
  json("v1/predict", {
    method: "POST", body: JSON.stringify(request), type: "application/json", signal,
  });

export const compare = (a, b, signal) =>
  json(`v1/compare?${new URLSearchParams({ a, b })}`, { signal });

export const stats = (signal) => json("v1/stats", { signal });

/** Return the task's information and whether it is new. */
export async function upload(name, file, signal) {
  const response = await send(task(name), {
    method: "PUT", body: file, type: "application/octet-stream", signal,
  });
  return { info: await response.json(), isNew: response.status === 201 };
}

export const rollback = (name, signal) =>
  json(`${task(name)}/rollback`, { method: "POST", signal });

export const remove = (name, signal) => send(task(name), { method: "DELETE", signal });

export const download = async (name, signal) =>
  (await send(`${task(name)}/file`, { signal })).blob();
