// What `/v1/models` says of a model, in the words and numbers that the page needs.

export const SHAPES = [
  ["1:1", 1],
  ["4:3", 4 / 3],
  ["3:2", 3 / 2],
  ["16:9", 16 / 9],
];

// Prompts that show what a model is good at, by who made it.
const EXAMPLES = {
  "flux-ray": [
    "a red circle on a blue background",
    "a small green ring in the top left corner on a white background",
    "a purple square left of a small yellow cross on a black background",
  ],
  other: [
    "a red fox asleep in fresh snow, soft morning light, 85mm photograph",
    "an isometric cutaway of a tiny bookshop at night, warm windows, paper craft",
    "a poster that says \"OPEN LATE\" in bold risograph type, two colours",
  ],
};
const EDITS = {
  "flux-ray": "change the background to orange",
  other: "make it a watercolour painting",
};

/** Return example prompts for a model. */
export function examplesFor(model) {
  return EXAMPLES[model.owned_by] ?? EXAMPLES.other;
}

/** Return an example of an edit. */
export function exampleEdit(model) {
  return EDITS[model.owned_by] ?? EDITS.other;
}

// The gateway's `true_cfg_scale` of a negative prompt that comes without one.
export const NEGATIVE_SCALE = 4;

/** Return whether a negative prompt has a scale of its own; else the model's guidance is it. */
export function hasScale(model) {
  return model.takes_negative && model.default_true_cfg_scale <= 1;
}

/** Return what is missing of the images that a model cannot do without, or an empty text. */
export function missingImage(model, numImages, isMasked) {
  if (model.takes_control) {
    return numImages > 0 ? "" : "This model needs a control image: it follows the edges or depths in it.";
  }
  if (isMasked || !(model.requires_mask || (model.masks_only && numImages > 0))) return "";
  if (numImages === 0) return "This model needs an image, and a mask of the part to generate.";
  return "This model needs a mask: paint the part to generate.";
}

/** Return whether a model is an alias of one or more tiers. */
export function isAlias(model) {
  return model.tiers.length !== 1 || model.tiers[0] !== model.id;
}

/** Return a model in one line. */
export function describe(model) {
  if (!model.deployed) return "Not deployed now: requests would be answered 503.";
  const steps = `${model.default_steps} steps`;
  const served = isAlias(model) ? `served by ${model.tiers.join(" or ")} · ` : "";
  return `${served}${model.license} · ${steps} by default`;
}

/** Return the model to begin with: the one of the last visit, else the default, else any. */
export function firstModel(models, wanted) {
  return (
    models.find((each) => each.id === wanted) ??
    models.find((each) => each.is_default && each.deployed) ??
    models.find((each) => each.deployed) ??
    models[0]
  );
}

/** Return the nearest side that a model generates. */
function sideNear(model, side) {
  const rounded = Math.round(side / model.size_multiple) * model.size_multiple;
  return Math.min(model.max_side, Math.max(model.min_side, rounded));
}

/** Return [width, height] in that ratio near the model's default area, within its limits. */
export function sizeFor(model, ratio) {
  const side = Number(model.default_size.split("x")[0]);
  let width = sideNear(model, side * Math.sqrt(ratio));
  let height = sideNear(model, side / Math.sqrt(ratio));
  while (width * height > model.max_pixels) {
    if (width >= height) width -= model.size_multiple;
    else height -= model.size_multiple;
  }
  return [width, height];
}

/** Return the size that the gateway makes of a reference's when no size is sent. */
export function sizeLike(model, width, height) {
  const scale = Math.min(
    1,
    Math.sqrt(model.max_pixels / (width * height)),
    model.max_side / Math.max(width, height),
  );
  const fit = (side) => {
    const whole = Math.floor((side * scale + 1e-6) / model.size_multiple) * model.size_multiple;
    return Math.max(whole, model.min_side);
  };
  return [fit(width), fit(height)];
}

/** Return what is wrong with a size, in words, or an empty text. */
export function sizeProblem(model, width, height) {
  const { min_side, max_side, size_multiple, max_pixels } = model;
  for (const side of [width, height]) {
    if (!Number.isInteger(side) || side < min_side || side > max_side) {
      return `Each side has ${min_side} to ${max_side} pixels.`;
    }
    if (side % size_multiple !== 0) return `Each side is a multiple of ${size_multiple}.`;
  }
  if (width * height > max_pixels) {
    return `At most ${(max_pixels / 1e6).toFixed(2)} megapixels: make a side smaller.`;
  }
  return "";
}
