"""PAGE: the HTML of a comparison of runs, with the script that draws its plots as SVG.

compare fills in $title, $tables and $data. The page asks for nothing from elsewhere.
"""

from __future__ import annotations

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.15em; margin-top: 2em } .dim { color: #666 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em }
td, th { padding: .2em .9em .2em 0; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #bbb; font-weight: 600 }
tr:nth-child(even) td { background: #f6f6f6 }
#bar { position: sticky; top: 0; background: #fffe; padding: .5em 0; border-bottom: 1px solid #ddd; z-index: 1 }
#bar button, #bar select { font: inherit; margin: .1em .5em .1em 0; border: 1px solid #ccc; border-radius: 4px;
  background: #fff; padding: .1em .6em; cursor: pointer }
#bar button[aria-pressed=false] { opacity: .4; text-decoration: line-through }
#bar i { display: inline-block; width: 1em; height: .3em; margin-right: .5em; vertical-align: middle }
#plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em }
figure { margin: 0; position: relative } figcaption { font-weight: 600; font-size: .93em }
svg { width: 100%; height: auto; display: block; touch-action: none } svg text { font: 11px system-ui; fill: #555 }
.grid { stroke: #eee } .axis { stroke: #999 } .cross { stroke: #999; stroke-dasharray: 3 3 }
.tip { position: absolute; pointer-events: none; background: #fffe; border: 1px solid #bbb; border-radius: 4px;
  padding: .2em .5em; font-size: .85em; white-space: nowrap; font-variant-numeric: tabular-nums }
</style></head><body>
<h1>$title</h1>
<p class="dim">Click a run to hide or show it; double-click to see it alone. Drag over a plot to zoom, double-click it
to see all.</p>
<div id="bar"></div><div id="plots"></div>
<h2>Results</h2><div class="wide">
$tables
</div>
<noscript>The plots need JavaScript; the tables do not.</noscript>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, hidden = new Set(), W = 520, H = 300, M = { left: 52, right: 12, top: 10, bottom: 34 };
let byClock = false;

function node(name, attributes, parent, text) {
  const svg = ["svg", "g", "line", "path", "circle", "text", "rect", "clipPath"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(size >= 1 ? 4 : 3)));
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= raw * 0.999), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}

/* A plot of series() -> [{run, points: [[x, y], ...]}]; dots alone where it is a scatter. */
class Plot {
  constructor(title, xLabel, series, scatter) {
    Object.assign(this, { title, xLabel, series, scatter, zoom: null });
    this.figure = node("figure", { "data-plot": title }, document.getElementById("plots"));
    node("figcaption", {}, this.figure, title);
    this.svg = node("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title }, this.figure);
    this.tip = node("div", { class: "tip", hidden: "" }, this.figure);
    this.clip = "clip" + Plot.count++;
    this.svg.addEventListener("pointermove", event => this.move(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("pointerdown", event => { this.from = this.at(event)[0]; });
    this.svg.addEventListener("pointerup", event => this.up(event));
    this.svg.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
  }

  draw() {
    this.svg.replaceChildren();
    this.shown = this.series().filter(s => !hidden.has(s.run) && s.points.length);
    const all = this.shown.flatMap(s => s.points);
    this.figure.hidden = this.series().every(s => !s.points.length);
    if (!all.length) return;
    const xs = all.map(p => p[0]);
    let [x0, x1] = this.zoom || [Math.min(...xs), Math.max(...xs)];
    const inside = all.filter(p => p[0] >= x0 && p[0] <= x1), ys = (inside.length ? inside : all).map(p => p[1]);
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    y0 -= pad; y1 += pad;
    if (this.scatter) { const more = (x1 - x0) * 0.06; x0 -= more; x1 += more; }
    this.x = v => M.left + (v - x0) / (x1 - x0) * (W - M.left - M.right);
    this.y = v => H - M.bottom - (v - y0) / (y1 - y0) * (H - M.top - M.bottom);
    this.back = px => x0 + (px - M.left) / (W - M.left - M.right) * (x1 - x0);
    for (const t of ticks(y0, y1, 5)) {
      node("line", { class: "grid", x1: M.left, x2: W - M.right, y1: this.y(t), y2: this.y(t) }, this.svg);
      node("text", { x: M.left - 6, y: this.y(t) + 4, "text-anchor": "end" }, this.svg, short(t));
    }
    for (const t of ticks(x0, x1, 6))
      node("text", { x: this.x(t), y: H - M.bottom + 16, "text-anchor": "middle" }, this.svg, short(t));
    node("line", { class: "axis", x1: M.left, x2: W - M.right, y1: H - M.bottom, y2: H - M.bottom }, this.svg);
    node("text", { x: (W + M.left) / 2, y: H - 3, "text-anchor": "middle" }, this.svg, this.xLabel());
    const clip = node("clipPath", { id: this.clip }, this.svg);
    node("rect", { x: M.left - 4, y: 0, width: W - M.left - M.right + 8, height: H - M.bottom + 4 }, clip);
    const area = node("g", { "clip-path": `url(#${this.clip})` }, this.svg);
    for (const s of this.shown) {
      const { color, dash } = runs[s.run], points = s.points.map(p => [this.x(p[0]), this.y(p[1])]);
      if (!this.scatter) {
        const d = points.map((p, i) => (i ? "L" : "M") + p.map(v => v.toFixed(1)).join(" ")).join("");
        node("path", { d, fill: "none", stroke: color, "stroke-width": 2, "data-run": s.run,
          ...(dash ? { "stroke-dasharray": "6 3" } : {}) }, area);
      }
      if (this.scatter || points.length < 40)
        for (const [cx, cy] of points) node("circle", { cx, cy, r: this.scatter ? 5 : 2.2, fill: color }, area);
    }
    this.cross = node("g", {}, this.svg);
  }

  at(event) {
    const box = this.svg.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * W, (event.clientY - box.top) / box.height * H];
  }

  move(event) {
    if (!this.shown || !this.shown.length) return;
    const [px, py] = this.at(event), rows = [];
    this.cross.replaceChildren();
    if (this.from !== undefined && event.buttons)
      node("rect", { x: Math.min(px, this.from), y: M.top, width: Math.abs(px - this.from),
        height: H - M.top - M.bottom, fill: "#0072B2", opacity: 0.1 }, this.cross);
    const far = p => this.scatter ? Math.hypot(this.x(p[0]) - px, this.y(p[1]) - py) : Math.abs(this.x(p[0]) - px);
    for (const s of this.shown) {
      const p = s.points.reduce((best, q) => far(q) < far(best) ? q : best);
      if (this.scatter && far(p) > 25) continue;
      rows.push([s.run, p]);
      node("circle", { cx: this.x(p[0]), cy: this.y(p[1]), r: 4, fill: runs[s.run].color, stroke: "#fff" }, this.cross);
    }
    this.tip.hidden = !rows.length;
    if (!rows.length) return;
    if (!this.scatter)
      node("line", { class: "cross", x1: px, x2: px, y1: M.top, y2: H - M.bottom }, this.cross);
    this.tip.replaceChildren();
    for (const [run, p] of rows.sort((a, b) => b[1][1] - a[1][1])) {
      const row = node("div", {}, this.tip);
      node("span", { style: `color:${runs[run].color}` }, row, "\u25cf ");
      row.append(`${runs[run].label}: ${short(p[1])} at ${short(p[0])}`);
    }
    const box = this.figure.getBoundingClientRect(), left = event.clientX - box.left, width = this.tip.offsetWidth;
    this.tip.style.left = `${left + width + 20 > box.width ? Math.max(0, left - width - 14) : left + 14}px`;
    this.tip.style.top = `${event.clientY - box.top + 14}px`;
  }

  up(event) {
    const [px] = this.at(event);
    if (this.from !== undefined && this.back && Math.abs(px - this.from) > 12) {
      this.zoom = [this.back(Math.min(px, this.from)), this.back(Math.max(px, this.from))];
      this.draw();
    }
    this.from = undefined;
  }

  leave() {
    this.from = undefined;
    this.tip.hidden = true;
    if (this.cross) this.cross.replaceChildren();
  }
}
Plot.count = 0;

function curve(name) {
  return runs.map((run, i) => ({
    run: i,
    points: run.curves[name].map((y, e) => [byClock ? run.clock[e] : e + 1, y]).filter(p => p[1] !== null),
  }));
}
const xLabel = () => byClock ? "seconds of training" : "epoch";
const plots = Object.entries(data.curves).map(([name, title]) => new Plot(title, xLabel, () => curve(name), false));
const points = () => runs.map((run, i) => ({ run: i, points: run.point ? [[run.point.x, run.point.y]] : [] }));
const addsLeft = () => "share of the multiply-adds that is left";
plots.push(new Plot("test accuracy of the small network", addsLeft, points, true));
const redraw = () => plots.forEach(plot => plot.draw());

const bar = document.getElementById("bar"), buttons = runs.map((run, i) => {
  const button = node("button", { type: "button", "aria-pressed": "true" }, bar);
  node("i", { style: `background:${run.color}` }, button);
  button.append(run.label);
  const show = () => { buttons.forEach((b, j) => b.setAttribute("aria-pressed", String(!hidden.has(j)))); redraw(); };
  button.addEventListener("click", () => { hidden.has(i) ? hidden.delete(i) : hidden.add(i); show(); });
  button.addEventListener("dblclick", () => {
    const alone = runs.every((_, j) => j === i || hidden.has(j)) && !hidden.has(i);
    hidden.clear();
    if (!alone) runs.forEach((_, j) => { if (j !== i) hidden.add(j); });
    show();
  });
  return button;
});
const choice = node("select", { "aria-label": "horizontal axis" }, bar);
node("option", { value: "epoch" }, choice, "by epoch");
node("option", { value: "clock" }, choice, "by seconds of training");
choice.addEventListener("change", () => {
  byClock = choice.value === "clock";
  plots.forEach(plot => { if (!plot.scatter) plot.zoom = null; });
  redraw();
});
redraw();
</script></body></html>
"""
