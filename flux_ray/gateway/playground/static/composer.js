// The form: it shows what the chosen model can do, keeps the settings, and checks them.

import { announce, byId, el, icon, markField } from "./dom.js";
import { NEGATIVE_SCALE, SHAPES, describe, examplesFor, hasScale, isAlias, sizeFor, sizeLike, sizeProblem } from "./models.js";
import { randomSeed, saveSettings } from "./settings.js";

// Settings of which each model has its own default.
const MODELS_OWN = { steps: null, guidance: null, scale: null, strength: null, upsampling: null };

/** The form. `settings` is the object that everybody reads; `references` decide on `match`. */
export class Composer {
  constructor(settings, references, { onModel }) {
    Object.assign(this, { settings, references, onModel, models: [], model: null });
    // A new seed that no request has used yet is not replaced by another one.
    this.isSeedFresh = true;
    this.shapeBefore = settings.shape === "match" ? "1:1" : settings.shape;
    if (settings.shape === "match") settings.shape = this.shapeBefore;
    this.#makePresets();
    this.#listen();
  }

  /** Offer these models, and choose one. */
  setModels(models, chosen) {
    this.models = models;
    const option = (each) => {
      const mark = each.deployed ? "" : " (not deployed)";
      return el("option", { value: each.id, textContent: each.id + mark });
    };
    const groups = [
      ["Tiers", models.filter((each) => !isAlias(each))],
      ["Aliases", models.filter(isAlias)],
    ].filter(([, members]) => members.length > 0);
    byId("model").replaceChildren(
      ...groups.map(([label, members]) => el("optgroup", { label }, ...members.map(option))),
    );
    this.setModel(chosen);
  }

  /** Choose a model: what it cannot do is not shown, and sizes are brought within its limits. */
  setModel(model) {
    const { settings } = this;
    const isOther = settings.model !== model.id;
    this.model = model;
    settings.model = model.id;
    byId("model").value = model.id;
    byId("model-note").textContent = describe(model);
    byId("model-note").classList.toggle("warn", !model.deployed);
    settings.prompt ??= examplesFor(model)[0];
    byId("prompt").maxLength = model.max_prompt_chars;
    byId("negative").maxLength = model.max_prompt_chars;
    if (isOther) Object.assign(settings, MODELS_OWN);
    const hasSize = settings.width !== null && sizeProblem(model, settings.width, settings.height) === "";
    if (settings.shape !== "match" && !(hasSize && !isOther)) this.#choose(settings.shape);
    settings.n = Math.min(settings.n, model.max_images);
    byId("n").max = model.max_images;
    byId("guidance-field").hidden = !model.takes_guidance;
    this.#offer(model);
    byId("steps").max = model.max_steps;
    for (const side of ["width", "height"]) {
      Object.assign(byId(side), { min: model.min_side, max: model.max_side, step: model.size_multiple });
    }
    byId("size-hint").textContent = `${model.min_side} to ${model.max_side} pixels in steps of ${model.size_multiple}`;
    this.references.setModel(model);
    this.referencesChanged();
    this.onModel(model);
  }

