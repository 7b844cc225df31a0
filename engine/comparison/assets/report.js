"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent), root = document.documentElement;
const one = selector => document.querySelector(selector), many = selector => [...document.querySelectorAll(selector)];
const color = name => getComputedStyle(root).getPropertyValue(name).trim();
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 2});
const short = v => v == null ? "" : Math.abs(v) >= 1e4 ? compact.format(v) :
  v && Math.abs(v) < 1e-4 ? v.toExponential().replace(/(\.\d\d)\d+/, "$1") : String(+v.toPrecision(5));
const make = (tag, parent, textContent = "", className = "") =>
  Object.assign(parent.appendChild(document.createElement(tag)), {textContent, className});
const dot = (parent, number) => make("span", parent, "", "dot").style.background = `var(--run${number % 8})`;
let axis = "tokens", window_ = data.smooth, zoom = null, full = [0, 1], plots = [], shown = data.runs.map(() => true);

const smooth = values => {  // exponential mean, bias-corrected; what is no number is passed over
  const weight = 1 - 1 / window_;
  let mean = 0, count = 0;
  return values.map(v => v == null ? null : (mean = weight * mean + (1 - weight) * v) / (1 - weight ** ++count));
};
const longest = Math.max(0, ...data.runs.flatMap(run => run.tables.flatMap(table => table.hours ?? [])));
const [seconds, clock] = [[86400, "days"], [3600, "hours"], [60, "minutes"], [1, "seconds"]]
  .find(([size]) => longest * 3600 >= 2 * size || size === 1);
const scale = () => axis === "hours" ? 3600 / seconds : 1;
const label = () => ({tokens: `training ${data.unit}s`, steps: "optimizer steps", hours: `training time, ${clock}`})[axis];

function curve(table, name) {  // [x, y] where x rises, or null
  const xs = [], ys = [];
  (table[axis] ?? []).forEach((x, i) => {
    if (x != null && table[name][i] !== undefined && !(xs.length && x * scale() <= xs.at(-1)))
      xs.push(x * scale()), ys.push(table[name][i]);
  });
  return ys.some(y => y != null) ? [xs, ys] : null;
}

function lines(chart) {  // every curve of a chart: its points and how it is drawn
  const found = [];
  data.runs.forEach((run, number) => chart.names.forEach((name, place) => run.tables.forEach(table => {
    const points = shown[number] && table[name] ? curve(table, name) : null;
    if (!points) return;
    const hue = `--run${(data.runs.length > 1 ? number : place) % 8}`, text = data.labels[name];
    const title = data.runs.length === 1 ? text : chart.names.length > 1 ? `${run.label}, ${text}` : run.label;
    if (name === "loss" && window_ > 1) {
      found.push({points, hue, label: title, width: 0.7, alpha: 0.4, style: "raw"});
      found.push({points: [points[0], smooth(points[1])], hue, label: title, width: 1.6});
    } else found.push({points, hue, label: title, width: 1.6, dots: table.is_sparse && points[0].length < 60});
  })));
  if (chart.names.includes("val_loss") && found.length) data.references.forEach(curve => {
    const points = curve.level ? [full, [curve.level, curve.level]] : [curve[axis].map(x => x * scale()), curve.loss];
    if (points[0].length) found.push({points, hue: "--dim", label: curve.label, width: 1.2, dash: [5, 4]});
  });
  return found;
}

