// Show /openapi.json: routes, fields, answers, and a request for each to try.

import { byId, copyText, el } from "./dom.js";

const BASE = new URL(".", document.baseURI);
const METHODS = ["get", "post", "put", "delete"];
const EXAMPLE_PROMPT = "a red circle on a blue background";
// What people look for comes first; other tags follow as they are.
const ORDER = ["images", "models", "bfl"];
// What an example sends for a field or a part of a path, by its name.
const EXAMPLES = { prompt: EXAMPLE_PROMPT, inputs: EXAMPLE_PROMPT, model: "tiny", id: "JOB_ID" };

/** Return a schema with its reference followed. */
function resolved(schema, document) {
  if (schema?.$ref === undefined) return schema ?? {};
  return schema.$ref.split("/").slice(1).reduce((part, name) => part[name], document);
}

/** Return the type of a field in a few words. */
function typeOf(schema, document) {
  const own = resolved(schema, document);
  if (own.const !== undefined) return JSON.stringify(own.const);
  if (own.enum) return own.enum.map((each) => JSON.stringify(each)).join(" or ");
  const choices = own.anyOf ?? own.oneOf;
  if (choices) {
    const types = choices.filter((each) => each.description !== "the same as text");
    return [...new Set(types.map((each) => typeOf(each, document)))].filter((each) => each !== "null").join(" or ");
  }
  if (own.type === "array") return `list of ${typeOf(own.items, document)}`;
  if (own.format === "binary") return "file";
  return own.type ?? own.title ?? "any";
}

/** Return the limits of a field in words, or an empty text. */
function limitsOf(schema, document) {
  const own = resolved(schema, document);
  const parts = [own, ...(own.anyOf ?? [])];
  const least = parts.map((each) => each.minimum).find((each) => each !== undefined);
  const most = parts.map((each) => each.maximum).find((each) => each !== undefined);
  if (least === undefined && most === undefined) return "";
  if (most === undefined) return `at least ${least}`;
  return least === undefined ? `at most ${most}` : `${least} to ${most}`;
}

function fieldRow(name, schema, isRequired, document) {
  const own = resolved(schema, document);
  const said = [schema.description ?? own.description, limitsOf(schema, document)];
  if (own.default !== undefined && own.default !== null) said.push(`default ${JSON.stringify(own.default)}`);
  const cell = el("td", {}, el("code", {}, name));
  if (isRequired) cell.append(" ", el("span", { className: "must" }, "required"));
  return el("tr", {}, cell, el("td", {}, typeOf(schema, document)), el("td", {}, ...withCode(said.filter(Boolean).join("; "))));
}

/** Return a text with what stands in backticks as code. */
function withCode(text) {
  return text.split("`").map((part, index) => (index % 2 === 1 ? el("code", {}, part) : part));
}

