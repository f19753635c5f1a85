// A point cloud on a plain canvas: points are drawn as shaded squares, near ones over far ones. Needs no WebGL.

// Dark to light through purple and orange: equal steps look equal, and it reads in grey and to colour-blind eyes
const COLOURS = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const PALETTE = Uint8Array.from({ length: 768 }, (_, index) => {
  const place = (Math.floor(index / 3) / 255) * (COLOURS.length - 1);
  const left = Math.min(Math.floor(place), COLOURS.length - 2);
  return Math.round(COLOURS[left][index % 3] + (place - left) * (COLOURS[left + 1][index % 3] - COLOURS[left][index % 3]));
});
const BASE = [196, 201, 209];
const TRUTH = [0, 190, 205];

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// Points in a ball of radius 1 around the middle, with normal, size and cell of the grid
function decodeCloud(record) {
  const { rows, columns } = record;
  const present = bytesOf(record.present);
  const bytes = bytesOf(record.points);
  const view = new DataView(bytes.buffer);
  const count = bytes.length / 6;
  const cells = new Int32Array(count);
  const index = new Int32Array(rows * columns).fill(-1);
  for (let cell = 0, next = 0; cell < rows * columns; cell++) {
    if (present[cell >> 3] & (128 >> (cell & 7))) { index[cell] = next; cells[next++] = cell; }
  }
  const span = record.high.map((high, axis) => high - record.low[axis]);
  const points = new Float32Array(count * 3);
  for (let i = 0; i < count * 3; i++) points[i] = (view.getUint16(2 * i, true) / 65535) * span[i % 3];
  centre(points, count);
  return { points, cells, rows, columns, count, ...surfaceOf(points, cells, index, rows, columns) };
}

function centre(points, count) {
  const middle = [0, 1, 2].map((axis) => {
    const values = Float32Array.from({ length: count }, (_, i) => points[3 * i + axis]).sort();
    return (values[Math.floor(count * 0.01)] + values[Math.floor((count - 1) * 0.99)]) / 2;
  });
  const distances = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    for (let axis = 0; axis < 3; axis++) points[3 * i + axis] -= middle[axis];
    distances[i] = Math.hypot(points[3 * i], points[3 * i + 1], points[3 * i + 2]);
  }
  const radius = distances.slice().sort()[Math.floor((count - 1) * 0.995)] || 1;
  for (let i = 0; i < 3 * count; i++) points[i] /= radius;
}

