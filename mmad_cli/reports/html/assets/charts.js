// Line charts and histograms as inline SVG.

const CHART = { width: 268, height: 204, left: 36, right: 8, top: 7, bottom: 31 };
const DASHES = [null, "7 3", "2 3", "9 3 2 3"];
const dash = (index) => DASHES[Math.floor(index / 2) % DASHES.length];

function niceStep(span, count, least = 0) {
  const raw = Math.max(span / count, least);
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 2.5, 5, 10].find((step) => step * power >= raw * 0.999) || 10);
}

function ticks(low, high, count, least) {
  const step = niceStep(high - low || 1, count, least);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) {
    found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  }
  return found;
}

const tickText = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3
  ? value.toExponential(0) : String(Number(value.toPrecision(4))));

function interpolate(x, y, at) {
  let low = 0, high = x.length - 1;
  if (at <= x[0]) return y[0];
  if (at >= x[high]) return y[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle; else high = middle;
  }
  const span = x[high] - x[low];
  return span ? y[low] + ((y[high] - y[low]) * (at - x[low])) / span : y[high];
}

// series: [{name, x, y, style}], marks: [{x, text}]; `chance` draws the diagonal; `logY` takes positive values only
function lineChart({ title, words = title, area, xLabel, yLabel, series, xRange = [0, 1], yRange = [0, 1], marks = [], chance = false, logY = false, wholeX = false }) {
  const { width, height, left, right, top, bottom } = CHART;
  const [x0, x1] = xRange;
  const level = logY ? Math.log10 : (value) => value;
  const [y0, y1] = yRange.map(level);
  const px = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (value) => height - bottom - ((level(value) - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0",
    "aria-label": `${words}. ${area || ""} Left and right arrow keys read values.` });

  for (const value of ticks(x0, x1, 5, wholeX ? 1 : 0)) {
    plot.append(svg("line", { class: "grid", x1: px(value), x2: px(value), y1: top, y2: height - bottom }),
      svg("text", { x: px(value), y: height - bottom + 13, "text-anchor": "middle" }, tickText(value)));
  }
  const yTicks = logY ? logTicks(y0, y1) : ticks(yRange[0], yRange[1], 5);
  for (const value of yTicks) {
    plot.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
      svg("text", { x: left - 5, y: py(value) + 3.5, "text-anchor": "end" }, tickText(value)));
  }
  plot.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    svg("line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom }),
    svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    svg("text", { transform: `translate(9 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
  if (chance) plot.append(svg("line", { class: "chance", x1: px(x0), y1: py(x0), x2: px(x1), y2: py(x1) }));
  for (const mark of marks) {
    if (mark.x > x1) continue;
    plot.append(svg("line", { class: "mark", x1: px(mark.x), x2: px(mark.x), y1: top, y2: height - bottom }),
      svg("text", { x: px(mark.x) + 3, y: height - bottom - 4 - 11 * (mark.level || 0) }, mark.text));
  }
  for (const line of series) {
    const inside = line.x.findIndex((value) => value > x1);
    const count = inside < 0 ? line.x.length : inside;
    const points = [];
    for (let i = 0; i < count; i++) points.push(`${px(line.x[i]).toFixed(1)},${py(line.y[i]).toFixed(1)}`);
    if (inside > 0) points.push(`${px(x1).toFixed(1)},${py(interpolate(line.x, line.y, x1)).toFixed(1)}`);
    plot.append(svg("polyline", { class: `line s${line.style % 8}`, "stroke-dasharray": dash(line.style), points: points.join(" ") }));
  }
  const readout = el("div", { class: "readout" });
  addCursor(plot, readout, { series, px, x0, x1, top, bottom: height - bottom });
  return el("figure", { class: "chart" },
    el("figcaption", {}, title, area ? el("span", { class: "area" }, area) : null), plot, readout);
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const factor of high - low < 1.5 ? [1, 2, 5] : [1]) {
      const value = factor * 10 ** power;
      if (Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9) found.push(value);
    }
  }
  return found;
}

function addCursor(plot, readout, { series, px, x0, x1, top, bottom }) {
  const line = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  plot.append(line);
  let at = null;
  const show = (value) => {
    at = value === null ? null : clamp(value, x0, x1);
    line.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at === null) { readout.textContent = ""; return; }
    line.setAttribute("x1", px(at));
    line.setAttribute("x2", px(at));
    const values = series.map((one) => (series.length > 1 ? `${one.name} ` : "") + tickText(interpolate(one.x, one.y, at)));
    readout.textContent = `at ${tickText(at)}: ${values.join(", ")}`;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * CHART.width;
    show(x0 + ((x - px(x0)) / (px(x1) - px(x0) || 1)) * (x1 - x0));
  });
  plot.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
    if (!step) return;
    event.preventDefault();
    show((at === null ? x0 : at) + step * (x1 - x0));
  });
}

const LIMITS = [[0.01, "1 %", 1], [0.05, "5 %", 0], [0.1, "10 %", 0], [0.3, "30 %", 0]];

function drawCurves() {
  const results = resultsOf(state.category);
  const charts = byId("curve-charts");
  const legend = byId("curve-legend");
  charts.replaceChildren();
  legend.replaceChildren();
  const taken = (kind, curve) => results.filter((one) => one[kind] && one[kind][curve]).map((one) => ({
    name: data.runs[one.run].label, x: one[kind][curve][0], y: one[kind][curve][1], style: one.run }));
  const area = (metric) => {
    const result = state.result;
    const value = result ? result.metrics[metric] : undefined;
    return value === undefined || value === null ? "" : `${data.metrics[metric][0]} ${number(value)}`;
  };
  const rates = { xLabel: "false-positive rate", yLabel: "true-positive rate", chance: true };
  const precision = { xLabel: "recall", yLabel: "precision" };
  const specs = [
    ["image", "roc", { title: "ROC, images", words: "ROC curve of the image scores", area: area("i_auroc"), ...rates }],
    ["image", "pr", { title: "PR, images", words: "Precision-recall curve of the image scores", area: area("i_ap"), ...precision }],
    ["pixel", "pro", { title: "PRO, pixels", words: "Per-region overlap with the limits of the false-positive rate", area: area("aupro_30"), xLabel: "false-positive rate",
      yLabel: "per-region overlap", xRange: [0, 0.35], marks: LIMITS.map(([x, text, up]) => ({ x, text, level: up })) }],
    ["pixel", "roc", { title: "ROC, pixels", words: "ROC curve of all pixels", area: area("p_auroc"), ...rates }],
    ["pixel", "pr", { title: "PR, pixels", words: "Precision-recall curve of all pixels", area: area("p_ap"), ...precision }],
  ];
  for (const [kind, curve, options] of specs) {
    const series = taken(kind, curve);
    if (series.length) charts.append(lineChart({ ...options, series }));
  }
  const shown = state.result || {};
  const notes = [
    shown.error ? `failed: ${shown.error}` : null,
    shown.image && shown.image.reason ? `No curves of images: ${shown.image.reason}.` : null,
    shown.pixel && shown.pixel.reason ? `No curves of pixels: ${shown.pixel.reason}.` : null,
    shown.pixel && shown.pixel.note ? shown.pixel.note : null,
    !shown.pixel && shown.samples && shown.samples.length
      ? "No curves of pixels: they need the maps and the ground truth of all test samples." : null,
  ].filter(Boolean);
  for (const note of notes) charts.append(el("p", { class: "muted" }, note));
  if (results.length > 1) for (const one of results) legend.append(legendEntry(one.run, data.runs[one.run].label));
}

function legendEntry(style, text) {
  return el("span", {}, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" },
    svg("line", { class: `line s${style % 8}`, "stroke-dasharray": dash(style), x1: 0, x2: 26, y1: 5, y2: 5 })), text);
}

// -- scores ------------------------------------------------------------------------------------------------------

const BINS = 40;
const ROW = { height: 46, label: 128, right: 92 };

function defectsOf(result) {
  const names = [...new Set(result.samples.map((sample) => sample.defect))];
  const isGood = (name) => result.samples.some((sample) => sample.defect === name && sample.label === 0);
  return names.sort((a, b) => isGood(b) - isGood(a) || a.localeCompare(b));
}

function scoreRange(result) {
  const scores = result.samples.map((sample) => sample.score);
  const low = Math.min(...scores), high = Math.max(...scores);
  const margin = (high - low || Math.abs(high) || 1) * 0.03;
  return [low - margin, high + margin];
}

const histogram = { svg: null, line: null, found: [], toX: null, toScore: null };

function drawHistogram() {
  const holder = byId("histogram");
  holder.replaceChildren();
  histogram.svg = null;
  const result = state.result;
  if (!result || !result.samples.length) {
    holder.append(el("p", { class: "muted" }, "There are no scores of single samples for this category."));
    return;
  }
  const narrow = holder.clientWidth > 0 && holder.clientWidth < 600;
  const width = narrow ? 350 : 1100;
  const labelWidth = narrow ? 88 : ROW.label;
  const rightWidth = narrow ? 82 : ROW.right;
  const defects = defectsOf(result);
  const height = defects.length * ROW.height + 30;
  const [low, high] = scoreRange(result);
  const plotWidth = width - labelWidth - rightWidth;
  histogram.toX = (value) => labelWidth + ((value - low) / (high - low)) * plotWidth;
  histogram.toScore = (x) => low + (clamp(x - labelWidth, 0, plotWidth) / plotWidth) * (high - low);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Histograms of the image scores of ${state.category}, a row per defect type` });
  const bins = narrow ? 20 : BINS;
  const counts = new Map(defects.map((name) => [name, new Array(bins).fill(0)]));
  for (const sample of result.samples) {
    counts.get(sample.defect)[clamp(Math.floor(((sample.score - low) / (high - low)) * bins), 0, bins - 1)] += 1;
  }
  const most = Math.max(...[...counts.values()].flat());
  histogram.found = [];
  defects.forEach((name, index) => {
    const base = (index + 1) * ROW.height;
    const samples = result.samples.filter((sample) => sample.defect === name);
    const good = samples[0].label === 0;
    plot.append(svg("line", { class: "grid", x1: labelWidth, x2: width - rightWidth, y1: base, y2: base }));
    const short = name.length > (narrow ? 13 : 18) ? `${name.slice(0, narrow ? 12 : 17)}…` : name;
    plot.append(svg("text", { class: "label", x: labelWidth - 8, y: base - 14, "text-anchor": "end" }, short, svg("title", {}, name)),
      svg("text", { x: labelWidth - 8, y: base - 2, "text-anchor": "end" }, samples.length === 1 ? "1 sample" : `${samples.length} samples`));
    counts.get(name).forEach((count, bin) => {
      if (!count) return;
      const size = (count / most) * (ROW.height - 8);
      plot.append(svg("rect", { class: good ? "bar-good" : "bar-defect", x: labelWidth + (bin * plotWidth) / bins + 0.75,
        y: base - size, width: plotWidth / bins - 1.5, height: size }, svg("title", {}, `${count} of ${samples.length}`)));
    });
    const text = svg("text", { x: width - rightWidth + 8, y: base - 8 });
    plot.append(text);
    histogram.found.push({ text, samples, good });
  });
  for (const value of ticks(low, high, narrow ? 4 : 9)) {
    plot.append(svg("text", { x: histogram.toX(value), y: height - 14, "text-anchor": "middle" }, tickText(value)));
  }
  plot.append(svg("text", { x: labelWidth + plotWidth / 2, y: height - 2, "text-anchor": "middle" }, "image score"));
  histogram.line = svg("line", { class: "threshold", y1: 0, y2: height - 26 });
  plot.append(histogram.line);
  histogram.svg = plot;
  let dragging = false;
  const set = (event) => {
    const box = plot.getBoundingClientRect();
    setThreshold(histogram.toScore(((event.clientX - box.left) / box.width) * width));
  };
  plot.addEventListener("pointerdown", (event) => { dragging = true; plot.setPointerCapture(event.pointerId); set(event); });
  plot.addEventListener("pointermove", (event) => { if (dragging) set(event); });
  plot.addEventListener("pointerup", () => { dragging = false; });
  plot.addEventListener("pointercancel", () => { dragging = false; });
  holder.append(plot);
  const slider = byId("threshold");
  slider.min = low;
  slider.max = high;
}

