// Paint which part of a reference is generated again: strokes that can be undone, kept with it.

import { byId } from "./dom.js";

const COLOUR = "#ff3d81";
const OVERLAY_ALPHA = 0.75;
const HATCH_PX = 14;

/** Return an empty mask: what was done to it, oldest first, and what was undone. */
export function emptyMask() {
  return { done: [], undone: [] };
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** Do one thing to the layer: a stroke, a loaded mask, or all of it at once. */
function apply(context, action, from = 0) {
  const { width, height } = context.canvas;
  context.save();
  context.fillStyle = context.strokeStyle = COLOUR;
  if (action.kind === "clear") context.clearRect(0, 0, width, height);
  if (action.kind === "load") {
    context.clearRect(0, 0, width, height);
    context.drawImage(action.layer, 0, 0);
  }
  if (action.kind === "invert") {
    context.globalCompositeOperation = "xor";
    context.fillRect(0, 0, width, height);
  }
  if (action.kind === "stroke") drawStroke(context, action, from);
  context.restore();
}

function drawStroke(context, { isErasing, size, points }, from) {
  if (isErasing) context.globalCompositeOperation = "destination-out";
  Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round" });
  const [first, ...rest] = points.slice(Math.max(0, from - 1));
  context.beginPath();
  context.arc(...first, size / 2, 0, 2 * Math.PI);
  context.fill();
  context.beginPath();
  context.moveTo(...first);
  for (const point of rest) context.lineTo(...point);
  context.stroke();
}

/** Return the mask of a reference as a layer: painted where it is generated again. */
export function layerOf(reference) {
  const layer = canvasOf(reference.width, reference.height);
  const context = layer.getContext("2d", { willReadFrequently: true });
  for (const action of reference.mask.done) apply(context, action);
  return layer;
}

/** Return the mask as a PNG, white on black, or null if nothing is painted. */
export async function maskBlob(reference) {
  if (reference.mask.done.length === 0) return null;
  const layer = layerOf(reference);
  const context = layer.getContext("2d");
  const { data } = context.getImageData(0, 0, layer.width, layer.height);
  let isPainted = false;
  for (let at = 0; at < data.length; at += 4) {
    // Brushes have soft edges, which are neither: the gateway would decide by their grey.
    const value = data[at + 3] >= 128 ? 255 : 0;
    isPainted ||= value === 255;
    data.fill(value, at, at + 3);
    data[at + 3] = 255;
  }
  if (!isPainted) return null;
  context.putImageData(new ImageData(data, layer.width), 0, 0);
  return await new Promise((resolve) => layer.toBlob(resolve, "image/png"));
}

/** Return a square of the pattern for what is painted: one colour would hide on some images. */
function hatch() {
  const tile = canvasOf(HATCH_PX, HATCH_PX);
  const inside = tile.getContext("2d");
  inside.fillStyle = COLOUR;
  inside.fillRect(0, 0, HATCH_PX, HATCH_PX);
  Object.assign(inside, { strokeStyle: "#fff", lineWidth: 2.5, lineCap: "square" });
  // Three strokes, so that the lines go on from tile to tile.
  for (const shift of [-HATCH_PX, 0, HATCH_PX]) {
    inside.beginPath();
    inside.moveTo(shift, HATCH_PX);
    inside.lineTo(shift + HATCH_PX, 0);
    inside.stroke();
  }
  return tile;
}

/** Draw the layer on a canvas of the screen's size, hatched. */
function drawHatched(layer, shown) {
  const context = shown.getContext("2d");
  context.globalCompositeOperation = "copy";
  context.drawImage(layer, 0, 0, shown.width, shown.height);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = context.createPattern(hatch(), "repeat");
  context.fillRect(0, 0, shown.width, shown.height);
}

/** Return a loaded mask as a layer, by the gateway's rule: transparent, else white is painted. */
function layerFrom(bitmap, width, height) {
  const layer = canvasOf(width, height);
  const context = layer.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  let hasHoles = false;
  for (let at = 3; at < data.length; at += 4) hasHoles ||= data[at] < 255;
  for (let at = 0; at < data.length; at += 4) {
    const luma = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
    const isPainted = hasHoles ? data[at + 3] === 0 : luma >= 128;
    data[at] = 0xff;
    data[at + 1] = 0x3d;
    data[at + 2] = 0x81;
    data[at + 3] = isPainted ? 255 : 0;
  }
  context.putImageData(pixels, 0, 0);
  return layer;
}

/** The dialog in which one mask at a time is painted. */
export class MaskPainter {
  constructor() {
    this.dialog = byId("mask-dialog");
    this.canvas = byId("mask-canvas");
    this.brush = byId("brush");
    this.stroke = null;
    this.cursor = null;
    this.#listenToPointer();
    this.#listenToKeys();
    const act = (id, action) => byId(id).addEventListener("click", action);
    act("mask-undo", () => this.#undo());
    act("mask-redo", () => this.#redo());
    act("mask-clear", () => this.#do({ kind: "clear" }));
    act("mask-invert", () => this.#do({ kind: "invert" }));
    act("mask-load", () => byId("mask-file").click());
    byId("mask-file").addEventListener("change", (event) => this.#load(event.target));
    this.brush.addEventListener("input", () => this.#draw());
    window.addEventListener("resize", () => this.dialog.open && this.#fit());
  }

  /** Paint the mask of a reference; resolves when the dialog is closed. */
  async open(reference) {
    this.reference = reference;
    this.bitmap = await createImageBitmap(reference.blob);
    this.layer = layerOf(reference);
    this.cursor = [reference.width / 2, reference.height / 2];
    this.dialog.showModal();
    this.#fit();
    this.canvas.focus();
    await new Promise((resolve) => this.dialog.addEventListener("close", resolve, { once: true }));
    this.bitmap.close();
  }

  get #size() {
    const { width, height } = this.reference;
    return Math.max(1, (Number(this.brush.value) / 100) * Math.min(width, height));
  }

  /** Make the canvas as large as there is room, in pixels of the screen. */
  #fit() {
    const room = this.canvas.parentElement.getBoundingClientRect();
    const { width, height } = this.reference;
    const scale = Math.min(room.width / width, room.height / height);
    this.scale = scale * devicePixelRatio;
    this.canvas.width = Math.round(width * this.scale);
    this.canvas.height = Math.round(height * this.scale);
    this.shown = canvasOf(this.canvas.width, this.canvas.height);
    this.canvas.style.width = `${width * scale}px`;
    this.canvas.style.height = `${height * scale}px`;
    this.#draw();
  }

  #draw() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.drawImage(this.bitmap, 0, 0, width, height);
    context.globalAlpha = OVERLAY_ALPHA;
    drawHatched(this.layer, this.shown);
    context.drawImage(this.shown, 0, 0);
    context.globalAlpha = 1;
    if (this.cursor !== null) this.#drawBrush(context);
    byId("mask-undo").disabled = this.reference.mask.done.length === 0;
    byId("mask-redo").disabled = this.reference.mask.undone.length === 0;
  }

  #drawBrush(context) {
    const [x, y] = this.cursor.map((value) => value * this.scale);
    for (const [colour, line] of [["#000a", 3], ["#fff", 1.5]]) {
      context.beginPath();
      context.arc(x, y, (this.#size / 2) * this.scale, 0, 2 * Math.PI);
      Object.assign(context, { strokeStyle: colour, lineWidth: line });
      context.stroke();
    }
  }

  #do(action) {
    this.reference.mask.done.push(action);
    this.reference.mask.undone.length = 0;
    apply(this.layer.getContext("2d"), action);
    this.#draw();
  }

  #undo() {
    const { done, undone } = this.reference.mask;
    if (done.length === 0) return;
    undone.push(done.pop());
    this.layer = layerOf(this.reference);
    this.#draw();
  }

  #redo() {
    const { done, undone } = this.reference.mask;
    if (undone.length === 0) return;
    done.push(undone.pop());
    this.layer = layerOf(this.reference);
    this.#draw();
  }

  async #load(input) {
    const [file] = input.files;
    input.value = "";
    if (file === undefined) return;
    const help = byId("mask-help");
    try {
      const bitmap = await createImageBitmap(file);
      const { width, height } = this.reference;
      this.#do({ kind: "load", layer: layerFrom(bitmap, width, height) });
      help.textContent = `${file.name} is loaded: white, or transparent, parts are generated again.`;
    } catch {
      help.textContent = `${file.name} is no image that this browser can read.`;
    }
  }

  #begin(point) {
    const isErasing = this.dialog.querySelector("[name=tool]:checked").value === "erase";
    this.stroke = { kind: "stroke", isErasing, size: this.#size, points: [point] };
    this.#do(this.stroke);
  }

  #extend(points) {
    const from = this.stroke.points.length;
    this.stroke.points.push(...points);
    apply(this.layer.getContext("2d"), this.stroke, from);
  }

  #pointOf(event) {
    const place = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - place.left) / place.width) * this.reference.width,
      ((event.clientY - place.top) / place.height) * this.reference.height,
    ];
  }

  #listenToPointer() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.cursor = this.#pointOf(event);
      this.#begin(this.cursor);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.cursor = this.#pointOf(event);
      const passed = event.getCoalescedEvents?.() ?? [];
      const events = passed.length > 0 ? passed : [event];
      if (this.stroke !== null) this.#extend(events.map((each) => this.#pointOf(each)));
      this.#draw();
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => (this.stroke = null));
    }
    canvas.addEventListener("pointerleave", () => {
      if (this.stroke !== null) return;
      this.cursor = null;
      this.#draw();
    });
  }

  #listenToKeys() {
    this.dialog.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
        event.preventDefault();
        if (event.shiftKey) this.#redo();
        else this.#undo();
      } else if (event.key === "[" || event.key === "]") {
        this.brush.value = Number(this.brush.value) + (event.key === "]" ? 3 : -3);
        this.#draw();
      } else if (event.target === this.canvas) this.#steer(event);
    });
    this.dialog.addEventListener("keyup", (event) => {
      if (event.key === " ") this.stroke = null;
    });
  }

  /** Move the brush by the arrow keys, and paint while the space bar is held. */
  #steer(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (move === undefined && event.key !== " ") return;
    event.preventDefault();
    const { width, height } = this.reference;
    const [x, y] = this.cursor ?? [width / 2, height / 2];
    const step = move === undefined ? 0 : Math.max(1, this.#size / 4);
    const [right, down] = move ?? [0, 0];
    this.cursor = [
      Math.min(width, Math.max(0, x + right * step)),
      Math.min(height, Math.max(0, y + down * step)),
    ];
    if (event.key === " " && this.stroke === null) this.#begin(this.cursor);
    else if (this.stroke !== null) this.#extend([this.cursor]);
    this.#draw();
  }
}
