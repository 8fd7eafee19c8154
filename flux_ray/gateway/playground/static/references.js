// The images of a request: references in an order that prompts count by, or a control image.

import { announce, byId, el, icon } from "./dom.js";
import { emptyMask, layerOf, maskBlob } from "./mask.js";
import { missingImage } from "./models.js";

const DRAGGED = "application/x-flux-ray-reference";
// What the section says where a model takes these images.
const WORDS = {
  reference: {
    title: "Reference images",
    empty: "Drop, paste or choose images to edit",
    drop: "Drop images to use them as references",
  },
  control: {
    title: "Control image",
    empty: "Drop, paste or choose edges or depths",
    drop: "Drop the image of edges or depths to follow",
  },
};
// In so few pixels a transparent part of an image is looked for.
const LOOK_PX = 64;
let numMade = 0;

/** Return what a model's images are: references, or one control image. */
export function kindOf(model) {
  return model.takes_control ? "control" : "reference";
}

/** Return whether a part of an image is transparent. */
function hasHole(bitmap) {
  const context = new OffscreenCanvas(LOOK_PX, LOOK_PX).getContext("2d");
  context.drawImage(bitmap, 0, 0, LOOK_PX, LOOK_PX);
  const { data } = context.getImageData(0, 0, LOOK_PX, LOOK_PX);
  return data.some((value, at) => at % 4 === 3 && value < 128);
}

/** Return a reference made of an image file; raise where the browser cannot read it. */
export async function referenceOf(blob, name) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  const isErased = hasHole(bitmap);
  bitmap.close();
  numMade += 1;
  const url = URL.createObjectURL(blob);
  return { id: numMade, name, blob, url, width, height, isErased, mask: emptyMask() };
}

/** The images of either kind, each with its list. `onChange` is called after each change, `paint` opens the painter. */
export class References {
  constructor({ onChange, onProblem, paint }) {
    Object.assign(this, { onChange, onProblem, paint, model: null, max: 0, takesMask: false });
    // A photograph to edit is no control image: what one model takes, another does not get.
    this.kind = "reference";
    this.lists = { reference: [], control: [] };
    this.list = byId("reference-list");
    const files = byId("reference-files");
    byId("add-reference").addEventListener("click", () => files.click());
    files.addEventListener("change", async () => {
      const chosen = [...files.files];
      files.value = "";
      await this.add(chosen);
    });
    this.#listenToDrops();
    document.addEventListener("paste", (event) => {
      const pasted = [...event.clipboardData.files];
      if (pasted.length > 0 && !document.querySelector("dialog[open]")) {
        event.preventDefault();
        this.add(pasted);
      }
    });
  }

  get items() {
    return this.lists[this.kind];
  }

  /** Show what a model takes. References beyond its limit stay, marked as not sent. */
  setModel(model) {
    this.model = model;
    this.kind = kindOf(model);
    this.max = model.takes_control ? 1 : model.max_references;
    this.takesMask = model.takes_mask;
    const { title, drop } = WORDS[this.kind];
    byId("references-title").textContent = title;
    byId("reference-files").setAttribute("aria-label", title);
    byId("reference-files").multiple = this.max > 1;
    byId("dropping").firstElementChild.textContent = drop;
    byId("references").hidden = this.max === 0;
    this.render();
  }

  /** Return those that are sent. */
  get sent() {
    return this.items.slice(0, this.max);
  }

  /** Return whether the first one has a mask, as far as is known without painting it. */
  get isPainted() {
    return this.takesMask && this.sent.length > 0 && this.sent[0].mask.done.length > 0;
  }

  /** Return whether the model has the images that it needs; else say what is missing, and go there. */
  check(mask) {
    this.#showMissing(mask !== null);
    const told = byId("references-need");
    if (told.textContent === "") return true;
    told.className = "problem";
    announce(told.textContent);
    (this.list.querySelector(".mask-button") ?? byId("add-reference")).focus();
    return false;
  }