function tableOf(rows) {
  const head = ["Field", "Type", "Meaning"].map((name) => el("th", { scope: "col" }, name));
  return el("table", { className: "fields" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}

function fieldsOf(schema, document) {
  const own = resolved(schema, document);
  const required = new Set(own.required ?? []);
  const entries = Object.entries(own.properties ?? {});
  entries.sort(([a], [b]) => Number(required.has(b)) - Number(required.has(a)));
  return entries.map(([name, each]) => fieldRow(name, each, required.has(name), document));
}

function parametersOf(operation, document) {
  const shown = (operation.parameters ?? []).map((each) => resolved(each, document));
  return shown.map((each) => fieldRow(`${each.name}`, { ...each.schema, description: [`in the ${each.in}`, each.description].filter(Boolean).join(": ") }, each.required, document));
}

/** Return a request that can be pasted into a terminal. */
function exampleOf(method, path, operation, document) {
  const where = path.replace(/\{(\w+)(:path)?\}/g, (_, name) => EXAMPLES[name] ?? name.toUpperCase());
  const lines = [`curl -s '${BASE.href.replace(/\/$/, "")}${where}'`];
  const content = operation.requestBody?.content ?? {};
  const form = content["multipart/form-data"];
  const schema = resolved((form ?? content["application/json"])?.schema, document);
  const required = schema.required ?? [];
  const body = Object.fromEntries(required.map((name) => [name, EXAMPLES[name] ?? "..."]));
  if (form !== undefined) {
    const { prompt = EXAMPLE_PROMPT } = body;
    lines.push(`  -F 'prompt=${prompt}'`, "  -F 'image=@image.png'");
  } else if (method === "post" && content["application/json"]) {
    lines.push("  -H 'content-type: application/json'", `  -d '${JSON.stringify(body)}'`);
  } else if (method === "post") lines.push("  -X POST");
  if (operation.security?.length) lines.splice(1, 0, "  -H 'authorization: Bearer YOUR_KEY'");
  return lines.join(" \\\n");
}

function answersOf(operation, document) {
  const parts = [];
  for (const [status, answer] of Object.entries(operation.responses ?? {})) {
    const types = Object.keys(answer.content ?? {});
    const title = `${status === "default" ? "Errors" : status}${types.length > 0 ? `: ${types.join(", ")}` : ""}`;
    const rows = fieldsOf(answer.content?.["application/json"]?.schema, document);
    if (rows.length === 0) continue;
    parts.push(el("details", {}, el("summary", {}, title), tableOf(rows)));
  }
  return parts;
}

function sectionOf(method, path, operation, document) {
  const id = operation.operationId ?? `${method}-${path}`;
  const about = operation.description ?? operation.summary ?? "";
  const title = el("h3", {}, el("span", { className: `method ${method}` }, method.toUpperCase()), el("code", {}, path));
  const section = el("section", { className: "route", id }, el("header", {}, title, el("p", {}, ...withCode(about))));
  const parameters = parametersOf(operation, document);
  if (parameters.length > 0) section.append(el("h4", {}, "Parameters"), tableOf(parameters));
  for (const [type, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
    const rows = fieldsOf(schema, document);
    if (rows.length > 0) section.append(el("h4", {}, `Body, as ${type}`), tableOf(rows));
  }
  const example = exampleOf(method, path, operation, document);
  const copy = el("button", { type: "button", className: "quiet", onclick: async () => {
    await copyText(example);
    copy.textContent = "Copied";
  } }, "Copy");
  section.append(el("div", { className: "row" }, el("h4", {}, "Example"), copy), el("pre", { tabIndex: 0 }, el("code", {}, example)));
  const answers = answersOf(operation, document);
  if (answers.length > 0) section.append(el("h4", {}, "Answers"), ...answers);
  return section;
}

function show(document_) {
  byId("version").textContent = `API ${document_.info.version}`;
  const tags = new Map();
  for (const [path, operations] of Object.entries(document_.paths)) {
    for (const method of METHODS.filter((each) => operations[each] !== undefined)) {
      const operation = operations[method];
      const tag = operation.tags?.[0] ?? "other";
      tags.set(tag, [...(tags.get(tag) ?? []), [method, path, operation]]);
    }
  }
  byId("status").remove();
  const place = ([tag]) => (ORDER.includes(tag) ? ORDER.indexOf(tag) : ORDER.length);
  for (const [tag, routes] of [...tags].sort((a, b) => place(a) - place(b))) {
    byId("contents").append(el("h2", {}, tag));
    for (const [method, path, operation] of routes) {
      const section = sectionOf(method, path, operation, document_);
      byId("content").append(section);
      byId("contents").append(el("a", { href: `#${section.id}` }, el("span", { className: `method ${method}` }, method.toUpperCase()), path));
    }
  }
  // The address may name a route, which was not there when the browser looked for it.
  if (location.hash.length > 1) byId(location.hash.slice(1))?.scrollIntoView();
}

try {
  const response = await fetch(new URL("openapi.json", BASE));
  if (!response.ok) throw new Error(`it answered with status ${response.status}`);
  show(await response.json());
} catch (error) {
  const place = byId("status") ?? byId("content");
  place.textContent = `The description cannot be shown: ${error.message}`;
}
