// Small helpers. Texts only ever become text nodes or attributes, so that no name can turn into markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const number = (value, digits = 3) => (value === null || value === undefined ? "n/a" : value.toFixed(digits));
const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(3);

// A score as short as it can be while scores of this size still differ
function score(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(3);
  return value.toPrecision(size >= 1000 ? 6 : 4);
}

// What is being looked at. Whoever draws something subscribes.
const state = { run: 0, category: null, result: null, threshold: null, listeners: [] };
const onChange = (listener) => state.listeners.push(listener);
const changed = (what) => state.listeners.forEach((listener) => listener(what));

const resultOf = (run, category) => data.results.find((one) => one.run === run && one.category === category);
// Of the runs on the data that is being looked at: a category of another dataset may share its name
const resultsOf = (category) => data.results.filter((one) => one.category === category && data.runs[one.run].data === data.runs[state.run].data);

function choose(run, category) {
  const result = resultOf(run, category) || data.results.find((one) => one.run === run) || null;
  state.run = run;
  state.result = result;
  state.category = result ? result.category : category;
  state.threshold = result ? result.threshold : null;
  changed("result");
}

const verdict = (sample) =>
  state.threshold === null ? null : (sample.score >= state.threshold) === (sample.label === 1)
    ? (sample.label ? "TP" : "TN") : (sample.label ? "FN" : "FP");
const VERDICTS = { TP: "true positive", TN: "true negative", FP: "false positive", FN: "false negative" };

// Pictures stay text until they are looked at
const block = (name) => {
  const node = byId(name);
  return node ? JSON.parse(node.textContent) : null;
};

function keptInBrowser(name, value) {
  // A browser may refuse to keep anything for a page that was opened from a file
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch (error) { /* then the choice lasts as long as the page */ }
  return null;
}
