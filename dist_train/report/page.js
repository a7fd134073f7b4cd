"use strict";
// A run's chip shows and hides its curves.
for (const chip of document.querySelectorAll("button[data-run]")) {
  chip.addEventListener("click", () => {
    const shown = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(shown));
    for (const curve of document.querySelectorAll(`[id^="run${chip.dataset.run}-"]`)) {
      curve.style.display = shown ? "" : "none";
    }
  });
}
