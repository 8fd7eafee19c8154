// The reference images: dropped, pasted or chosen, in an order that prompts count by.

import { announce, byId, el, icon } from "./dom.js";
import { emptyMask, layerOf, maskBlob } from "./mask.js";

const DRAGGED = "application/x-flux-ray-reference";
const EMPTY = "Drop, paste or choose images to edit";
let numMade = 0;

/** Return a reference made of an image file; raise where the browser cannot read it. */
export async function referenceOf(blob, name) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  bitmap.close();
  numMade += 1;
  const url = URL.createObjectURL(blob);
  return { id: numMade, name, blob, url, width, height, mask: emptyMask() };
}

/** The list of references. `onChange` is called after each change, `paint` opens the painter. */
export class References {
  constructor({ onChange, onProblem, paint }) {
    Object.assign(this, { onChange, onProblem, paint, items: [], max: 0, takesMask: false });
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

  /** Show what a model takes. References beyond its limit stay, marked as not sent. */
  setModel(model) {
    this.max = model.max_references;
    this.takesMask = model.takes_mask;
    byId("references").hidden = this.max === 0;
    this.render();
  }

  /** Return those that are sent. */
  get sent() {
    return this.items.slice(0, this.max);
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
        announce(`Reference ${this.items.length} added`);
      } catch {
        this.onProblem(`${file.name || "That"} is no image that this browser can read.`);
      }
    }
    this.#changed();
  }

  /** Put these references in place of all. */
  replace(items) {
    this.items = [...items];
    this.#changed();
  }

  #full() {
    return `This model takes ${this.max} reference${this.max === 1 ? "" : "s"}: remove one first.`;
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
    byId("add-reference").lastElementChild.textContent = isSlim ? "Add another" : EMPTY;
    byId("references-hint").textContent = `up to ${this.max}`;
  }

  #cardOf(item, index) {
    const isSent = index < this.max;
    const name = `reference ${index + 1}`;
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
    card.append(el("span", { className: "badge" }, isSent ? String(index + 1) : "not sent"));
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
    return el("button", { type: "button", className: "mask-button", onclick }, icon("brush"), label);
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
