// The gallery of test samples and the dialog for one of them. Pictures are decoded when they come into view.

const TILE = 224;
const gallery = { cards: new Map(), shown: [], observer: null, open: null };

async function pixelsOf(url, side) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const width = side || image.naturalWidth;
  const height = side ? Math.round((side * image.naturalHeight) / image.naturalWidth) : image.naturalHeight;
  const canvas = el("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// Levels of the map that get the first and the last colour
function windowOf(result, map) {
  if (byId("range").value === "category" || !map) return result.window || [0, 255];
  let low = 255, high = 0;
  for (let i = 0; i < map.data.length; i += 4) { low = Math.min(low, map.data[i]); high = Math.max(high, map.data[i]); }
  return [low, high];
}

const valueOf = (result, level) => result.range[0] + (level / 255) * (result.range[1] - result.range[0]);

// The picture under a map or a mask: grey, so that colours belong to what lies on it
function greyUnder(rgb, width, height) {
  const base = new Uint8ClampedArray(3 * width * height).fill(120);
  if (!rgb) return base;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const place = 4 * (Math.floor(((y + 0.5) / height) * rgb.height) * rgb.width + Math.floor(((x + 0.5) / width) * rgb.width));
      const grey = 0.3 * rgb.data[place] + 0.59 * rgb.data[place + 1] + 0.11 * rgb.data[place + 2];
      base.fill(grey * 0.85, 3 * (y * width + x), 3 * (y * width + x) + 3);
    }
  }
  return base;
}

const marked = (mask, x, y, width, height) => mask.data[4 * (Math.floor(((y + 0.5) / height) * mask.height) * mask.width
  + Math.floor(((x + 0.5) / width) * mask.width))] > 127;

function onRim(mask, x, y, width, height) {
  if (!marked(mask, x, y, width, height)) return false;
  return x === 0 || y === 0 || x === width - 1 || y === height - 1 || !marked(mask, x - 1, y, width, height)
    || !marked(mask, x + 1, y, width, height) || !marked(mask, x, y - 1, width, height) || !marked(mask, x, y + 1, width, height);
}

function paintPixels(canvas, width, height, colourAt) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const colour = colourAt(i, i % width, Math.floor(i / width));
    image.data[4 * i] = colour[0];
    image.data[4 * i + 1] = colour[1];
    image.data[4 * i + 2] = colour[2];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function paintMap(canvas, pictures, window_) {
  const { map, mask } = pictures;
  const base = greyUnder(pictures.rgb, map.width, map.height);
  const opacity = Number(byId("opacity").value);
  const outline = byId("outline").checked && mask;
  paintPixels(canvas, map.width, map.height, (i, x, y) => {
    if (outline && onRim(mask, x, y, map.width, map.height)) return TRUTH;
    return blend(base.subarray(3 * i, 3 * i + 3), map.data[4 * i], window_, opacity);
  });
}

function paintTruth(canvas, pictures) {
  const { mask } = pictures;
  const base = greyUnder(pictures.rgb, mask.width, mask.height);
  paintPixels(canvas, mask.width, mask.height, (i) => {
    const under = base.subarray(3 * i, 3 * i + 3);
    return mask.data[4 * i] > 127 ? [0, 1, 2].map((channel) => 0.25 * under[channel] + 0.75 * TRUTH[channel]) : under;
  });
}

async function picturesOf(sample, side) {
  const scene = sample.scene === undefined ? null : block(`scene-${sample.scene}`);
  const map = sample.map === undefined ? null : block(`map-${sample.map}`);
  const [rgb, mask, levels] = await Promise.all([
    scene ? pixelsOf(scene.rgb, side) : null, scene ? pixelsOf(scene.mask) : null, map ? pixelsOf(map) : null]);
  return { scene, rgb, mask, map: levels };
}

