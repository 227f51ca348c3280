"use strict";
// Draws the points of the maps on canvases over the axes, which are SVG.
const { points } = JSON.parse(document.getElementById("data").textContent);
const RAMP = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"]; // viridis
// The colors of Okabe and Ito with a darker yellow and without black, then three more. All other categories are gray.
const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#c2b200", "#7a4fc4", "#8a5a3a", "#d6337c"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const tip = document.getElementById("tip");
const ring = document.getElementById("ring");

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function levels(base64) {
  const view = new DataView(bytes(base64).buffer);
  return Float32Array.from({ length: view.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true) / 65535);
}

// The row, out of total, of the i-th point shown: `shown_rows` in map.py.
function spread(i, shown, total) {
  const [begin, end] = [Math.floor((i * total) / shown), Math.floor(((i + 1) * total) / shown)];
  return begin + Math.floor(((i * ((Math.sqrt(5) - 1) / 2)) % 1) * (end - begin));
}

function gray() {
  return dark.matches ? "#4a5058" : "#ced2d7";
}

// The part of the ramp that contrasts with the background.
function rampColor(share) {
  const at = (dark.matches ? 0.16 + 0.84 * share : 0.93 * share) * (RAMP.length - 1);
  const k = Math.min(Math.floor(at), RAMP.length - 2);
  const [from, to] = [RAMP[k], RAMP[k + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * (at - k))).join(" ")})`;
}

function palette(scale) {
  if (scale.kind === "numbers") return [gray(), ...Array.from({ length: 255 }, (_, i) => rampColor(i / 254))];
  return [gray(), ...scale.labels.map((_, i) => CATEGORIES[i] ?? (dark.matches ? "#a3aab3" : "#6f767f"))];
}

function draw(map) {
  const { canvas, x, y } = map;
  const scale = points.scales[current];
  const ratio = devicePixelRatio || 1;
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const brush = canvas.getContext("2d");
  const colors = palette(scale);
  const n = x.length;
  const radius = (n > 20000 ? 0.9 : n > 3000 ? 1.6 : n > 300 ? 2.4 : 3.6) * ratio;
  const [inset, spanX, spanY] = [map.inset * width * ratio, canvas.width, canvas.height].map(Math.round);
  brush.globalAlpha = n > 20000 ? 0.55 : n > 300 ? 0.75 : 0.9;
  let last = "";
  // In an order unrelated to the file's, so that no group is drawn on top of the others.
  for (let k = 0, j = 0; k < n; k++, j = (j + map.stride) % n) {
    const color = colors[scale.bytes[map.number(j)]];
    if (color !== last) brush.fillStyle = last = color;
    const px = inset + x[j] * (spanX - 2 * inset);
    const py = spanY - inset - y[j] * (spanY - 2 * inset);
    if (radius < 1.8 * ratio) brush.fillRect(px - radius, py - radius, 2 * radius, 2 * radius);
    else {
      brush.beginPath();
      brush.arc(px, py, radius, 0, 2 * Math.PI);
      brush.fill();
    }
  }
}

// A point's position, from the window's upper left corner.
function position(map, box, j) {
  const inset = map.inset * box.width;
  return [box.left + inset + map.x[j] * (box.width - 2 * inset), box.bottom - inset - map.y[j] * (box.height - 2 * inset)];
}

function nearest(map, box, event) {
  let best = 14 * 14;
  let found = -1;
  for (let j = 0; j < map.x.length; j++) {
    const [x, y] = position(map, box, j);
    const distance = (x - event.clientX) ** 2 + (y - event.clientY) ** 2;
    if (distance < best) [best, found] = [distance, j];
  }
  return found;
}

function point(map, event) {
  const box = map.canvas.getBoundingClientRect();
  const found = nearest(map, box, event);
  tip.hidden = ring.hidden = found < 0;
  if (found < 0) return;
  const [x, y] = position(map, box, found);
  ring.style.left = `${x}px`;
  ring.style.top = `${y}px`;
  tip.textContent = describe(map.number(found));
  tip.style.left = `${Math.min(x + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(y + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

function describe(point) {
  const row = spread(point, points.shown, points.total);
  const lines = points.ids.length ? [points.ids[point], `${points.lengths[point].toLocaleString("en-US")} ${points.unit}`] : [];
  const scale = points.scales[current];
  const code = scale.bytes[point];
  if (scale.kind === "categories") lines.push(`${scale.name}: ${code ? scale.labels[code - 1][0] : "no value"}`);
  else if (current !== points.scales.length - 1 || !points.ids.length)
    lines.push(`${scale.name}: ${code ? `about ${shown(valueAt(scale, (code - 1) / 254))}` : "no value"}`);
  lines.push(`row ${row.toLocaleString("en-US")}`);
  return lines.join("\n");
}

function valueAt(scale, share) {
  return scale.log ? scale.low * (scale.high / scale.low) ** share : scale.low + (scale.high - scale.low) * share;
}

function shown(value) {
  return value.toLocaleString("en-US", { maximumSignificantDigits: Math.abs(value) >= 1000 ? 4 : 3 });
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawLegend(legend) {
  const scale = points.scales[current];
  const colors = palette(scale);
  const dot = (color) => {
    const made = element("span", { className: "dot" });
    made.style.background = color;
    return made;
  };
  let name = element("strong", { textContent: scale.name });
  if (points.scales.length > 1) {
    const options = points.scales.map(({ name }, i) => new Option(name, i, false, i === current));
    const select = element("select", { onchange: () => show(Number(select.value)) }, ...options);
    name = element("label", { textContent: "Color by " }, select);
  }
  legend.replaceChildren(name);
  if (scale.kind === "numbers") {
    const ramp = element("span", { className: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${Array.from({ length: 17 }, (_, i) => colors[1 + Math.round((254 * i) / 16)]).join()})`;
    legend.append(element("span", {}, shown(scale.low), ramp, shown(scale.high), scale.log ? " (logarithmic)" : ""));
    if (scale.bytes.includes(0)) legend.append(element("span", {}, dot(gray()), "no value"));
    return;
  }
  scale.labels.forEach(([text, count], i) => legend.append(element("span", {}, dot(colors[i + 1]), `${text} (${count.toLocaleString("en-US")})`)));
  if (scale.missing) legend.append(element("span", {}, dot(gray()), `no value (${scale.missing.toLocaleString("en-US")})`));
}

function show(number) {
  current = number;
  document.querySelectorAll(".legend").forEach(drawLegend);
  maps.forEach(draw);
}

function coprime(n) {
  const divides = (a, b) => (b ? divides(b, a % b) : a);
  let stride = Math.max(Math.floor(n * 0.618), 1);
  while (divides(n, stride) !== 1) stride++;
  return stride;
}

let current = 0;
points.scales.forEach((scale) => (scale.bytes = bytes(scale.codes)));
const maps = [...document.querySelectorAll("canvas[data-map]")].map((canvas) => {
  const { x, y, shown: count } = points.maps[canvas.dataset.map];
  const map = { canvas, x: levels(x), y: levels(y), stride: coprime(count), inset: Number(canvas.dataset.inset) };
  map.number = (j) => spread(j, count, points.shown);
  canvas.addEventListener("mousemove", (event) => point(map, event));
  canvas.addEventListener("mouseleave", () => (tip.hidden = ring.hidden = true));
  return map;
});
if (maps.length) {
  show(0);
  dark.addEventListener("change", () => show(current));
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => maps.forEach(draw), 100);
  });
}