// Normals, and half the way to the farther neighbour: squares of that size close the surface, but for real gaps
function surfaceOf(points, cells, index, rows, columns) {
  const count = cells.length;
  const normals = new Float32Array(3 * count);
  const reach = new Float32Array(count);
  const at = (row, column) => (row < 0 || column < 0 || row >= rows || column >= columns ? -1 : index[row * columns + column]);
  const difference = (first, second) => [0, 1, 2].map((axis) => points[3 * second + axis] - points[3 * first + axis]);
  for (let i = 0; i < count; i++) {
    const row = Math.floor(cells[i] / columns), column = cells[i] % columns;
    const pick = (other) => (other < 0 ? i : other);
    const right = pick(at(row, column + 1)), left = pick(at(row, column - 1));
    const up = pick(at(row - 1, column)), down = pick(at(row + 1, column));
    const a = difference(left, right), b = difference(down, up);
    const normal = [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
    const length = Math.hypot(...normal);
    for (let axis = 0; axis < 3; axis++) normals[3 * i + axis] = length ? normal[axis] / length : axis === 2 ? 1 : 0;
    reach[i] = Math.max(Math.hypot(...difference(i, pick(at(row, column + 1)))), Math.hypot(...difference(i, pick(at(row + 1, column)))),
      Math.hypot(...a) / 2, Math.hypot(...b) / 2);
  }
  const usual = reach.slice().sort()[Math.floor(count / 2)] || 0.02;
  for (let i = 0; i < count; i++) reach[i] = 0.56 * clamp(reach[i], 0.7 * usual, 2 * usual);
  return { normals, reach };
}

class CloudView {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.cloud = null;
    this.colours = null;
    this.pointers = new Map();
    this.pending = false;
    this.reset();
    this.listen();
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  reset() {
    this.yaw = -0.3;
    this.pitch = 0.35;
    this.zoom = 1;
    this.shift = [0, 0];
    this.draw();
  }

  show(cloud, colours) {
    this.cloud = cloud;
    this.colours = colours;
    this.draw();
  }

  turn(yaw, pitch) {
    this.yaw += yaw;
    this.pitch = clamp(this.pitch + pitch, -Math.PI / 2, Math.PI / 2);
    this.draw();
  }

  scale(factor) {
    this.zoom = clamp(this.zoom * factor, 0.3, 14);
    this.draw();
  }

  move(x, y) {
    this.shift = [this.shift[0] + x, this.shift[1] + y];
    this.draw();
  }

  act(name) {
    const step = 0.15;
    const actions = {
      left: () => this.turn(-step, 0), right: () => this.turn(step, 0), up: () => this.turn(0, -step), down: () => this.turn(0, step),
      in: () => this.scale(1.2), out: () => this.scale(1 / 1.2), reset: () => this.reset(),
    };
    actions[name]();
  }

  listen() {
    const { canvas } = this;
    const place = (event) => ({ x: event.clientX, y: event.clientY });
    canvas.addEventListener("pointerdown", (event) => {
      this.pointers.set(event.pointerId, place(event));
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const others = [...this.pointers.entries()].filter(([id]) => id !== event.pointerId).map(([, other]) => other);
      const now = place(event);
      const dx = now.x - before.x, dy = now.y - before.y;
      if (others.length) {
        const reach = (point) => Math.hypot(point.x - others[0].x, point.y - others[0].y) || 1;
        this.scale(reach(now) / reach(before));
        this.move(dx / canvas.clientWidth, dy / canvas.clientWidth);
      } else if (event.shiftKey || event.buttons & 6) {
        this.move((2 * dx) / canvas.clientWidth, (2 * dy) / canvas.clientWidth);
      } else {
        this.turn(dx * 0.008, dy * 0.008);
      }
      this.pointers.set(event.pointerId, now);
    });
    const release = (event) => this.pointers.delete(event.pointerId);
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.scale(Math.exp(-clamp(event.deltaY, -120, 120) * 0.002));
    }, { passive: false });
    canvas.addEventListener("dblclick", () => this.reset());
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-0.08, 0], ArrowRight: [0.08, 0], ArrowUp: [0, -0.08], ArrowDown: [0, 0.08] };
      const names = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", "+": "in", "=": "in", "-": "out", Home: "reset", 0: "reset" };
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in names)) return;
      event.preventDefault();
      event.stopPropagation();
      if (event.shiftKey && event.key in moves) this.move(...moves[event.key]);
      else this.act(names[event.key]);
    });
  }

  draw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.paint(); });
  }

  paint() {
    const { canvas, context, cloud, colours } = this;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    context.clearRect(0, 0, width, height);
    if (!cloud) return;
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const nearest = new Float32Array(width * height).fill(-1e9);
    const cy = Math.cos(this.yaw), sy = Math.sin(this.yaw), cp = Math.cos(this.pitch), sp = Math.sin(this.pitch);
    const scale = 0.47 * Math.min(width, height) * this.zoom;
    const middleX = width / 2 + this.shift[0] * width * 0.5, middleY = height / 2 + this.shift[1] * width * 0.5;
    const { points, normals, reach, count } = cloud;
    const eye = 4;
    for (let i = 0; i < count; i++) {
      const x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2];
      const turnedX = cy * x + sy * z, depth = cy * z - sy * x;
      const turnedY = cp * y + -sp * depth, towards = sp * y + cp * depth;
      const size = (scale * eye) / (eye - towards);
      const half = Math.max(0.5, reach[i] * size);
      const left = Math.max(0, Math.round(middleX + turnedX * size - half)), right = Math.min(width, Math.round(middleX + turnedX * size + half));
      const top = Math.max(0, Math.round(middleY - turnedY * size - half)), bottom = Math.min(height, Math.round(middleY - turnedY * size + half));
      if (right <= left || bottom <= top) continue;
      const nx = normals[3 * i], ny = normals[3 * i + 1], nz = normals[3 * i + 2];
      const turnedN = cy * nz - sy * nx;
      // The light stands a little left of and above the viewer
      const light = Math.abs(0.86 * (sp * ny + cp * turnedN) - 0.32 * (cy * nx + sy * nz) + 0.4 * (cp * ny - sp * turnedN));
      const shade = Math.min(1, 0.3 + 0.72 * light);
      const colour = (255 << 24) | ((colours[3 * i + 2] * shade) << 16) | ((colours[3 * i + 1] * shade) << 8) | (colours[3 * i] * shade);
      for (let row = top; row < bottom; row++) {
        for (let place = row * width + left, end = row * width + right; place < end; place++) {
          if (towards > nearest[place]) { nearest[place] = towards; pixels[place] = colour; }
        }
      }
    }
    context.putImageData(image, 0, 0);
    canvas.dataset.painted = String(count);
  }
}

// A colour for every point of the cloud, looked up in a picture that covers the same region
function cloudColours(cloud, kind, pictures, window_) {
  const colours = new Uint8Array(3 * cloud.count);
  const source = { map: pictures.map, rgb: pictures.rgb, mask: pictures.mask }[kind];
  for (let i = 0; i < cloud.count; i++) {
    let colour = BASE;
    if (source) {
      const row = Math.min(source.height - 1, Math.floor(((Math.floor(cloud.cells[i] / cloud.columns) + 0.5) / cloud.rows) * source.height));
      const column = Math.min(source.width - 1, Math.floor((((cloud.cells[i] % cloud.columns) + 0.5) / cloud.columns) * source.width));
      const place = 4 * (row * source.width + column);
      if (kind === "rgb") colour = source.data.subarray(place, place + 3);
      else if (kind === "mask") colour = source.data[place] > 127 ? TRUTH : BASE;
      else colour = blend(BASE, source.data[place], window_, 1);
    }
    colours.set(colour, 3 * i);
  }
  return colours;
}

// A base colour under the colour of a map's level; what is low in the map leaves the base as it is
function blend(base, level, window_, opacity) {
  const share = clamp((level - window_[0]) / (window_[1] - window_[0] || 1), 0, 1);
  const alpha = opacity * clamp(share * 1.7, 0, 1);
  const place = 3 * Math.round(70 + share * 185);
  return [0, 1, 2].map((channel) => base[channel] * (1 - alpha) + PALETTE[place + channel] * alpha);
}
