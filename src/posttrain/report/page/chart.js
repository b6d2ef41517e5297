"use strict";
// Charts (data-plot holds the data of each) that people can read, zoom and smooth.
const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const faint = (name, share) => css(name) + Math.round(255 * share).toString(16).padStart(2, "0");
const nice = v => {
  if (v !== 0 && Math.abs(v) < 1e-3) {
    const [mantissa, exponent] = v.toExponential(2).split("e");
    return `${Number(mantissa)}e${exponent}`.replaceAll("-", "−");
  }
  const decimals = v ? Math.max(0, 3 - Math.floor(Math.log10(Math.abs(v)))) : 0;
  return v.toLocaleString("en", { maximumFractionDigits: decimals }).replace("-", "−");
};
const percent = v => `${nice(100 * v)}%`;
const smoothing = () => Number(document.querySelector("#smoothing")?.value ?? 0);
const charts = [];

// Exponential moving average without a bias towards the first value, as in TensorBoard.
const ema = (values, weight) => {
  let mean = 0, total = 0;
  return values.map(v => {
    if (v == null) return v;
    mean = weight * mean + (1 - weight) * v;
    total = weight * total + 1 - weight;
    return mean / total;
  });
};

// Round values (1, 2 or 5 times a power of ten) between both ends of a logarithmic axis.
const logSplits = (u, axis, low, high) => {
  const out = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const m of [1, 2, 5]) if (m * 10 ** e >= low && m * 10 ** e <= high) out.push(m * 10 ** e);
  const tens = out.filter(v => /^1/.test(v.toExponential()));
  return out.length > 9 && tens.length > 1 ? tens : out;
};

class Chart {
  constructor(plot) {
    this.plot = plot;
    this.spec = JSON.parse(plot.dataset.plot);
    const figure = plot.closest("figure");
    this.out = figure.querySelector("output");
    this.rest = this.out ? this.out.textContent : "";
    this.stage = figure.closest("[data-sync]");
    this.logarithmic = false;
    const button = figure.querySelector("button.log");
    if (button) button.addEventListener("click", () => {
      this.logarithmic = !this.logarithmic;
      button.setAttribute("aria-pressed", this.logarithmic);
      this.build();
    });
    plot.addEventListener("keydown", event => this.key(event));
    plot.addEventListener("blur", () => this.read(null));
  }

  // Columns for uPlot: x, then of each series its values, their smoothed ones, and the limits of the band.
  columns() {
    const weight = smoothing();
    this.places = [];
    let place = 1;
    const tables = this.spec.series.map(s => {
      const table = [s.x, s.y], at = { value: place++ };
      if (s.smooth && weight) { table.push(ema(s.y, weight)); at.smooth = place++; }
      if (s.low) { table.push(s.low, s.high); at.low = place++; at.high = place++; }
      this.places.push(at);
      return table;
    });
    const joined = uPlot.join(tables);
    return this.logarithmic ? joined.map((c, i) => i ? c.map(v => v > 0 ? v : null) : c) : joined;
  }