function setThreshold(value) {
  if (!state.result || !Number.isFinite(value)) return;
  state.threshold = value;
  changed("threshold");
}

function drawThreshold() {
  const result = state.result;
  const text = byId("confusion");
  text.replaceChildren();
  for (const id of ["threshold", "threshold-number", "threshold-best"]) byId(id).disabled = !result || !result.samples.length;
  byId("threshold-best").disabled = !result || result.threshold === null;
  if (!result || !result.samples.length) return;
  if (state.threshold === null) state.threshold = scoreRange(result)[1];
  const value = state.threshold;
  byId("threshold").value = value;
  if (document.activeElement !== byId("threshold-number")) byId("threshold-number").value = Number(value.toPrecision(6));
  if (histogram.line) {
    const x = histogram.toX(clamp(value, ...scoreRange(result)));
    histogram.line.setAttribute("x1", x);
    histogram.line.setAttribute("x2", x);
  }
  const count = { TP: 0, TN: 0, FP: 0, FN: 0 };
  for (const sample of result.samples) count[verdict(sample)] += 1;
  for (const [name, words] of Object.entries(VERDICTS)) text.append(el("span", {}, `${words}s `, el("b", {}, String(count[name]))));
  const share = (a, b) => (b ? number(a / b) : "n/a");
  text.append(el("span", {}, "precision ", el("b", {}, share(count.TP, count.TP + count.FP))),
    el("span", {}, "recall ", el("b", {}, share(count.TP, count.TP + count.FN))),
    el("span", {}, "F1 ", el("b", {}, share(2 * count.TP, 2 * count.TP + count.FP + count.FN))));
  for (const row of histogram.found) {
    const above = row.samples.filter((sample) => sample.score >= value).length;
    row.text.textContent = row.good ? `${above} false alarm${above === 1 ? "" : "s"}` : `${above} of ${row.samples.length} found`;
  }
}