  /** Show the inputs of what only some models heed. */
  #offer(model) {
    byId("upsampling-field").hidden = model.prompt_upsampling === "never";
    byId("negative-field").hidden = !model.takes_negative;
    byId("negative-hint").textContent = hasScale(model)
      ? "Each step then takes twice as long."
      : "The guidance says how far to steer away from it.";
    // What is sent is seen.
    if (model.takes_negative && this.settings.negative !== "") byId("more").open = true;
  }

  /** Take over settings from an image; unknown models leave the model as it is. */
  recall(settings) {
    const { theme, model, ...others } = settings;
    Object.assign(this.settings, others);
    const known = this.models.find((each) => each.id === model);
    if (known !== undefined) {
      this.settings.model = known.id;
      this.setModel(known);
    }
    this.isSeedFresh = true;
    this.show();
  }

  /** Use a seed, and keep it. */
  keepSeed(seed) {
    Object.assign(this.settings, { seed, isLocked: true });
    this.show();
    announce(`Seed ${seed} is kept`);
  }

  /** Offer `match` where there are references, and use it when the first one comes. */
  referencesChanged() {
    const { settings } = this;
    const [first] = this.references.sent;
    const isThere = first !== undefined;
    if (isThere && !this.hadReferences) {
      this.shapeBefore = settings.shape;
      settings.shape = "match";
    }
    if (!isThere && settings.shape === "match") this.#choose(this.shapeBefore);
    if (isThere && settings.shape === "match") {
      [settings.width, settings.height] = sizeLike(this.model, first.width, first.height);
    }
    this.hadReferences = isThere;
    this.show();
  }

  /** Show the settings, and remember them. */
  show() {
    const { settings, model } = this;
    // Not while it is typed in: the cursor would jump to the end.
    if (byId("prompt").value !== settings.prompt) byId("prompt").value = settings.prompt ?? "";
    fitRows(byId("prompt"));
    for (const name of ["width", "height", "n", "seed", "previews", "format", "negative"]) {
      const input = byId(name);
      if (document.activeElement !== input && settings[name] !== null) input.value = settings[name];
    }
    byId("lock").setAttribute("aria-pressed", String(settings.isLocked));
    byId("lock").replaceChildren(icon(settings.isLocked ? "locked" : "unlocked"));
    byId("seed-hint").textContent = settings.isLocked
      ? "The same seed each time: change the words and compare."
      : "A new seed each time: the lock keeps this one.";
    if (model !== null) this.#showModelled();
    saveSettings(settings);
  }

  #showModelled() {
    const { settings, model } = this;
    byId("steps").value = settings.steps ?? model.default_steps;
    byId("steps-value").textContent = byId("steps").value;
    const shown = {
      guidance: model.default_guidance,
      scale: NEGATIVE_SCALE,
      strength: 1,
    };
    for (const [name, usual] of Object.entries(shown)) {
      byId(name).value = settings[name] ?? usual;
      byId(`${name}-value`).textContent = byId(name).value;
    }
    byId("upsampling").checked = settings.upsampling ?? model.prompt_upsampling === "default";
    byId("scale-field").hidden = !hasScale(model) || settings.negative.trim() === "";
    byId("strength-field").hidden = !model.takes_strength || !this.references.isPainted;
    byId("swap").disabled = settings.width === settings.height;
    for (const input of byId("presets").querySelectorAll("input")) {
      input.checked = input.value === settings.shape;
      if (input.value === "match") input.parentElement.hidden = !this.hadReferences;
    }
    byId("presets").classList.toggle("upright", settings.height > settings.width);
    this.#checkSize();
  }

  /** Return whether everything can be sent; else say what cannot, and go there. */
  check() {
    const { settings, model } = this;
    const isEmpty = settings.prompt.trim() === "";
    markField(byId("prompt"), byId("prompt-error"), isEmpty ? "Say what to generate." : "");
    const n = Number(byId("n").value);
    const isCount = Number.isInteger(n) && n >= 1 && n <= model.max_images;
    byId("n").setAttribute("aria-invalid", String(!isCount));
    const seed = byId("seed").value.trim();
    const isSeed = /^\d{1,16}$/.test(seed) && Number(seed) + n - 1 <= Number.MAX_SAFE_INTEGER;
    byId("seed").setAttribute("aria-invalid", String(!isSeed));
    if (!isCount) byId("seed-hint").textContent = `1 to ${model.max_images} images at once.`;
    if (!isSeed) byId("seed-hint").textContent = "A seed is a whole number, up to 9007199254740991.";
    const wrong = document.querySelector('.composer [aria-invalid="true"]');
    wrong?.focus();
    return isEmpty || !isCount || !isSeed || !this.#checkSize() ? false : wrong === null;
  }

  /** Use a new seed unless it is kept, or was just thrown. */
  nextSeed() {
    if (!this.settings.isLocked && !this.isSeedFresh) this.settings.seed = randomSeed();
    this.isSeedFresh = false;
    this.show();
  }

  /** Mark a field that the server named in an error. */
  blame(field, message) {
    if (field === "prompt") markField(byId("prompt"), byId("prompt-error"), message);
    if (["size", "width", "height"].includes(field)) byId("size-error").textContent = message;
  }

  #checkSize() {
    const { settings, model } = this;
    const isOurs = settings.shape !== "match";
    const problem = isOurs ? sizeProblem(model, settings.width, settings.height) : "";
    byId("size-error").textContent = problem;
    for (const side of ["width", "height"]) byId(side).setAttribute("aria-invalid", String(problem !== ""));
    return problem === "";
  }

  #choose(shape) {
    const { settings, model } = this;
    const ratio = Object.fromEntries(SHAPES)[shape];
    settings.shape = ratio === undefined ? "1:1" : shape;
    const isUpright = settings.height > settings.width;
    const [long, short] = sizeFor(model, ratio ?? 1);
    [settings.width, settings.height] = isUpright ? [short, long] : [long, short];
  }

  #makePresets() {
    const preset = (value, label, ratio) => {
      const input = el("input", { type: "radio", name: "shape", value });
      const sign = el("i", { className: "shape", "aria-hidden": "true" });
      sign.style.aspectRatio = String(ratio);
      const shown = ratio === null ? [label] : [sign, label];
      return el("label", {}, input, el("span", {}, ...shown));
    };
    byId("presets").append(
      preset("match", "As image", null),
      ...SHAPES.map(([name, ratio]) => preset(name, name, ratio)),
    );
  }

  #listen() {
    const { settings } = this;
    const on = (id, event, act) => byId(id).addEventListener(event, act);
    const change = (id, name, read) => on(id, "input", (event) => {
      settings[name] = read(event.target.value);
      this.show();
    });
    on("prompt", "input", (event) => {
      settings.prompt = event.target.value;
      markField(event.target, byId("prompt-error"), "");
      this.show();
    });
    on("model", "change", (event) => this.setModel(this.models.find((each) => each.id === event.target.value)));
    on("presets", "change", (event) => {
      if (event.target.value === "match") settings.shape = "match";
      else this.#choose(event.target.value);
      this.referencesChanged();
    });
    on("swap", "click", () => {
      [settings.width, settings.height] = [settings.height, settings.width];
      if (settings.shape === "match") settings.shape = "custom";
      this.show();
    });
    for (const side of ["width", "height"]) {
      on(side, "input", (event) => {
        Object.assign(settings, { [side]: Number(event.target.value), shape: "custom" });
        this.show();
      });
    }
    change("n", "n", (value) => Math.max(1, Math.trunc(Number(value)) || 1));
    change("steps", "steps", Number);
    for (const name of ["guidance", "scale", "strength"]) change(name, name, Number);
    change("negative", "negative", String);
    on("upsampling", "change", (event) => {
      settings.upsampling = event.target.checked;
      this.show();
    });
    change("previews", "previews", Number);
    change("format", "format", String);
    this.#listenToSeed();
    on("reset", "click", () => {
      Object.assign(settings, MODELS_OWN, { negative: "", previews: 2, format: "png", n: 1 });
      this.show();
    });
  }

  #listenToSeed() {
    const { settings } = this;
    byId("seed").addEventListener("input", (event) => {
      const typed = event.target.value.trim();
      event.target.setAttribute("aria-invalid", String(!/^\d{1,16}$/.test(typed)));
      // Who types a seed wants that one.
      if (/^\d{1,16}$/.test(typed)) Object.assign(settings, { seed: Number(typed), isLocked: true });
      this.show();
    });
    byId("dice").addEventListener("click", () => {
      settings.seed = randomSeed();
      this.isSeedFresh = true;
      this.show();
      announce(`Seed ${settings.seed}`);
    });
    byId("lock").addEventListener("click", () => {
      settings.isLocked = !settings.isLocked;
      this.show();
    });
  }
}

/** Make the prompt as high as its text, within reason. */
function fitRows(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(320, area.scrollHeight + 2)}px`;
}
