// Sets the colours before the first paint: a module would run after it, and the page would flash.
"use strict";

try {
  const { theme } = JSON.parse(localStorage.getItem("flux-ray") ?? "{}");
  if (theme === "light" || theme === "dark") {
    document.documentElement.dataset.theme = theme;
  }
} catch {
  // Without storage, or with something else in it, the system's colours are right.
}
