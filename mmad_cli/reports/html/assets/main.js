// Start: what is chosen, and who draws what when it changes.

function startTheme() {
  const select = byId("theme");
  const set = (value) => {
    if (value) document.documentElement.dataset.theme = value; else delete document.documentElement.dataset.theme;
  };
  select.value = keptInBrowser("mmad-theme") || "";
  if (select.selectedIndex < 0) select.value = "";
  set(select.value);
  select.addEventListener("change", () => { set(select.value); keptInBrowser("mmad-theme", select.value); });
}

function startChooser() {
  const runs = byId("run"), categories = byId("category");
  data.runs.forEach((run, index) => runs.append(el("option", { value: index }, `${run.label} on ${run.dataset}`)));
  runs.hidden = document.querySelector('label[for="run"]').hidden = data.runs.length < 2;
  runs.addEventListener("change", () => choose(Number(runs.value), state.category));
  categories.addEventListener("change", () => choose(state.run, categories.value));
  byId("chooser").hidden = false;
}

function drawChooser() {
  byId("run").value = state.run;
  const categories = byId("category");
  categories.replaceChildren(...data.results.filter((one) => one.run === state.run)
    .map((one) => el("option", { value: one.category }, one.category)));
  categories.value = state.category;
  const metrics = state.result ? state.result.metrics : {};
  byId("chosen-metrics").textContent = ["i_auroc", "p_auroc", "aupro_30", "aupro_01"]
    .filter((key) => metrics[key] !== undefined && metrics[key] !== null)
    .map((key) => `${data.metrics[key][0]} ${number(metrics[key])}`).join(" · ");
}

function startThreshold() {
  byId("threshold").addEventListener("input", () => setThreshold(Number(byId("threshold").value)));
  byId("threshold-number").addEventListener("input", () => setThreshold(byId("threshold-number").valueAsNumber));
  byId("threshold-best").addEventListener("click", () => setThreshold(state.result.threshold));
}

function start() {
  startTheme();
  startTables();
  if (!data.results.length) return;
  document.querySelectorAll(".scripted").forEach((section) => { section.hidden = false; });
  startChooser();
  startThreshold();
  startGallery();
  onChange((what) => {
    if (what === "result") { drawChooser(); drawCurves(); drawTraining(); drawHistogram(); drawThreshold(); newCategory(); }
    else { drawThreshold(); updateGallery(); }
  });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if ((window.innerWidth < 640) !== (width < 640)) { drawHistogram(); drawThreshold(); }
    width = window.innerWidth;
  });
  const first = data.results.find((one) => one.samples.length) || data.results[0];
  choose(first.run, first.category);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