// -- training ----------------------------------------------------------------------------------------------------

function drawTraining() {
  const trained = data.results.some((one) => Object.keys(one.training || {}).length);
  byId("training").hidden = byId("training-link").hidden = !trained;
  if (!trained) return;
  const charts = byId("training-charts");
  charts.replaceChildren();
  byId("training-legend").replaceChildren();
  const results = resultsOf(state.category).filter((one) => Object.keys(one.training).length);
  if (results.length > 1) for (const one of results) byId("training-legend").append(legendEntry(one.run, data.runs[one.run].label));
  for (const name of [...new Set(results.flatMap((one) => Object.keys(one.training)))]) {
    const series = results.filter((one) => (one.training[name] || []).length).map((one) => ({ name: data.runs[one.run].label,
      x: one.training[name].map((_, index) => index + 1), y: one.training[name], style: one.run }));
    if (!series.length) continue;
    const values = series.flatMap((line) => line.y);
    const low = Math.min(...values), high = Math.max(...values);
    const logY = low > 0 && high / low > 20;
    const margin = (high - low || Math.abs(high) || 1) * 0.05;
    charts.append(lineChart({ title: `loss: ${name}`, area: `last ${tickText(Number(series[0].y.at(-1).toPrecision(3)))}`,
      xLabel: "epoch", yLabel: logY ? "mean loss (log)" : "mean loss", series, logY, wholeX: true,
      xRange: [1, Math.max(2, ...series.map((line) => line.x.length))],
      yRange: logY ? [low / 1.1, high * 1.1] : [low - margin, high + margin] }));
  }
  if (!charts.childElementCount) charts.append(el("p", { class: "muted" }, "Nothing was trained for this category."));
}