  /** Say what is missing. An image with a transparent part has its mask, where one is required. */
  #showMissing(isMasked) {
    const isErased = this.model.requires_mask && this.sent.some((each) => each.isErased);
    const told = byId("references-need");
    told.className = "hint warn";
    told.textContent = missingImage(this.model, this.sent.length, isMasked || isErased);
  }

  /** Return the mask of the first one as a PNG, or null. */
  async mask() {
    return this.takesMask && this.sent.length > 0 ? await maskBlob(this.sent[0]) : null;
  }

  /** Add image files as far as the model takes them. */
  async add(files) {
    for (const file of files) {
      if (this.items.length >= this.max) {
        this.onProblem(this.max === 0 ? "This model takes no references." : this.#full());
        break;
      }
      try {
        this.items.push(await referenceOf(file, file.name || `pasted-${numMade + 1}.png`));
        announce(`Added: ${this.#nameOf(this.items.length - 1)}`);
      } catch {
        this.onProblem(`${file.name || "That"} is no image that this browser can read.`);
      }
    }
    this.#changed();
  }

  /** Put these references in place of all. */
  replace(items) {
    this.lists[this.kind] = [...items];
    this.#changed();
  }

  #full() {
    const name = this.kind === "control" ? "control image" : "reference";
    return `This model takes ${this.max} ${name}${this.max === 1 ? "" : "s"}: remove one first.`;
  }

  #nameOf(index) {
    return this.kind === "control" ? "control image" : `reference ${index + 1}`;
  }

  #changed() {
    this.render();
    this.onChange();
  }

  #move(from, to) {
    if (to < 0 || to >= this.items.length) return;
    this.items.splice(to, 0, ...this.items.splice(from, 1));
    this.#changed();
    announce(`Moved to place ${to + 1} of ${this.items.length}`);
  }

  #remove(index) {
    this.items.splice(index, 1);
    this.#changed();
    const next = this.list.children[Math.min(index, this.items.length - 1)];
    (next?.querySelector(".remove") ?? byId("add-reference")).focus();
  }

  render() {
    this.list.replaceChildren(...this.items.map((item, index) => this.#cardOf(item, index)));
    byId("add-reference").hidden = this.items.length >= this.max;
    const isSlim = this.items.length > 0;
    byId("add-reference").classList.toggle("slim", isSlim);
    byId("add-reference").lastElementChild.textContent = isSlim ? "Add another" : WORDS[this.kind].empty;
    byId("references-hint").textContent = this.kind === "control" ? "required" : `up to ${this.max}`;
    this.#showMissing(this.isPainted);
  }

  #cardOf(item, index) {
    const isSent = index < this.max;
    const name = this.#nameOf(index);
    const small = (symbol, label, onclick, className = "") =>
      el("button", { type: "button", className: `mini ${className}`, title: label, "aria-label": `${label}: ${name}`, onclick }, icon(symbol));
    const tools = el("div", { className: "card-tools" });
    if (index > 0) tools.append(small("left", "Move left", () => this.#move(index, index - 1)));
    if (index < this.items.length - 1) {
      tools.append(small("right", "Move right", () => this.#move(index, index + 1)));
    }
    tools.append(small("close", "Remove", () => this.#remove(index), "remove"));
    const picture = el("div", { className: "thumb" }, el("img", { src: item.url, alt: `${name}: ${item.name}`, draggable: false }));
    const card = el("li", { className: isSent ? "card" : "card idle", draggable: true }, picture, tools);
    if (this.max > 1 || !isSent) {
      card.append(el("span", { className: "badge" }, isSent ? String(index + 1) : "not sent"));
    }
    if (index === 0 && isSent && this.takesMask) card.append(this.#maskButton(item, picture));
    card.addEventListener("dragstart", (event) => event.dataTransfer.setData(DRAGGED, String(index)));
    card.addEventListener("drop", (event) => {
      const from = event.dataTransfer.getData(DRAGGED);
      if (from === "") return;
      event.preventDefault();
      event.stopPropagation();
      this.#move(Number(from), index);
    });
    return card;
  }

  #maskButton(item, picture) {
    const isPainted = item.mask.done.length > 0;
    if (isPainted) picture.append(previewOf(item));
    const onclick = async () => {
      await this.paint(item);
      this.#changed();
      this.list.querySelector(".mask-button")?.focus();
    };
    const label = isPainted ? "Edit mask" : "Paint mask";
    return el("button", { type: "button", className: "mask-button", "aria-describedby": "references-need", onclick }, icon("brush"), label);
  }

  #listenToDrops() {
    const shade = byId("dropping");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      // Words may still be dropped into the prompt.
      if (hasFiles(event) || event.dataTransfer?.types.includes(DRAGGED)) event.preventDefault();
      if (hasFiles(event) && this.max > 0) shade.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) shade.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      shade.hidden = true;
      if (!hasFiles(event)) return;
      // Never leave the page for a file that missed its place.
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }
}

/** Return a small picture of a reference's mask, to lie over its thumbnail. */
function previewOf(item) {
  const layer = layerOf(item);
  const canvas = el("canvas", { width: Math.min(192, item.width), className: "mask-preview" });
  canvas.height = Math.round((canvas.width * item.height) / item.width);
  canvas.getContext("2d").drawImage(layer, 0, 0, canvas.width, canvas.height);
  return canvas;
}
