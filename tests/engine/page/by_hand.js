"use strict";
// Does with the page what a reader does, and leaves in it what was seen.
const plots = [...document.querySelectorAll(".plot")];
const said = {};
const points = (plot) => [...plot.querySelectorAll("path")].map((path) => path.getAttribute("d").split("L").length);
const note = (name, what = plots.map(points)) => { said[name] = what; };
const read = () => document.querySelector("output").textContent;
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const point = (type, x) => plots[0].dispatchEvent(new PointerEvent(type, {
  clientX: plots[0].getBoundingClientRect().left + x, pointerId: 1, button: 0, bubbles: true,
}));

plots[0].setPointerCapture = () => {}; // there is no such pointer
note("whole");
plots[0].focus();
press("End");
note("end", read());
press("ArrowLeft");
note("left", read());
press("+");
note("zoomed");
press("Escape");
note("escape");
const half = 56 + (plots[0].clientWidth - 68) / 2;
point("pointerdown", 56);
point("pointermove", half);
point("pointerup", half);
note("dragged");
document.querySelector("button.all").click();
note("button");
document.querySelector("[data-look='1']").click();
note("hidden");
note("loaded", performance.getEntriesByType("resource").map((entry) => entry.name));
const place = document.createElement("pre");
place.id = "said";
place.textContent = JSON.stringify(said);
document.body.append(place);