const nothing = (text) => el("div", { class: "missing" }, text);
const shortName = (sample) => sample.id.replace(/^test\//, "");

function cardOf(sample) {
  const found = gallery.cards.get(sample);
  if (found) return found;
  const mosaic = el("div", { class: "mosaic" });
  const badge = el("span", { class: "badge" });
  const button = el("button", { type: "button", class: "card" }, mosaic,
    el("div", { class: "card-text" }, el("span", { class: "name", title: sample.id }, shortName(sample))),
    el("div", { class: "card-text" }, el("span", {}, score(sample.score)), badge));
  const item = el("div", { role: "listitem" }, button);
  const card = { sample, item, button, mosaic, badge, visible: false };
  button.addEventListener("click", () => openSample(sample));
  item.card = card;
  gallery.cards.set(sample, card);
  return card;
}

function updateBadge(card) {
  const found = verdict(card.sample);
  card.badge.className = `badge ${found || ""}`;
  card.badge.textContent = found ? VERDICTS[found] : "";
  card.button.setAttribute("aria-label",
    `${card.sample.id}, score ${score(card.sample.score)}${found ? `, ${VERDICTS[found]}` : ""}. Open.`);
}

async function paintCard(card) {
  const { sample, mosaic } = card;
  const result = state.result;
  const pictures = await picturesOf(sample, TILE);
  if (!card.visible) return;
  const surface = byId("surface").value;
  const parts = [];
  if (pictures.scene) {
    const truth = el("canvas");
    paintTruth(truth, pictures);
    parts.push(el("img", { src: pictures.scene.rgb, alt: "" }), el("img", { src: pictures.scene[surface], alt: "" }), truth);
  } else {
    parts.push(nothing("no image"), nothing("no scan"), nothing("no ground truth"));
  }
  if (pictures.map) {
    const map = el("canvas");
    paintMap(map, pictures, windowOf(result, pictures.map));
    parts.push(map);
  } else {
    parts.push(nothing("no map"));
  }
  mosaic.replaceChildren(...parts);
}

function wanted(sample) {
  const defect = byId("filter-defect").value;
  const which = byId("filter-verdict").value;
  const found = verdict(sample);
  if (defect && sample.defect !== defect) return false;
  if (!which) return true;
  if (which === "errors") return found === "FP" || found === "FN";
  if (which === "correct") return found === "TP" || found === "TN";
  return found === which;
}

function updateGallery() {
  const result = state.result;
  const samples = result ? result.samples : [];
  const orders = { down: (a, b) => b.score - a.score, up: (a, b) => a.score - b.score,
    name: (a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }) };
  gallery.shown = samples.filter(wanted).sort(orders[byId("sort").value]);
  const holder = byId("gallery");
  const items = gallery.shown.map((sample) => cardOf(sample).item);
  // The order is only touched where it changed: moving a card makes it lose its focus
  if (items.length !== holder.children.length || items.some((item, index) => holder.children[index] !== item)) holder.replaceChildren(...items);
  gallery.shown.forEach((sample) => updateBadge(cardOf(sample)));
  byId("gallery-count").textContent = samples.length ? `${gallery.shown.length} of ${samples.length} samples` : "";
  if (samples.length && !items.length) holder.append(el("p", { class: "empty" }, "No sample fits these filters."));
}

function newCategory() {
  gallery.observer.disconnect();
  gallery.cards.clear();
  byId("gallery").replaceChildren();
  const select = byId("filter-defect");
  const samples = state.result ? state.result.samples : [];
  byId("gallery-controls").hidden = !samples.length;
  select.replaceChildren(el("option", { value: "" }, "all"));
  if (state.result) for (const name of defectsOf(state.result)) select.append(el("option", { value: name }, name));
  samples.forEach((sample) => gallery.observer.observe(cardOf(sample).item));
  updateGallery();
}

function repaint() {
  for (const card of gallery.cards.values()) if (card.visible) paintCard(card);
  if (gallery.open) showTiles();
}

function startGallery() {
  gallery.observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const { card } = entry.target;
      if (card.visible === entry.isIntersecting) continue;
      card.visible = entry.isIntersecting;
      // Pictures that went out of view give their memory back
      if (card.visible) paintCard(card); else card.mosaic.replaceChildren();
    }
  }, { rootMargin: "400px 0px" });
  for (const id of ["filter-defect", "filter-verdict", "sort"]) byId(id).addEventListener("change", updateGallery);
  for (const id of ["surface", "range", "outline"]) byId(id).addEventListener("change", repaint);
  byId("opacity").addEventListener("input", repaint);
  byId("gallery").addEventListener("keydown", (event) => {
    const cards = [...byId("gallery").querySelectorAll(".card")];
    const at = cards.indexOf(document.activeElement);
    if (at < 0) return;
    const row = cards.filter((card) => card.getBoundingClientRect().top === cards[0].getBoundingClientRect().top).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[event.key];
    if (!step || !cards[at + step]) return;
    event.preventDefault();
    cards[at + step].focus();
  });
  startDialog();
}

// -- one sample --------------------------------------------------------------------------------------------------

const dialog = { view: null, pictures: null, cloud: null, others: [] };

