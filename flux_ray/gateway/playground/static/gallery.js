// All images of this session, newest first, as thumbnails.

import { byId, el } from "./dom.js";

/** The strip of thumbnails. `onSelect` is called with the image that was chosen. */
export class Gallery {
  constructor({ onSelect }) {
    this.onSelect = onSelect;
    // Newest request first, and its images in the order of their seeds.
    this.items = [];
    this.tiles = new Map();
    this.list = byId("gallery");
  }

  /** Add the images of a request that has begun. */
  add(items) {
    this.items.unshift(...items);
    this.list.prepend(
      ...items.map((item) => {
        const tile = el("button", { type: "button", className: "tile", onclick: () => this.onSelect(item) });
        this.tiles.set(item, tile);
        return el("li", {}, tile);
      }),
    );
    for (const item of items) this.update(item);
  }

  /** Show how an image stands now. */
  update(item) {
    const tile = this.tiles.get(item);
    if (tile === undefined) return;
    const { run } = item;
    const state = item.url !== null ? "done" : run.state;
    tile.dataset.state = state;
    tile.style.aspectRatio = `${run.size[0]} / ${run.size[1]}`;
    const words = `${run.fields.prompt}, seed ${item.seed}`;
    const told = { done: words, running: `Being generated: ${words}`, failed: `Failed: ${words}`, cancelled: `Cancelled: ${words}` };
    tile.setAttribute("aria-label", told[state]);
    tile.title = words;
    const url = item.url ?? item.previewUrl;
    tile.replaceChildren(url === null ? el("span", { className: "blank" }) : el("img", { src: url, alt: "" }));
    this.#count();
  }

  /** Mark the image that is shown, and the one that it is compared with. */
  mark(shown, other) {
    for (const [item, tile] of this.tiles) {
      tile.setAttribute("aria-pressed", String(item === shown));
      tile.classList.toggle("other", item === other);
    }
  }

  /** Take an image out; return the one beside it, or null. */
  remove(item) {
    const index = this.items.indexOf(item);
    this.items.splice(index, 1);
    this.tiles.get(item).parentElement.remove();
    this.tiles.delete(item);
    for (const url of [item.url, item.previewUrl]) if (url !== null) URL.revokeObjectURL(url);
    this.#count();
    return this.items[Math.min(index, this.items.length - 1)] ?? null;
  }

  /** Return the finished image that was made before this one, or null. */
  before(item) {
    const later = this.items.slice(this.items.indexOf(item) + 1);
    const others = this.items.filter((each) => each !== item);
    return [...later, ...others].find((each) => each.url !== null) ?? null;
  }

  #count() {
    byId("strip").hidden = this.items.length === 0;
    const done = this.items.filter((each) => each.url !== null).length;
    const num = `${done} image${done === 1 ? "" : "s"}`;
    byId("strip-hint").textContent = done === 0 ? "" : `${num}, gone when this tab is closed`;
  }
}
