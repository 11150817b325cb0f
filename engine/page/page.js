"use strict";
// Draws the charts. Those over the same axis share what part of it is seen, and which lines are.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg", HIGH = 230, LEFT = 56, RIGHT = 12, TOP = 22, BOTTOM = 34;
  const axes = new Map(); // name of an axis → what of it is seen: [low, high], or null for all

  const short = (v) => {
    const size = Math.abs(v);
    if (v !== 0 && (size < 1e-3 || size >= 1e6)) return v.toExponential(2).replace("e+", "e");
    return Number(v.toPrecision(size >= 1000 ? 6 : 4)).toLocaleString("en", { maximumFractionDigits: 9 });
  };

  const make = (name, attributes, parent, text) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };

  // Round numbers from low to high, about `many` of them.
  const ticks = (low, high, many) => {
    const raw = (high - low) / many, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
    return found;
  };

  class Plot {
    constructor(figure) {
      this.chart = charts[Number(figure.dataset.chart)];
      this.place = figure.querySelector(".plot");
      this.said = figure.querySelector("output");
      this.boxes = figure.closest("section").querySelectorAll("[data-look]");
      this.cursor = null; // a value of x
      this.place.addEventListener("pointerdown", (e) => this.press(e));
      this.place.addEventListener("pointermove", (e) => this.move(e));
      this.place.addEventListener("pointerup", (e) => this.release(e));
      this.place.addEventListener("pointerleave", () => { if (this.from === undefined) this.show(null); });
      this.place.addEventListener("dblclick", () => this.zoom(null));
      this.place.addEventListener("keydown", (e) => this.key(e));
      this.draw();
    }

    seen() {
      const hidden = new Set([...this.boxes].filter((box) => !box.checked).map((box) => Number(box.dataset.look)));
      return this.chart.series.filter((line) => !hidden.has(line.look));
    }

    // What lies within the part that is seen, and one point on either side of it.
    points(line, [low, high]) {
      return line.points.filter((_, k, all) => (all[k + 1] ?? all[k])[0] >= low && (all[k - 1] ?? all[k])[0] <= high);
    }

    whole() {
      const xs = this.chart.series.flatMap((line) => line.points.map((p) => p[0]));
      const [low, high] = [Math.min(...xs), Math.max(...xs)];
      return low === high ? [low - 0.5, high + 0.5] : [low, high];
    }

    draw() {
      const wide = Math.max(this.place.clientWidth, 200), lines = this.seen();
      const part = axes.get(this.chart.x) ?? this.whole(), u = this.chart.log ? Math.log : (v) => v;
      const ys = lines.flatMap((line) => this.points(line, part).map((p) => p[1]));
      let [low, high] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
      const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      [low, high] = [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
      const across = wide - LEFT - RIGHT, up = HIGH - TOP - BOTTOM;
      this.x = (v) => LEFT + across * (u(v) - u(part[0])) / (u(part[1]) - u(part[0]));
      this.back = (px) => {
        const at = u(part[0]) + (u(part[1]) - u(part[0])) * Math.min(1, Math.max(0, (px - LEFT) / across));
        return this.chart.log ? Math.exp(at) : at;
      };
      this.y = (v) => TOP + up * (1 - (v - low) / (high - low));
      const svg = document.createElementNS(NS, "svg");
      svg.setAttribute("viewBox", `0 0 ${wide} ${HIGH}`);
      svg.setAttribute("height", HIGH);
      svg.setAttribute("aria-hidden", "true");
      const name = `part-${this.chart.title}-${this.chart.x}`.replace(/\W+/g, "-");
      const clip = make("clipPath", { id: name }, make("defs", {}, svg));
      make("rect", { x: LEFT - 4, y: 0, width: across + 8, height: HIGH - BOTTOM + 4 }, clip);
      for (const v of ticks(low, high, 4)) {
        make("line", { class: "axis", x1: LEFT, x2: wide - RIGHT, y1: this.y(v), y2: this.y(v) }, svg);
        make("text", { x: LEFT - 6, y: this.y(v) + 4, "text-anchor": "end" }, svg, short(v));
      }
      const marks = this.chart.log ? [...new Set(lines.flatMap((line) => line.points.map((p) => p[0])))]
        : ticks(part[0], part[1], Math.max(2, Math.floor(across / 90)));
      for (const v of marks.filter((m) => m >= part[0] && m <= part[1])) {
        make("text", { x: this.x(v), y: HIGH - BOTTOM + 15, "text-anchor": "middle" }, svg, short(v));
      }
      make("text", { x: LEFT + across / 2, y: HIGH - 4, "text-anchor": "middle" }, svg, this.chart.x);
      make("text", { x: 2, y: 12 }, svg, this.chart.y);
      const inside = make("g", { "clip-path": `url(#${name})` }, svg);
      for (const line of lines) {
        const look = `s${line.look % 8} d${Math.floor(line.look / 8) % 4}`, points = this.points(line, part);
        const path = points.map(([a, b], k) => `${k ? "L" : "M"}${this.x(a).toFixed(1)} ${this.y(b).toFixed(1)}`);
        make("path", { class: look, d: path.join("") }, inside);
        if (!line.marked && points.length > 1) continue;
        for (const [a, b] of points) make("circle", { class: `s${line.look % 8}`, cx: this.x(a), cy: this.y(b), r: 2.5 }, inside);
      }
      this.at = make("line", { class: "at", y1: TOP, y2: HIGH - BOTTOM, x1: -9, x2: -9 }, svg);
      this.area = make("rect", { class: "part", y: TOP, height: up, x: 0, width: 0 }, svg);
      this.place.replaceChildren(svg);
      this.show(this.cursor);
    }

    // The values of all lines where they are nearest to x.
    show(x) {
      this.cursor = x;
      const px = x === null ? -9 : this.x(x);
      this.at.setAttribute("x1", px);
      this.at.setAttribute("x2", px);
      if (x === null) { this.said.textContent = ""; return; }
      const near = this.seen().filter((line) => line.points.length).map((line) => [line, line.points.reduce(
        (best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best))]);
      this.said.textContent = near.map(([line, p]) => `${line.name}: ${short(p[1])} at ${short(p[0])}`).join("; ");
    }

    within(event) { return event.clientX - this.place.getBoundingClientRect().left; }

    press(event) {
      if (event.button !== 0) return;
      this.from = this.within(event);
      this.place.setPointerCapture(event.pointerId);
    }

    move(event) {
      const px = this.within(event);
      if (this.from !== undefined) {
        this.area.setAttribute("x", Math.min(px, this.from));
        this.area.setAttribute("width", Math.abs(px - this.from));
      }
      this.show(this.back(px));
    }

    release(event) {
      const from = this.from, px = this.within(event);
      this.from = undefined;
      if (from === undefined) return;
      if (Math.abs(px - from) > 6) this.zoom([this.back(Math.min(px, from)), this.back(Math.max(px, from))]);
      else this.area.setAttribute("width", 0);
    }

    zoom(part) {
      axes.set(this.chart.x, part && part[0] < part[1] ? part : null);
      for (const plot of plots) if (plot.chart.x === this.chart.x) plot.draw();
    }

    key(event) {
      const part = axes.get(this.chart.x) ?? this.whole(), at = this.cursor ?? part[0];
      const xs = [...new Set(this.seen().flatMap((line) => line.points.map((p) => p[0])))].sort((a, b) => a - b);
      const inside = xs.filter((x) => x >= part[0] && x <= part[1]);
      const half = (part[1] - part[0]) / 4, all = this.whole();
      const actions = {
        ArrowRight: () => this.show(inside.find((x) => x > at) ?? inside.at(-1) ?? at),
        ArrowLeft: () => this.show(inside.findLast((x) => x < at) ?? inside[0] ?? at),
        Home: () => this.show(inside[0] ?? at),
        End: () => this.show(inside.at(-1) ?? at),
        "+": () => this.zoom([Math.max(at - half, all[0]), Math.min(at + half, all[1])]),
        "-": () => this.zoom([Math.max(at - 4 * half, all[0]), Math.min(at + 4 * half, all[1])]),
        Escape: () => this.zoom(null),
      };
      if (!(event.key in actions)) return;
      event.preventDefault();
      actions[event.key]();
    }
  }

  const plots = [...document.querySelectorAll("[data-chart]")].map((figure) => new Plot(figure));
  window.addEventListener("resize", () => plots.forEach((plot) => plot.draw()));
  for (const box of document.querySelectorAll("[data-look]")) {
    box.addEventListener("change", () => plots.forEach((plot) => plot.draw()));
  }
  for (const button of document.querySelectorAll("button.all")) {
    button.addEventListener("click", () => { axes.clear(); plots.forEach((plot) => plot.draw()); });
  }
})();
