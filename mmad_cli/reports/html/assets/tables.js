// Sorting of every table, and the deviation of a run from the row that is chosen.

function sortValue(row, column) {
  const cell = row.cells[column];
  if (!cell) return null;
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  const leading = Number.parseFloat(text.replace(/,/g, ""));
  return cell.classList.contains("text") ? text : Number.isNaN(leading) ? null : leading;
}

function compareValues(first, second, direction) {
  // What has no value stays at the end whichever way the column is sorted
  if (first === null || second === null) return (first === null) - (second === null);
  if (typeof first === "number" && typeof second === "number") return direction * (first - second);
  return direction * String(first).localeCompare(String(second), undefined, { numeric: true });
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const original = [...table.tBodies[0].rows];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const isText = head.classList.contains("text");
      const order = isText ? ["ascending", "descending", "none"] : ["descending", "ascending", "none"];
      const next = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? next : "none"));
      const direction = next === "ascending" ? 1 : -1;
      const rows = next === "none" ? original
        : [...original].sort((a, b) => compareValues(sortValue(a, column), sortValue(b, column), direction));
      table.tBodies[0].append(...rows);
    });
  });
}

const TOLERANCE = 0.005;

function showDeviation(run, choice) {
  const reference = data.runs[run].references[choice];
  const holder = document.querySelector(`.run-table[data-run="${run}"]`);
  for (const cell of holder.querySelectorAll("td[data-metric]")) {
    const category = cell.parentElement.querySelector("th").dataset.category;
    const metric = cell.dataset.metric;
    const row = !reference ? null : category === undefined ? reference.mean : reference.rows[category];
    const expected = row ? row[metric] : undefined;
    const mark = cell.querySelector(".delta");
    mark.className = "delta";
    mark.textContent = "";
    if (expected === undefined) continue;
    const difference = Number(cell.dataset.value) - expected;
    const better = (difference > 0) === (data.metrics[metric] ? data.metrics[metric][1] : true);
    mark.textContent = signed(difference);
    mark.title = `${reference.name}: ${expected.toFixed(4)}`;
    if (Math.abs(difference) <= TOLERANCE) mark.classList.add("same");
    else mark.classList.add(better ? "better" : "worse");
    if (Math.abs(difference) > 4 * TOLERANCE) mark.classList.add("large");
  }
  const source = holder.closest(".block").querySelector(".reference-source");
  source.textContent = reference ? [reference.source, ...reference.remarks].join(" · ") : "";
}

function drawCostBars() {
  for (const holder of document.querySelectorAll("[data-costs]")) {
    const rows = [...holder.querySelectorAll("tbody tr")];
    const stages = (row) => [...row.querySelectorAll("td[data-stage]")].filter((cell) => cell.dataset.value !== undefined);
    const total = (row) => stages(row).reduce((sum, cell) => sum + Number(cell.dataset.value), 0);
    const longest = Math.max(...rows.map(total), 1e-9);
    const names = [...new Set(rows.flatMap((row) => stages(row).map((cell) => cell.dataset.stage)))];
    const head = el("th", { scope: "col", class: "text" }, "share of the time");
    head.style.padding = ".25rem .5rem";
    holder.querySelector("thead tr").append(head);
    for (const row of rows) {
      const bars = el("div", { class: "bars", "aria-hidden": "true" });
      for (const cell of stages(row)) {
        const part = el("span", { title: `${cell.dataset.stage}: ${cell.textContent} s` });
        part.style.width = `${(100 * Number(cell.dataset.value)) / longest}%`;
        part.style.background = `var(--s${names.indexOf(cell.dataset.stage) % 8})`;
        bars.append(part);
      }
      row.append(el("td", {}, bars));
    }
    const legend = el("div", { class: "legend", "aria-hidden": "true" });
    for (const [index, name] of names.entries()) {
      const swatch = el("i");
      swatch.style.cssText = `width:.7rem;height:.7rem;background:var(--s${index % 8})`;
      legend.append(el("span", {}, swatch, name));
    }
    holder.append(legend);
  }
}

function startTables() {
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  drawCostBars();
  for (const select of document.querySelectorAll("select.reference")) {
    const show = () => showDeviation(Number(select.dataset.run), Number(select.value));
    select.addEventListener("change", show);
    show();
  }
  // A row of the summary leads to the samples of its category
  for (const head of document.querySelectorAll(".run-table th[data-category]")) {
    head.classList.add("linked");
    head.title = "Look at this category";
    head.addEventListener("click", () => {
      choose(Number(head.closest(".run-table").dataset.run), head.dataset.category);
      byId("curves").scrollIntoView();
    });
  }
}