function draw(chart, place, found, width) {
  const tick = {stroke: () => color("--dim"), font: "12px system-ui", grid: {stroke: () => color("--grid"), width: 1},
    ticks: {stroke: () => color("--line"), width: 1, size: 4}};
  const series = found.map(line => ({label: line.label, class: line.style, width: line.width, alpha: line.alpha ?? 1,
    dash: line.dash, stroke: () => color(line.hue), points: {show: !!line.dots, size: 5, fill: () => color(line.hue)},
    value: (u, v, i, at) => short(at == null ? line.points[1].findLast(y => y != null) : v)}));
  const plot = new uPlot({
    width, height: chart.tall ? Math.min(400, Math.max(260, width * 0.42)) : 215, padding: [10, 8, 0, 0], series:
    [{label: {hours: clock, steps: "step", tokens: `${data.unit}s`}[axis], value: (u, v) => short(v) || "last"}, ...series],
    scales: {x: {time: false, range: () => zoom ?? full}, y: {range: (u, low, high) => low == null ? [0, 1] :
      uPlot.rangeNum(Math.min(low, chart.floor ?? low), high, {min: {pad: chart.floor ?? 0.06}, max: {pad: 0.06}})}},
    axes: [{...tick, values: (u, vs) => vs.map(v => short(v)), space: 60, label: label(), labelSize: 20, labelGap: 2,
      labelFont: "12px system-ui", size: 30}, {...tick, values: (u, vs) => vs.map(v => short(v)), size: 58}],
    cursor: {sync: {key: "all", setSeries: false}, drag: {x: true, y: false, setScale: false}, y: false, hover: {skip: [null]},
      points: {size: 7, show: (u, i) => series[i - 1].class !== "raw" && document.createElement("div")},
      bind: {dblclick: () => () => zoomTo(null)}},
    legend: {markers: {width: 0, fill: (u, i) => color(found[i - 1].hue)}},
    hooks: {setSelect: [u => {
      if (u.select.width > 3) zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
      u.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
    }]},
  }, uPlot.join(found.map(line => line.points)), place);
  for (const [touch, mouse] of [["touchstart", "mousedown"], ["touchmove", "mousemove"], ["touchend", "mouseup"]])
    plot.over.addEventListener(touch, event => {  // uPlot listens to a mouse alone
      const {clientX, clientY} = event.changedTouches[0];
      plot.over.dispatchEvent(new MouseEvent(mouse, {clientX, clientY, movementX: 1, bubbles: true}));
    }, {passive: true});
  return plot;
}

function zoomTo(range) {
  zoom = range, one("#reset").hidden = !range;
  const [min, max] = zoom ?? full;
  plots.forEach(plot => plot.setScale("x", {min, max}));
}

function build(paper = Infinity) {
  plots.forEach(plot => plot.destroy()), plots = [], one("#charts").textContent = "";
  const xs = data.runs.flatMap(run => run.tables.flatMap(table => table[axis] ?? [])).filter(x => x != null);
  full = [0, xs.reduce((a, b) => Math.max(a, b), 0) * scale() || 1];
  let points = 0;
  for (const chart of data.charts) {
    const found = lines(chart);
    if (!found.length) continue;
    const card = make("div", one("#charts"), "", chart.tall ? "card tall" : "card");
    make("small", make("h3", card, chart.title + " "), chart.note);
    plots.push(draw(chart, card, found, Math.min(card.clientWidth - 28, paper)));
    points += found.flatMap(line => line.points[1]).filter(y => y != null).length;
  }
  if (!plots.length) make("p", one("#charts"), data.nothing[axis], "card tall");
  many("nav fieldset button").forEach(button => button.setAttribute("aria-pressed", button.value === axis));
  one("#smooth").value = one("nav output").value = window_;
  root.dataset.points = points, root.dataset.charts = plots.length;
}

many("nav fieldset button").forEach(button => button.onclick = () => (axis = button.value, zoomTo(null), build()));
one("#smooth").oninput = event => (window_ = +event.target.value, build());
one("#reset").onclick = () => zoomTo(null);
if (data.runs.length > 1) data.runs.forEach((run, number) => {
  const chip = make("button", one("#chips"));
  dot(chip, number);
  chip.append(run.label), chip.setAttribute("aria-pressed", true);
  chip.onclick = () => (chip.setAttribute("aria-pressed", shown[number] = !shown[number]), build());
});

const steps = [...new Set(data.runs.flatMap(run => run.samples.map(([step]) => step)))].sort((a, b) => a - b);
const slider = one(".slide input");
function sample() {  // of each run the newest one up to the step
  const step = steps[slider.value], place = one(".cards");
  one(".slide output").value = step.toLocaleString("en"), place.textContent = "";
  data.runs.forEach((run, number) => {
    const found = run.samples.filter(([at]) => at <= step).at(-1);
    if (!found) return;
    const card = make("div", place, "", data.runs.length > 1 ? "card" : "card tall"), title = make("h3", card);
    dot(title, number), title.append(run.label + " "), make("small", title, `step ${found[0].toLocaleString("en")}`);
    make("pre", card, found[1]);
  });
}
if (steps.length) {
  one("#samples").hidden = false, slider.max = slider.value = steps.length - 1, slider.oninput = sample;
  sample();
}

build();
let wide = innerWidth;  // a phone's bars that come and go change the height alone
addEventListener("resize", () => innerWidth !== wide && (wide = innerWidth, build()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => build());
matchMedia("print").addEventListener("change", event => build(event.matches ? 670 : Infinity));
})();
