// The key, uploads, and questions before something is changed.

import * as api from "./api.js";
import { byId, bytes, make, notify, words } from "./dom.js";
import { tell } from "./state.js";

const MOST_BYTES = 64 * 1024 * 1024;
const SUFFIX = /(\.bitfit)?\.safetensors$/i;

let file = null;
let running = null;
let question = null;

/** Start the dialogs and the dropping of files. */
export function startManage() {
  byId("key-button").addEventListener("click", openKey);
  byId("key-forget").addEventListener("click", () => keep(null));
  byId("key-form").addEventListener("submit", submitKey);
  byId("upload-button").addEventListener("click", () => openUpload(null));
  byId("file").addEventListener("change", () => take(byId("file").files));
  byId("upload-form").addEventListener("submit", submitUpload);
  byId("confirm-form").addEventListener("submit", submitConfirm);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => running?.abort());
  }
  byId("key-dialog").addEventListener("close", () => {
    byId("key").value = "";
  });
  startDropping();
  showKey();
}

// ---------------------------------------------------------------- key

/** Ask for the key. */
export function openKey() {
  byId("key-error").textContent = "";
  byId("key-forget").hidden = api.key() === null;
  byId("key-dialog").showModal();
  byId("key").focus();
}

function submitKey(event) {
  event.preventDefault();
  const value = byId("key").value.trim();
  if (api.isKey(value)) keep(value);
  else {
    byId("key-error").textContent = value
      ? "A key has letters, digits and signs of ASCII, without spaces."
      : "Enter a key.";
    byId("key").focus();
  }
}

function keep(value) {
  api.setKey(value);
  byId("key-dialog").close();
  showKey();
  tell("key");
  for (const id of ["upload-error", "confirm-error"]) byId(id).replaceChildren();
}

function showKey() {
  const isSet = api.key() !== null;
  byId("key-button").textContent = isSet ? "Key set" : "Key";
  byId("key-button").classList.toggle("on", isSet);
}

function showError(box, error) {
  box.replaceChildren(make("p", {}, words(error)));
  if (error.wantsKey) {
    box.append(make("button", { type: "button", on: { click: openKey } }, "Enter a key"));
  }
}

/** Run `act(signal)` while `button` shows that it runs; an error goes into `box`. */
async function run(button, label, box, act) {
  if (running) return false;
  const before = button.textContent;
  const mine = new AbortController();
  running = mine;
  button.textContent = label;
  box.replaceChildren();
  try {
    await act(mine.signal);
    return true;
  } catch (error) {
    if (error.name !== "AbortError") showError(box, error);
    return false;
  } finally {
    running = null;
    button.textContent = before;
  }
}

// ---------------------------------------------------------------- questions

/** Ask before something is changed: `{title, text, verb, isDanger, act}`. */
export function confirm(asked) {
  question = asked;
  byId("confirm-title").textContent = asked.title;
  byId("confirm-text").textContent = asked.text;
  byId("confirm-submit").textContent = asked.verb;
  byId("confirm-submit").className = asked.isDanger ? "danger main" : "main";
  byId("confirm-error").replaceChildren();
  byId("confirm-dialog").showModal();
}

async function submitConfirm(event) {
  event.preventDefault();
  const { act, verb } = question;
  const isDone = await run(byId("confirm-submit"), `${verb} …`, byId("confirm-error"), act);
  if (isDone) byId("confirm-dialog").close();
}

// ---------------------------------------------------------------- upload

function openUpload(files) {
  if (document.querySelector("dialog[open]")) return;
  file = null;
  byId("upload-form").reset();
  byId("upload-error").replaceChildren();
  byId("upload-dialog").showModal();
  if (files) take(files);
}

function complain(text, id) {
  byId("upload-error").replaceChildren(make("p", {}, text));
  byId(id)?.focus();
}

function take(files) {
  byId("upload-error").replaceChildren();
  if (files.length > 1) return complain("One file at a time.", "file");
  file = files[0] ?? null;
  if (!file) return null;
  if (byId("file").files[0] !== file) {
    const held = new DataTransfer();
    held.items.add(file);
    byId("file").files = held.files;
  }
  const name = file.name.replace(SUFFIX, "").replace(/[^A-Za-z0-9_.-]+/g, "-");
  byId("upload-name").value = name.replace(/^[^A-Za-z0-9]+/, "").slice(0, 100);
  if (!SUFFIX.test(file.name)) {
    return complain("A task file's name ends in .bitfit.safetensors.", "file");
  }
  byId("upload-name").focus();
  return file;
}

async function submitUpload(event) {
  event.preventDefault();
  const name = byId("upload-name").value.trim();
  if (!file) return complain("Choose a task file.", "file");
  if (file.size > MOST_BYTES) {
    return complain(`The file has ${bytes(file.size)}; a task file has at most 64 MiB.`, "file");
  }
  if (!api.isName(name)) {
    return complain(
      "A name begins with a letter or digit and has up to 100 letters, digits, “.”, “_”, “-”.",
      "upload-name",
    );
  }
  const sent = file;
  await run(byId("upload-submit"), "Uploading …", byId("upload-error"), async (signal) => {
    const { info, isNew } = await api.upload(name, sent, signal);
    byId("upload-dialog").close();
    notify(isNew ? `${name} is added.` : `${name} is now at version ${info.version}.`);
    tell("tasks");
    location.hash = `#task/${encodeURIComponent(name)}`;
  });
  return null;
}

function startDropping() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const mark = (isOver) => document.body.classList.toggle("dropping", isOver);
  document.addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth += 1;
    mark(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!hasFiles(event)) return;
    depth = Math.max(0, depth - 1);
    if (!depth) mark(false);
  });
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    mark(false);
    if (byId("upload-dialog").open) take(event.dataTransfer.files);
    else openUpload(event.dataTransfer.files);
  });
}
