// Ask the gateway that served this page: its models, and images as a stream of events.

// All paths are relative, as a gateway may be served below a prefix.
const BASE = new URL(".", document.baseURI);

const HEADINGS = {
  400: "That cannot be generated",
  401: "This server asks for an API key",
  402: "Nothing is left of this key's limit today",
  403: "This key may not do that",
  404: "That is not here",
  408: "The upload was too slow",
  413: "That is too large to send",
  415: "The server cannot read that",
  429: "Too busy right now",
  503: "Not available right now",
};

/** An error in words for people; `retryAfterS` is null where waiting does not help. */
export class ApiError extends Error {
  constructor(heading, message, { status = 0, code = "", field = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { heading, status, code, field, retryAfterS });
  }

  /** Return the error that an answer holds; what is no envelope is told by its status. */
  static async of(response) {
    const heading = HEADINGS[response.status] ?? "The server failed";
    const after = Number(response.headers.get("retry-after"));
    const told = { status: response.status, retryAfterS: after > 0 ? after : null };
    try {
      const { message, code, param } = (await response.json()).error;
      return new ApiError(heading, sentence(message), { ...told, code, field: param });
    } catch {
      return new ApiError(heading, `It answered with status ${response.status}.`, told);
    }
  }

  /** Return the error that an event of a stream holds. */
  static ofEvent({ error, retry_after_s = null }) {
    const heading = retry_after_s === null ? "It could not be finished" : HEADINGS[429];
    const told = { code: error.code, field: error.param ?? null, retryAfterS: retry_after_s };
    return new ApiError(heading, sentence(error.message), told);
  }
}

/** Return a message as a sentence. */
function sentence(text) {
  const whole = /[.!?]$/.test(text) ? text : `${text}.`;
  return whole[0].toUpperCase() + whole.slice(1);
}

/** Return the base URL that other clients use. */
export function baseUrl() {
  return new URL("v1", BASE).href;
}

function authorization(key) {
  return key === "" ? {} : { authorization: `Bearer ${key}` };
}

/** Fetch; raise ApiError where nobody answers or the answer is an error. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached", "Is it still running?");
  }
  if (!response.ok) throw await ApiError.of(response);
  return response;
}

/** Return the models of this gateway. */
export async function listModels(key) {
  const response = await ask("v1/models", { headers: authorization(key), cache: "no-store" });
  return (await response.json()).data;
}

/** Yield the events of a request: `{kind: "standing" | "preview" | "image", ...}`. */
export async function* generate(path, { body, headers }, key, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { ...headers, ...authorization(key) },
    body,
    signal,
  });
  for await (const block of blocksOf(response.body)) {
    const event = eventOf(block);
    if (event !== null) yield event;
  }
}

/** Yield the blocks of an event stream, which an empty line ends. */
async function* blocksOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting += value;
      const blocks = waiting.split("\n\n");
      waiting = blocks.pop();
      yield* blocks;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was cut", "The images after that are lost: try again.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return what a block says, or null for what the page does not need. */
export function eventOf(block) {
  if (block.startsWith(":")) return standingOf(block.slice(1).trim());
  const lines = block.split("\n");
  const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
  if (data.length === 0 || data[0] === "[DONE]") return null;
  const event = JSON.parse(data.join("\n"));
  if (event.error !== undefined) throw ApiError.ofEvent(event);
  const kind = event.type.endsWith(".partial_image") ? "preview" : "image";
  return { kind, ...event, blob: blobOf(event.b64_json, event.output_format) };
}

/** Return what a comment says of the request's place or progress. */
export function standingOf(comment) {
  const [phase, ...pairs] = comment.split(" ");
  const told = Object.fromEntries(pairs.map((pair) => pair.split("=")));
  const number = (text) => (text === undefined ? null : Number(text));
  return {
    kind: "standing",
    phase,
    position: number(told.position),
    expectedS: number(told.expected_s),
    progress: number(told.progress),
  };
}

function blobOf(base64, format) {
  const text = atob(base64);
  const bytes = Uint8Array.from(text, (each) => each.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}
