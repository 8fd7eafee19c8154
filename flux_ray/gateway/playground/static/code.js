// Show a request as curl, Python or JavaScript; the key is in it only if that is asked for.

import { announce, byId, copyText, el } from "./dom.js";
import { baseUrl } from "./api.js";
import { pathOf } from "./request.js";

const PLACEHOLDER = "YOUR_KEY";

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const literal = (value) => JSON.stringify(value);
const pythonLiteral = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : literal(value));
const route = (files) => `${baseUrl().replace(/\/v1$/, "")}/${pathOf(files)}`;

/** Return the request for curl, whose answer Python's standard library unpacks. */
export function asCurl(fields, files, key) {
  const lines = [`curl -s ${shell(route(files))}`];
  if (key !== "") lines.push(`  -H ${shell(`authorization: Bearer ${key}`)}`);
  if (files.length === 0) {
    lines.push("  -H 'content-type: application/json'", `  -d ${shell(JSON.stringify(fields, null, 1))}`);
  } else {
    for (const [name, value] of Object.entries(fields)) {
      lines.push(`  --form-string ${shell(`${name}=${value}`)}`);
    }
    for (const file of files) lines.push(`  -F ${shell(`${file.field}=@"${file.name}"`)}`);
  }
  const ending = fields.output_format ?? "png";
  return `${lines.join(" \\\n")} | python3 -c '
import base64, json, sys
for image in json.load(sys.stdin)["data"]:
    open("image-%d.${ending}" % image["seed"], "wb").write(base64.b64decode(image["b64_json"]))'`;
}

/** Return the request for OpenAI's Python client. */
export function asPython(fields, files, key) {
  const { model, prompt, size, n, output_format, ...extra } = fields;
  const known = Object.entries({ model, prompt, size, n, output_format });
  const lines = known.filter(([, value]) => value !== undefined).map(([name, value]) => `    ${name}=${literal(value)},`);
  const more = Object.entries(extra).map(([name, value]) => `${literal(name)}: ${pythonLiteral(value)}`);
  // The client knows no such file: it goes as text, beside the fields that it does not know either.
  const control = files.find((file) => file.field === "control_image");
  if (control !== undefined) {
    more.push(`"control_image": base64.b64encode(open(${literal(control.name)}, "rb").read()).decode()`);
  }
  const images = files.filter((file) => file.field === "image[]");
  if (images.length > 0) {
    const opened = images.map((file) => `open(${literal(file.name)}, "rb")`).join(", ");
    lines.push(`    image=[${opened}],`);
  }
  if (files.some((file) => file.field === "mask")) lines.push('    mask=open("mask.png", "rb"),');
  lines.push(`    extra_body={${more.join(", ")}},`);
  return `import base64
from openai import OpenAI

client = OpenAI(base_url=${literal(baseUrl())}, api_key=${literal(key || "none")})
answer = client.images.${images.length > 0 ? "edit" : "generate"}(
${lines.join("\n")}
)
for image in answer.data:
    with open(f"image-{image.seed}.${output_format ?? "png"}", "wb") as file:
        file.write(base64.b64decode(image.b64_json))`;
}

/** Return the request for JavaScript without a library, as in Node. */
export function asJavaScript(fields, files, key) {
  const headers = {};
  if (key !== "") headers.authorization = `Bearer ${key}`;
  const lines = ['import { readFile, writeFile } from "node:fs/promises";', ""];
  if (files.length === 0) {
    headers["content-type"] = "application/json";
    lines.push(`const body = JSON.stringify(${JSON.stringify(fields, null, 2)});`);
  } else {
    lines.push("const body = new FormData();");
    for (const [name, value] of Object.entries(fields)) {
      lines.push(`body.append(${literal(name)}, ${literal(String(value))});`);
    }
    for (const { field, name } of files) {
      lines.push(`body.append(${literal(field)}, new Blob([await readFile(${literal(name)})]), ${literal(name)});`);
    }
  }
  return `${lines.join("\n")}
const response = await fetch(${literal(route(files))}, {
  method: "POST",
  headers: ${JSON.stringify(headers)},
  body,
});
if (!response.ok) throw new Error(await response.text());
for (const image of (await response.json()).data) {
  await writeFile(\`image-\${image.seed}.${fields.output_format ?? "png"}\`, image.b64_json, "base64");
}`;
}

const LANGUAGES = [
  ["curl", "curl", asCurl],
  ["python", "Python", asPython],
  ["javascript", "JavaScript", asJavaScript],
];

/** The dialog that shows a request as code. */
export class CodeDialog {
  constructor() {
    this.dialog = byId("code-dialog");
    this.language = "curl";
    this.tabs = LANGUAGES.map(([id, name]) =>
      el("button", { type: "button", role: "tab", id: `code-tab-${id}`, "aria-controls": "code-panel", onclick: () => this.#choose(id) }, name),
    );
    byId("code-tabs").append(...this.tabs);
    byId("code-tabs").addEventListener("keydown", (event) => this.#turn(event));
    byId("code-key").addEventListener("change", () => this.#render());
    byId("code-copy").addEventListener("click", async () => {
      await copyText(byId("code").textContent);
      byId("code-copy").textContent = "Copied";
      announce("Copied");
    });
  }

  /** Show a request. `key` is that of this tab, or an empty text. */
  open(fields, files, key) {
    Object.assign(this, { fields, files, key });
    byId("code-key").checked = false;
    byId("code-key-label").hidden = key === "";
    this.#render();
    this.dialog.showModal();
  }

  #choose(language) {
    this.language = language;
    this.#render();
  }

  #turn(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    const now = LANGUAGES.findIndex(([id]) => id === this.language);
    const next = (now + step + LANGUAGES.length) % LANGUAGES.length;
    this.#choose(LANGUAGES[next][0]);
    this.tabs[next].focus();
  }

  #render() {
    const shown = byId("code-key").checked ? this.key : this.key && PLACEHOLDER;
    LANGUAGES.forEach(([id, , write], index) => {
      const isChosen = id === this.language;
      this.tabs[index].setAttribute("aria-selected", String(isChosen));
      this.tabs[index].tabIndex = isChosen ? 0 : -1;
      if (isChosen) byId("code").textContent = write(this.fields, this.files, shown);
    });
    byId("code-panel").setAttribute("aria-labelledby", `code-tab-${this.language}`);
    byId("code-copy").textContent = "Copy";
  }
}
