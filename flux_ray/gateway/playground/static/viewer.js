// The image that is looked at: how far it is, what made it, what to do with it, and comparing.

import { announce, button, byId, el, icon, seconds } from "./dom.js";
import { examplesFor } from "./models.js";

// Small images are shown this large, so that they can be looked at.
const LEAST_SHOWN_PX = 480;

/** The large image. `actions` are what its buttons do; `gallery` knows the other images. */
export class Viewer {
  constructor(gallery, actions) {
    Object.assign(this, { gallery, actions, item: null, other: null });
    this.place = byId("viewer");
    setInterval(() => this.#tick(), 100);
  }

  /** Show examples to begin with. */
  welcome(model) {
    if (this.item !== null) return;
    const cards = examplesFor(model).map((prompt) =>
      el("button", { type: "button", className: "example", onclick: () => this.actions.tryPrompt(prompt) }, icon("spark"), el("span", {}, prompt)),
    );
    this.place.replaceChildren(
      el("div", { className: "welcome" }, el("h2", {}, "What do you want to see?"), el("p", {}, "Write it on the left, or begin with one of these:"), ...cards),
    );
  }

  /** Show an image. While two are compared, a finished one becomes the second. */
  show(item) {
    const isComparing = this.other !== null;
    if (isComparing && item !== this.item && item.url !== null) this.other = beforeOf(item);
    else {
      this.item = item;
      this.other = null;
    }
    this.render();
  }

  /** Show a request from its first image on. */
  follow(item) {
    this.item = item;
    this.other = null;
    this.render();
    // On a phone it is below the form, which has the button that was pressed.
    if (this.place.getBoundingClientRect().top > innerHeight / 2) {
      this.place.scrollIntoView({ block: "start", behavior: "smooth" });
    }
  }

  /** Leave the comparison; return whether there was one. */
  leaveComparison() {
    const wasComparing = this.other !== null;
    this.other = null;
    if (wasComparing) this.render();
    return wasComparing;
  }

  /** Draw everything anew, if it is of that request. */
  refresh(run) {
    if (this.item?.run === run) this.render();
  }

  /** Show nothing. */
  clear() {
    this.item = this.other = null;
    this.gallery.mark(null, null);
  }

  render() {
    const { item } = this;
    const focused = this.place.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    this.gallery.mark(item, this.other?.item ?? null);
    const parts = [this.other === null ? this.#frame() : this.#comparison()];
    parts.push(el("p", { className: "words" }, item.run.fields.prompt));
    if (item.run.revised !== null) parts.push(el("p", { className: "words hint" }, `Written out: ${item.run.revised}`));
    if (item.url !== null) parts.push(this.#facts(), this.#buttons());
    else if (item.run.state !== "running") parts.push(this.#buttons());
    for (const warning of item.run.warnings) parts.push(el("p", { className: "warning" }, warning));
    this.place.replaceChildren(...parts);
    if (focused) (this.place.querySelector(`[data-name="${focused}"]`) ?? this.place).focus();
  }

  #sized(frame) {
    const [width, height] = this.item.run.size;
    const scale = Math.max(1, LEAST_SHOWN_PX / Math.max(width, height));
    frame.style.aspectRatio = `${width} / ${height}`;
    frame.style.setProperty("--wide", `${Math.round(width * scale)}px`);
    frame.style.setProperty("--ratio", String(width / height));
    return frame;
  }

  #frame() {
    const { item } = this;
    const { run } = item;
    const url = item.url ?? item.previewUrl;
    const frame = el("div", { className: "frame" });
    frame.dataset.state = item.url !== null ? "done" : run.state;
    frame.classList.toggle("empty", url === null);
    if (url !== null) {
      const alt = item.url !== null ? run.fields.prompt : `Preview: ${run.fields.prompt}`;
      frame.append(el("img", { src: url, alt, className: item.url === null ? "preview" : "" }));
    }
    if (item.url === null && run.state === "running") frame.append(this.#progress(run));
    if (item.url === null && run.state === "failed") frame.append(this.#failure(run));
    if (item.url === null && run.state === "cancelled") {
      frame.append(el("div", { className: "told" }, el("p", {}, "Cancelled")));
    }
    return this.#sized(frame);
  }

  #progress(run) {
    const { progress } = run.standing;
    const bar = el("progress", { max: 1, "aria-label": "Progress" });
    if (progress !== null) bar.value = progress;
    const words = el("span", { className: "standing" }, wordsFor(run));
    const clock = el("span", { className: "clock" }, seconds(elapsedS(run)));
    return el("div", { className: "progress" }, el("div", { className: "row" }, words, clock), bar);
  }

  #failure(run) {
    const again = el("button", { type: "button", className: "primary small", onclick: () => this.actions.again(run) }, "Try again");
    again.dataset.name = "again";
    const left = run.retryAtMs === null ? 0 : (run.retryAtMs - performance.now()) / 1000;
    const wait = el("p", { className: "wait" });
    if (left > 0) {
      again.disabled = true;
      wait.textContent = waitWords(left);
    }
    return el("div", { className: "told", role: "alert" }, el("h3", {}, run.error.heading), el("p", {}, run.error.message), wait, again);
  }

  /** Let clocks run without drawing everything anew. */
  #tick() {
    const run = this.item?.run;
    if (run === undefined) return;
    const clock = this.place.querySelector(".clock");
    if (clock !== null && run.state === "running") clock.textContent = seconds(elapsedS(run));
    const wait = this.place.querySelector(".wait");
    if (wait === null || run.retryAtMs === null) return;
    const left = (run.retryAtMs - performance.now()) / 1000;
    const text = left > 0 ? waitWords(left) : "";
    if (wait.textContent !== text) wait.textContent = text;
    this.place.querySelector('[data-name="again"]').disabled = left > 0;
  }

  #facts() {
    const { item } = this;
    const { run } = item;
    const facts = el("dl", { className: "facts" });
    const fact = (name, ...value) => facts.append(el("div", {}, el("dt", {}, name), el("dd", {}, ...value)));
    fact("Model", run.servedBy ?? run.fields.model);
    fact("Size", `${run.size[0]} × ${run.size[1]}`);
    const keep = el("button", { type: "button", className: "link", title: "Use this seed and keep it", "aria-label": `Use seed ${item.seed} and keep it`, onclick: () => this.actions.keepSeed(item.seed) }, String(item.seed));
    keep.dataset.name = "seed";
    fact("Seed", keep);
    if (item.tookS !== null) fact("Time", seconds(item.tookS));
    if (run.times !== null) fact("GPU", gpuWords(run));
    return facts;
  }

