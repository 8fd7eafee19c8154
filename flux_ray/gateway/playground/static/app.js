// The playground: ties form, references, gallery and viewer to the requests that they make.

import { ApiError, generate, listModels } from "./api.js";
import { CodeDialog } from "./code.js";
import { Composer } from "./composer.js";
import { announce, byId, el } from "./dom.js";
import { Gallery } from "./gallery.js";
import { MaskPainter, emptyMask } from "./mask.js";
import { firstModel } from "./models.js";
import { References, kindOf, referenceOf } from "./references.js";
import { bodyOf, fieldsOf, fileName, filesOf, pathOf } from "./request.js";
import { loadKey, loadSettings, saveKey, saveSettings } from "./settings.js";
import { Viewer, wordsFor } from "./viewer.js";

// How soon to ask again for models of a server that cannot be reached.
const AGAIN_MS = 4000;
const FORGOTTEN = "There is no key in this tab.";
const SEND_KEYS = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘ ⏎" : "Ctrl ⏎";

const settings = loadSettings();
let key = loadKey();
// The request that runs now, and what ends it.
let running = null;

const painter = new MaskPainter();
const codeDialog = new CodeDialog();
const references = new References({
  onChange: () => composer.referencesChanged(),
  onProblem: (text) => tell(text),
  paint: (item) => painter.open(item),
});
const gallery = new Gallery({ onSelect: (item) => viewer.show(item) });
const viewer = new Viewer(gallery, {
  tryPrompt(prompt) {
    settings.prompt = prompt;
    composer.show();
    start();
  },
  again: (run) => begin({ ...run.settings }, run.model, run.references, run.mask),
  keepSeed: (seed) => composer.keepSeed(seed),
  takesReferences: () => (composer.model?.max_references ?? 0) > 0,
  download,
  useAsReference,
  recall,
  code({ fields, files }, seed) {
    const { n, ...others } = fields;
    codeDialog.open({ ...others, seed }, files, key);
  },
  remove,
});
const composer = new Composer(settings, references, {
  onModel: (model) => viewer.welcome(model),
});

/** Tell of a problem above the images; an empty text takes it away. */
function tell(text, ...more) {
  const notice = byId("notice");
  notice.replaceChildren(text, ...more);
  notice.hidden = text === "";
}

/** Load the models. Called at the start, for a new key, and when the page is looked at again. */
async function loadModels() {
  try {
    const models = await listModels(key);
    tell("");
    composer.setModels(models, firstModel(models, settings.model));
    byId("generate").disabled = false;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("generate").disabled = composer.model === null;
    tellError(error);
    if (error.status === 0) setTimeout(loadModels, AGAIN_MS);
  }
}

function tellError(error) {
  if (error.status === 401) {
    const text = key === "" ? FORGOTTEN : "It does not take the key of this tab.";
    const enter = el("button", { type: "button", className: "primary small", onclick: askForKey }, "Enter a key");
    tell(`${error.heading}. ${text} `, enter);
  } else {
    tell(`${error.heading}. ${error.message}`);
  }
}

function askForKey() {
  byId("key").value = key;
  byId("key-dialog").showModal();
}

function showKey() {
  byId("key-state").textContent = key === "" ? "Key" : "Key is set";
}

/** Start a request with what the form holds. */
async function start() {
  if (composer.model === null || running !== null || !composer.check()) return;
  const mask = await references.mask();
  if (!references.check(mask)) return;
  composer.nextSeed();
  await begin({ ...settings }, composer.model, [...references.sent], mask);
}

/** Make a request, show it from its first moment, and follow it to its end. */
async function begin(chosen, model, sent, mask) {
  if (running !== null) return;
  const run = runOf(chosen, model, sent, mask);
  running = { run, controller: new AbortController() };
  gallery.add(run.items);
  viewer.follow(run.items[0]);
  tell("");
  showBusy();
  announce("Sent");
  try {
    await follow(run, running.controller.signal);
  } catch (error) {
    end(run, error);
  } finally {
    running = null;
    showBusy();
    for (const item of run.items) gallery.update(item);
    viewer.refresh(run);
  }
}

function runOf(chosen, model, sent, mask) {
  const fields = fieldsOf(chosen, model, mask !== null);
  // A reference's mask goes on being painted; what was sent stays as it was.
  const kept = sent.map((each) => ({ ...each, mask: { ...emptyMask(), done: [...each.mask.done] } }));
  const run = {
    settings: chosen,
    model,
    fields,
    files: filesOf(sent, mask, model),
    references: kept,
    mask,
    size: [chosen.width, chosen.height],
    state: "running",
    standing: { phase: "sending", position: null, expectedS: null, progress: null },
    startedMs: performance.now(),
    retryAtMs: null,
    error: null,
    times: null,
    servedBy: null,
    revised: null,
    warnings: [],
  };
  run.items = Array.from({ length: chosen.n }, (_, index) => ({
    run,
    seed: chosen.seed + index,
    blob: null,
    url: null,
    previewUrl: null,
    tookS: null,
  }));
  return run;
}

async function follow(run, signal) {
  const sent = bodyOf(run.fields, run.files, run.settings.previews);
  for await (const event of generate(pathOf(run.files), sent, key, signal)) {
    if (event.kind === "standing") hear(run, event);
    else take(run, event);
  }
  if (run.items.some((item) => item.url === null)) {
    throw new ApiError("The answer was not whole", "Not all images came: try again.");
  }
  run.state = "done";
  const num = run.items.length;
  const time = ((performance.now() - run.startedMs) / 1000).toFixed(1);
  announce(`${num === 1 ? "The image is" : `${num} images are`} done after ${time} seconds`);
}