  options() {
    const spec = this.spec, log = this.logarithmic, series = [{}], bands = [];
    spec.series.forEach((s, i) => {
      const at = this.places[i], dim = at.smooth !== undefined, line = s.line === undefined;
      series.push({
        stroke: () => dim ? faint(s.style, .3) : css(s.style), width: dim ? 1 : 2, spanGaps: true,
        dash: s.line === "dashed" ? [5, 5] : undefined, paths: s.line === "none" ? () => null : undefined,
        points: { show: Boolean(s.points) || (line && s.x.length === 1), size: 6, fill: () => css(s.style) },
      });
      if (dim) series.push({ stroke: () => css(s.style), width: 2, spanGaps: true, points: { show: false } });
      if (!s.low) return;
      const none = { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } };
      series.push(none, { ...none });
      if (!s.sizes) bands.push({ series: [at.high, at.low], fill: () => faint(s.style, .16) });
    });
    const axis = { stroke: () => css("muted"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: () => css("line"), width: 1 };
    const values = format => (u, splits) => splits.map(v => v == null ? "" : format(v));
    const size = (u, labels) => 14 + 7 * Math.max(3, ...(labels || []).map(v => v.length));
    const y = { ...axis, grid, size, gap: 6, space: 36, values: values(spec.percent ? percent : nice) };
    const x = { ...axis, grid: { show: false }, size: 26, gap: 4, space: 46, values: values(nice) };
    if (spec.x === "step") x.incrs = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].flatMap(e => [e, 2 * e, 5 * e]);
    const scales = { x: { time: false }, y: {} };
    if (spec.x_range) scales.x.range = spec.x_range;
    if (spec.x_log) {
      Object.assign(scales.x, { distr: 3, range: (u, a, b) => a < b ? [a, b] : [a / 2, a * 2] });
      Object.assign(x, { splits: logSplits, filter: (u, splits) => splits });
    }
    if (log) {
      Object.assign(scales.y, { distr: 3, range: (u, a, b) => a == null ? [.1, 1] : [a / 1.15, b * 1.15] });
      Object.assign(y, { splits: logSplits, filter: (u, splits) => splits });
    } else if (spec.y_range) scales.y.range = spec.y_range;
    const read = new Map(this.places.map((at, i) => [at.smooth ?? at.value, spec.series[i].style]));
    return {
      width: this.plot.clientWidth, height: this.plot.clientHeight, series, bands, scales, axes: [x, y],
      legend: { show: false }, padding: [12, 20, 0, 0],
      cursor: {
        y: false, drag: { x: true, y: false, dist: 4 },
        sync: this.stage ? { key: this.stage.dataset.sync, setSeries: false } : undefined,
        points: {
          size: 9, fill: (u, i) => read.has(i) ? css(read.get(i)) : "transparent",
          show: (u, i) => read.has(i) && document.createElement("div"),
        },
      },
      hooks: {
        setCursor: [u => this.read(u.cursor.left < 0 ? null : u.cursor.idx)],
        setScale: [(u, key) => key === "x" && this.zoomed(u)],
        draw: [u => this.marks(u)],
      },
    };
  }

  // Smoothing and the scale change the columns and axes, so the chart is made again; a zoom is kept.
  build() {
    const zoom = this.u && this.zoom;
    if (this.u) this.u.destroy();
    const data = this.columns();
    this.u = new uPlot(this.options(), data, this.plot);
    if (zoom) this.u.setScale("x", { min: zoom[0], max: zoom[1] });
  }

  size() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width) return;
    if (!this.u) this.build();
    else if (width !== this.u.width || height !== this.u.height) this.u.setSize({ width, height });
  }

  // A zoom of one chart shows the same steps in the stage's other charts.
  zoomed(u) {
    const { min, max } = u.scales.x, [left, right] = this.extent(), out = min <= left && max >= right;
    if (u !== this.u || out && !this.zoom) return;
    this.zoom = out ? null : [min, max];
    if (Chart.following || !this.stage) return;
    Chart.following = true;
    for (const c of charts) if (c !== this && c.u && c.stage === this.stage) {
      const [a, b] = out ? c.extent() : this.zoom;
      c.u.setScale("x", { min: a, max: b });
    }
    Chart.following = false;
  }

  extent() { return [this.u.data[0][0], this.u.data[0].at(-1)]; }

  // Skipped steps as dashed lines; points with intervals of their own (a reliability plot) as bars and discs.
  marks(u) {
    const ctx = u.ctx, ratio = devicePixelRatio, { left, top, width, height } = u.bbox;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left - 12 * ratio, top - 12 * ratio, width + 24 * ratio, height + 24 * ratio);
    ctx.clip();
    ctx.lineWidth = 1.5 * ratio;
    for (const step of this.spec.marks || []) {
      const at = u.valToPos(step, "x", true);
      ctx.strokeStyle = css("bad");
      ctx.setLineDash([4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(at, top);
      ctx.lineTo(at, top + height);
      ctx.stroke();
    }
    ctx.setLineDash([]);
    for (const s of this.spec.series) (s.sizes || []).forEach((size, i) => {
      const at = u.valToPos(s.x[i], "x", true), [y, low, high] = [s.y, s.low, s.high].map(c => u.valToPos(c[i], "y", true));
      ctx.strokeStyle = faint(s.style, .5);
      ctx.lineWidth = 2 * ratio;
      ctx.beginPath();
      ctx.moveTo(at, low);
      ctx.lineTo(at, high);
      ctx.stroke();
      ctx.fillStyle = css(s.style);
      ctx.beginPath();
      ctx.arc(at, y, ratio * size / 2, 0, 2 * Math.PI);
      ctx.fill();
      if (!this.spec.named) return;
      const right = at > left + width * .6;  // names stay inside the plot
      ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      ctx.textAlign = right ? "right" : "left";
      ctx.fillText(s.name, at + (right ? -1 : 1) * ratio * (size / 2 + 4), y - ratio * 6);
    });
    ctx.restore();
  }

  // New data in place of the old; a zoom, the scale and a place that is read are kept.
  update(text, rest) {
    if (text === this.plot.dataset.plot) return;
    this.plot.dataset.plot = text;
    this.spec = JSON.parse(text);
    this.rest = rest;
    if (this.u) this.build();
    if (this.out && this.at == null) this.out.textContent = rest;
  }

  // The caption tells the values at a place, or the last ones.
  read(i) {
    if (!this.out) return;
    this.at = i;
    if (i == null) { this.out.textContent = this.rest; this.out.classList.remove("read"); return; }
    const x = this.u.data[0][i], format = this.spec.percent ? percent : nice;
    const parts = [];
    this.spec.series.forEach((s, n) => {
      const at = this.places[n], value = this.u.data[at.value][i];
      if (value == null) return;
      const label = s.labels && s.labels[s.x.indexOf(x)];
      if (label) { parts.push(label); return; }
      if (s.line === "dashed") return;
      let text = (s.name ? s.name + " " : "") + format(value);
      if (at.smooth !== undefined) text += `, smoothed ${format(this.u.data[at.smooth][i])}`;
      if (at.low !== undefined) text += ` (${format(this.u.data[at.low][i])} to ${format(this.u.data[at.high][i])})`;
      parts.push(text);
    });
    if (!parts.length) { this.out.textContent = this.rest; return; }
    const width = this.spec.every || 1, first = Math.max(1, x - Math.floor((width - 1) / 2));
    const steps = width > 1 ? `steps ${nice(first)} to ${nice(first + width - 1)}` : `step ${x.toLocaleString("en")}`;
    this.out.textContent = (this.spec.x === "step" ? `${steps}: ` : "") + parts.join("; ");
    this.out.classList.add("read");
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || !this.u) return;
    event.preventDefault();
    const last = this.u.data[0].length - 1, from = this.at ?? (move < 0 ? last + 1 : -1);
    const i = Math.max(0, Math.min(last, from + move));
    this.u.setCursor({ left: this.u.valToPos(this.u.data[0][i], "x"), top: this.u.over.clientHeight / 2 });
  }
}

// Draw the charts below an element that are not drawn yet.
const drawCharts = root => {
  for (const plot of root.querySelectorAll(".plot[data-plot]")) if (!plot.chart) {
    const chart = plot.chart = new Chart(plot);
    charts.push(chart);
    chart.size();
    new ResizeObserver(() => chart.size()).observe(plot);
  }
};
addEventListener("input", event => {
  if (event.target.id !== "smoothing") return;
  event.target.nextElementSibling.textContent = smoothing().toFixed(2);
  for (const c of charts) if (c.u && c.spec.series.some(s => s.smooth)) c.build();
});
for (const query of ["(prefers-color-scheme: dark)", "print"])
  matchMedia(query).addEventListener("change", () => { for (const c of charts) if (c.u) c.u.redraw(false); });
drawCharts(document);