  #buttons() {
    const { item, actions } = this;
    const row = el("div", { className: "actions", role: "group", "aria-label": "This image" });
    const add = (name, symbol, text, act) => {
      const made = button(symbol, text, act);
      made.dataset.name = name;
      row.append(made);
    };
    if (item.url !== null) {
      add("download", "download", "Download", () => actions.download(item));
      if (this.actions.takesReferences()) add("reference", "image", "Edit this", () => actions.useAsReference(item));
      if (this.#candidate() !== null) {
        const isComparing = this.other !== null;
        add("compare", "compare", isComparing ? "Stop comparing" : "Compare", () => this.#toggleComparison());
      }
    }
    add("recall", "recall", "Use settings", () => actions.recall(item));
    add("code", "code", "Code", () => actions.code(item.run, item.seed));
    add("remove", "trash", "Remove", () => actions.remove(item));
    return row;
  }

  /** Return what to compare with at first: the image that was edited, else the one before. */
  #candidate() {
    const [first] = this.item.run.references;
    const label = this.item.run.model.takes_control ? "Control image" : "Reference";
    if (first !== undefined) return { url: first.url, label, item: null };
    const before = this.gallery.before(this.item);
    return before === null ? null : beforeOf(before);
  }

  #toggleComparison() {
    this.other = this.other === null ? this.#candidate() : null;
    this.render();
    announce(this.other === null ? "Comparison closed" : "Comparing: arrows move the divider, images below can be chosen");
  }

  #comparison() {
    const { item, other } = this;
    const after = el("img", { src: item.url, alt: `After: ${item.run.fields.prompt}` });
    const before = el("img", { src: other.url, alt: `Before: ${other.label}`, className: "before" });
    const line = el("i", { className: "divider", "aria-hidden": "true" });
    const slider = el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Before and after" });
    slider.dataset.name = "divider";
    const move = () => {
      before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
      line.style.left = `${slider.value}%`;
    };
    slider.addEventListener("input", move);
    move();
    const labels = [el("span", { className: "label left" }, other.label), el("span", { className: "label right" }, `Seed ${item.seed}`)];
    const frame = this.#sized(el("div", { className: "frame comparing" }, after, before, line, ...labels, slider));
    return el("div", { className: "compared" }, frame, el("p", { className: "hint" }, "Choose any image below to compare with it."));
  }
}

function beforeOf(item) {
  return { url: item.url, label: `Seed ${item.seed}`, item };
}

function elapsedS(run) {
  return (performance.now() - run.startedMs) / 1000;
}

function waitWords(leftS) {
  return `Trying again makes sense in ${Math.ceil(leftS)} s`;
}

/** Return the GPU seconds of an image; those of a request are shared by its images. */
function gpuWords(run) {
  const num = run.items.length;
  const each = seconds(run.times.gpu_s / num);
  return num === 1 ? each : `${each} each`;
}

/** Return where a request stands, in words. */
export function wordsFor(run) {
  const { phase, position, expectedS, progress } = run.standing;
  if (phase === "sending") return "Sending…";
  if (phase === "generating") return `Generating ${Math.round(progress * 100)} %`;
  if (phase !== "queued") return "Waiting…";
  const about = expectedS === null ? "" : `, about ${seconds(expectedS)}`;
  return position > 0 ? `${position} ahead in the queue${about}` : `Next in the queue${about}`;
}