function hear(run, standing) {
  run.standing = standing;
  announce(wordsFor(run));
  viewer.refresh(run);
}

/** Take a preview or an image; seeds say which one of the request it is. */
function take(run, event) {
  const item = run.items.find((each) => each.seed === event.seed);
  if (item === undefined) return;
  if (item.previewUrl !== null) URL.revokeObjectURL(item.previewUrl);
  item.previewUrl = null;
  const url = URL.createObjectURL(event.blob);
  if (event.kind === "preview") {
    item.previewUrl = url;
    if (run.standing.progress === null) run.standing = { ...run.standing, phase: "generating", progress: 0 };
    const shown = (event.partial_image_index + 1) / (run.settings.previews + 1);
    run.standing.progress = Math.max(run.standing.progress, Math.min(1, shown));
  } else {
    Object.assign(item, { url, blob: event.blob, tookS: (performance.now() - run.startedMs) / 1000 });
    run.size = event.size.split("x").map(Number);
    run.servedBy = event.model;
    run.revised = event.revised_prompt ?? null;
    run.warnings = event.warnings ?? [];
    run.times = event.times ?? run.times;
  }
  gallery.update(item);
  viewer.refresh(run);
}

/** Note how a request ended that did not end well. */
function end(run, error) {
  if (error.name === "AbortError") {
    run.state = "cancelled";
    announce("Cancelled");
    return;
  }
  run.state = "failed";
  run.error = error;
  if (!(error instanceof ApiError)) {
    run.error = new ApiError("This page failed", `${error.message}.`);
    console.error(error);
    return;
  }
  if (error.retryAfterS !== null) run.retryAtMs = performance.now() + 1000 * error.retryAfterS;
  composer.blame(error.field, error.message);
  announce(`${error.heading}. ${error.message}`);
  if (error.status === 401) tellError(error);
  // What was deployed when the page was loaded may be gone.
  if (error.code === "tier_unavailable") loadModels();
}

function showBusy() {
  const isBusy = running !== null;
  byId("generate").classList.toggle("busy", isBusy);
  // Not a submit button while it cancels: Enter in any field would press it.
  byId("generate").type = isBusy ? "button" : "submit";
  byId("generate-label").textContent = isBusy ? "Cancel" : "Generate";
  byId("generate-key").textContent = isBusy ? "Esc" : SEND_KEYS;
  document.title = isBusy ? "Generating… flux-ray" : "flux-ray playground";
}

function download(item) {
  const name = fileName(item.run.fields, item.seed, item.run.settings.format);
  const link = el("a", { href: item.url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

async function useAsReference(item) {
  if (composer.model.max_references === 0) {
    tell("This model takes no references: choose another one first.");
    return;
  }
  const name = fileName(item.run.fields, item.seed, item.run.settings.format);
  const reference = await referenceOf(item.blob, name);
  // The image to edit is the first one; what does not fit any more goes.
  references.replace([reference, ...references.items].slice(0, composer.model.max_references));
  announce("It is the first reference now");
  byId("prompt").focus();
  byId("prompt").select();
}

function recall(item) {
  const { run } = item;
  references.lists[kindOf(run.model)] = run.references.map((each) => ({ ...each, mask: { ...emptyMask(), done: [...each.mask.done] } }));
  composer.hadReferences = run.references.length > 0;
  composer.recall({ ...run.settings, seed: item.seed });
  references.render();
  announce("The settings of this image are in the form");
}

function remove(item) {
  if (running?.run === item.run) running.controller.abort();
  const next = gallery.remove(item);
  viewer.clear();
  if (next !== null) viewer.show(next);
  else viewer.welcome(composer.model);
  byId("viewer").focus();
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  byId("generate").addEventListener("click", (event) => {
    if (running === null) return;
    // The request ends before the click does: the button then submits again, and would begin anew.
    event.preventDefault();
    running.controller.abort();
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start();
    }
    if (event.key === "Escape" && !viewer.leaveComparison()) running?.controller.abort();
  });
  byId("copy-request").addEventListener("click", async () => {
    if (composer.model === null) return;
    const mask = await references.mask();
    const files = filesOf(references.sent, mask, composer.model);
    codeDialog.open(fieldsOf(settings, composer.model, mask !== null), files, key);
  });
  byId("key-button").addEventListener("click", askForKey);
  byId("key-dialog").addEventListener("close", (event) => {
    const wanted = event.target.returnValue;
    if (wanted !== "save" && wanted !== "forget") return;
    key = wanted === "save" ? byId("key").value.trim() : "";
    byId("key").value = "";
    event.target.returnValue = "";
    saveKey(key);
    showKey();
    loadModels();
  });
  byId("theme-button").addEventListener("click", () => {
    const systemIsDark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (systemIsDark ? "dark" : "light");
    settings.theme = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = settings.theme;
    saveSettings(settings);
  });
  // Tiers come and go: look again when somebody comes back to this tab.
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && running === null) loadModels();
  });
}

byId("generate").disabled = true;
showBusy();
listen();
showKey();
composer.show();
loadModels();
