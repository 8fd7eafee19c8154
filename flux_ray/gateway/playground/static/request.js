// A request as it is sent and as it is copied as code: one place decides on its fields.

import { hasScale } from "./models.js";

/** Return the fields of a request, without those that are the model's defaults. */
export function fieldsOf(settings, model, isMasked) {
  const fields = { model: model.id, prompt: settings.prompt.trim() };
  if (settings.shape !== "match") fields.size = `${settings.width}x${settings.height}`;
  if (settings.n > 1) fields.n = settings.n;
  fields.seed = settings.seed;
  if (settings.steps !== null && settings.steps !== model.default_steps) {
    fields.num_inference_steps = settings.steps;
  }
  const isGuided = model.takes_guidance && settings.guidance !== null;
  if (isGuided && settings.guidance !== model.default_guidance) {
    fields.guidance_scale = settings.guidance;
  }
  const negative = settings.negative.trim();
  if (model.takes_negative && negative !== "") {
    fields.negative_prompt = negative;
    if (hasScale(model) && settings.scale !== null) fields.true_cfg_scale = settings.scale;
  }
  if (model.takes_strength && isMasked && settings.strength !== null && settings.strength !== 1) {
    fields.strength = settings.strength;
  }
  const isDefault = model.prompt_upsampling === "default";
  if (model.prompt_upsampling !== "never" && (settings.upsampling ?? isDefault) !== isDefault) {
    fields.prompt_upsampling = settings.upsampling;
  }
  if (settings.format !== "png") fields.output_format = settings.format;
  return fields;
}

/** Return the files of a request: its images, and the mask of the first one, if painted. */
export function filesOf(references, mask, model) {
  const field = model.takes_control ? "control_image" : "image[]";
  const files = references.map((each) => ({ field, name: each.name, blob: each.blob }));
  if (mask !== null) files.push({ field: "mask", name: "mask.png", blob: mask });
  return files;
}

/** Return the route for a request: edits have files. */
export function pathOf(files) {
  return files.length > 0 ? "v1/images/edits" : "v1/images/generations";
}

/** Return the body and headers that ask for a stream of events. */
export function bodyOf(fields, files, previews) {
  const streamed = { ...fields, stream: true };
  if (previews > 0) streamed.partial_images = previews;
  if (files.length === 0) {
    return { body: JSON.stringify(streamed), headers: { "content-type": "application/json" } };
  }
  const body = new FormData();
  for (const [name, value] of Object.entries(streamed)) body.append(name, String(value));
  for (const file of files) body.append(file.field, file.blob, file.name);
  return { body, headers: {} };
}

/** Return a name for the file of an image that says what it is. */
export function fileName(fields, seed, format) {
  const words = fields.prompt.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "").replace(/[^\p{L}\p{N}]+/gu, "-");
  const short = words.slice(0, 48).replace(/^-+|-+$/g, "") || "image";
  const model = fields.model.replace(/[^\w.-]+/g, "-");
  return `${model}-${short}-${seed}.${format === "jpeg" ? "jpg" : format}`;
}
