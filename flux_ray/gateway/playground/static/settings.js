// What is remembered: settings in this browser, the API key in this tab, images nowhere.

const STORED = "flux-ray";
const KEY = "flux-ray-key";
// Random seeds are below 2**32, as those that the gateway picks.
const MAX_RANDOM = 2 ** 32;

export const DEFAULTS = {
  prompt: null,
  model: null,
  // `match` takes the size of the first reference; with `custom` the sides were typed in.
  shape: "1:1",
  width: null,
  height: null,
  n: 1,
  seed: null,
  isLocked: false,
  // null: the model's default.
  steps: null,
  guidance: null,
  negative: "",
  scale: null,
  strength: null,
  upsampling: null,
  previews: 2,
  format: "png",
  theme: null,
};

/** Return the settings of the last visit. What is not of its default's type is ignored. */
export function loadSettings() {
  const settings = { ...DEFAULTS, seed: randomSeed() };
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(STORED) ?? "{}") ?? {};
  } catch {
    return settings;
  }
  for (const name of Object.keys(DEFAULTS)) {
    const isSame = DEFAULTS[name] === null || typeof stored[name] === typeof DEFAULTS[name];
    if (stored[name] !== undefined && stored[name] !== null && isSame) settings[name] = stored[name];
  }
  return settings;
}

/** Remember the settings; where the browser forbids it, the page works without. */
export function saveSettings(settings) {
  try {
    localStorage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // Nothing to tell: the settings hold until the page is closed.
  }
}

/** Return the API key of this tab, or an empty text. */
export function loadKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Keep the API key in this tab; an empty one is forgotten. */
export function saveKey(key) {
  try {
    if (key === "") sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, key);
  } catch {
    // A browser that forbids storage: the key is asked for again.
  }
}

/** Return a random seed. */
export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % MAX_RANDOM;
}