function startDialog() {
  const box = byId("sample");
  byId("sample-close").addEventListener("click", () => box.close());
  byId("sample-previous").addEventListener("click", () => step(-1));
  byId("sample-next").addEventListener("click", () => step(1));
  box.addEventListener("close", () => { gallery.open = null; });
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  box.addEventListener("keydown", (event) => {
    if (["SELECT", "INPUT", "CANVAS"].includes(event.target.tagName)) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  byId("cloud-colour").addEventListener("change", showCloud);
  for (const button of box.querySelectorAll("[data-view]")) button.addEventListener("click", () => dialog.view && dialog.view.act(button.dataset.view));
}

function step(by) {
  const at = gallery.shown.indexOf(gallery.open);
  const next = gallery.shown[at + by];
  if (next) openSample(next);
}

async function openSample(sample) {
  gallery.open = sample;
  const box = byId("sample");
  if (!box.open) box.showModal();
  const found = verdict(sample);
  byId("sample-title").textContent = `${state.category} / ${shortName(sample)}`;
  byId("sample-facts").replaceChildren(
    `${data.runs[state.run].label} · ${sample.label ? `defect ${sample.defect}` : "good"} · score ${score(sample.score)}`
    + (state.threshold === null ? "" : ` (threshold ${score(state.threshold)}) `),
    found ? el("span", { class: `badge ${found}` }, VERDICTS[found]) : "");
  const at = gallery.shown.indexOf(sample);
  byId("sample-previous").disabled = at <= 0;
  byId("sample-next").disabled = at < 0 || at === gallery.shown.length - 1;
  const pictures = await picturesOf(sample);
  const others = await Promise.all(resultsOf(state.category).filter((one) => one.run !== state.run).map(async (result) => {
    const same = result.samples.find((other) => other.id === sample.id);
    const map = same && same.map !== undefined ? await pixelsOf(block(`map-${same.map}`)) : null;
    return { result, same, map };
  }));
  if (gallery.open !== sample) return;
  Object.assign(dialog, { pictures, others: others.filter((other) => other.map) });
  dialog.cloud = pictures.scene && pictures.scene.cloud ? decodeCloud(pictures.scene.cloud) : null;
  if (!dialog.view) dialog.view = new CloudView(byId("cloud"));
  showTiles();
  showCloud();
}

function mapTile(result, pictures, caption) {
  const window_ = windowOf(result, pictures.map);
  const canvas = el("canvas", { class: "pixel", role: "img", "aria-label": caption });
  paintMap(canvas, pictures, window_);
  const bar = el("canvas", { class: "colourbar", "aria-hidden": "true" });
  paintPixels(bar, 256, 1, (i) => blend(BASE, window_[0] + (i / 255) * (window_[1] - window_[0]), window_, 1));
  const readout = el("span");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = clamp(Math.floor(((event.clientX - box.left) / box.width) * pictures.map.width), 0, pictures.map.width - 1);
    const y = clamp(Math.floor(((event.clientY - box.top) / box.height) * pictures.map.height), 0, pictures.map.height - 1);
    readout.textContent = ` at (${x}, ${y}): ${score(valueOf(result, pictures.map.data[4 * (y * pictures.map.width + x)]))}`;
  });
  canvas.addEventListener("pointerleave", () => { readout.textContent = ""; });
  return el("figure", {}, canvas, bar, el("div", { class: "scale-ends" },
    ...window_.map((level) => el("span", {}, score(valueOf(result, level))))), el("figcaption", {}, caption, readout));
}

function showTiles() {
  const { pictures } = dialog;
  const tiles = byId("sample-tiles");
  const scroll = byId("sample").scrollTop;
  const parts = [];
  const picture = (src, caption) => el("figure", {}, el("img", { src, alt: caption }), el("figcaption", {}, caption));
  if (pictures.scene) {
    const truth = el("canvas", { role: "img", "aria-label": "ground truth" });
    paintTruth(truth, pictures);
    parts.push(picture(pictures.scene.rgb, "image"), el("figure", {}, truth, el("figcaption", {}, "ground truth")));
  }
  if (pictures.map) parts.push(mapTile(state.result, pictures, dialog.others.length ? data.runs[state.run].label : "anomaly map"));
  for (const other of dialog.others) {
    parts.push(mapTile(other.result, { ...pictures, map: other.map }, `${data.runs[other.result.run].label}, score ${score(other.same.score)}`));
  }
  if (pictures.scene) {
    parts.push(picture(pictures.scene.normals, "surface normals"), picture(pictures.scene.depth, "depth, near is light"));
  }
  if (!parts.length) parts.push(el("p", { class: "muted" }, "There are no pictures of this sample; the note above the gallery says how to get them."));
  tiles.replaceChildren(...parts);
  byId("sample").scrollTop = scroll;
  if (dialog.cloud) showCloud();
}

function showCloud() {
  const canvas = byId("cloud");
  const kinds = { map: dialog.pictures.map, rgb: dialog.pictures.rgb, mask: dialog.pictures.mask, plain: true };
  const select = byId("cloud-colour");
  for (const option of select.options) option.disabled = !kinds[option.value];
  if (!kinds[select.value]) select.value = "plain";
  canvas.closest(".view3d").hidden = !dialog.cloud;
  if (!dialog.cloud) return;
  const words = select.selectedOptions[0].textContent;
  canvas.setAttribute("aria-label", `3D view of ${gallery.open.id}, ${dialog.cloud.count} points, colour: ${words}`);
  dialog.view.show(dialog.cloud, cloudColours(dialog.cloud, select.value, dialog.pictures, windowOf(state.result, dialog.pictures.map)));
}
