"use strict";
// Draws the maps of one trace. All data is in the page; nothing is fetched. T tokens are read, of S that are shown.
const data = JSON.parse(document.getElementById("data").textContent);
const T = data.read, NS = "http://www.w3.org/2000/svg";
const chosen = { panel: 0, head: 0, row: T - 1 };

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}
for (const panel of data.panels) {
  panel.weights = floats(panel.weights);
  panel.heads = panel.weights.length / (T * T);
  for (const name of ["second", "pairs"]) if (panel[name]) panel[name] = floats(panel[name]);
}

function make(tag, attributes = {}, text = "") {
  const svg = ["svg", "rect", "text", "g", "line", "image"].includes(tag);
  const element = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

// A hue for each significance, so that digits which are added stand out together; other tokens are grey.
function tint(place, lightness) {
  const rank = data.significance[place];
  return rank ? `hsl(${(200 + 47 * (rank - 1)) % 360} 65% ${lightness}%)` : `hsl(0 0% ${lightness}%)`;
}
// Colours of 256 sizes, white for none, as red, green and blue: blue ones, and red ones for negative values.
function ramp(hue) {
  return Array.from({ length: 256 }, (_, level) => {
    const light = 1 - 0.72 * Math.sqrt(level / 255), chroma = 0.85 * Math.min(light, 1 - light);
    return [0, 8, 4].map((shift) => {
      const k = (shift + hue / 30) % 12;
      return Math.round(255 * (light - chroma * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    });
  });
}
const blues = ramp(207), reds = ramp(8);
const label = (place) => data.tokens[place] === " " ? "␣" : data.tokens[place];
const named = (place) => `token ${place + 1} ${label(place)}`;
const number = (value) => Math.abs(value) >= 0.0005 || value === 0 ? value.toFixed(3) : value.toExponential(1);
const most = (values) => values.reduce((found, value) => Math.max(found, Math.abs(value)), 0);
const say = (text) => { document.getElementById("hint").textContent = text; };

function drawTokens() {
  const box = document.getElementById("tokens");
  data.tokens.forEach((token, place) => {
    const share = data.probabilities[place];
    const item = make("div", { class: `token ${place < data.prompt ? "given" : "written"}`, "data-place": place });
    const bar = make("div", { class: "bar" });
    const written = place >= data.prompt || data.labels;
    if (written && share !== null && share !== undefined) bar.append(make("i", { style: `height:${Math.max(2, 100 * share)}%` }));
    item.append(bar, make("b", { style: `background:${tint(place, 86)}` }, label(place)));
    const others = (data.alternatives[place] || []).map(([symbol, p]) => `${symbol} ${(100 * p).toFixed(1)} %`).join(", ");
    const known = share !== null && share !== undefined;
    const text = known ? `${named(place)}: probability ${(100 * share).toFixed(2)} % (most probable: ${others})` : `${named(place)}: given`;
    item.title = text;
    item.addEventListener("mouseenter", () => say(text));
    box.append(item);
  });
}

// A canvas of one dot a cell: a text of hundreds of tokens has more cells than a page may have elements.
function picture(values, signed) {
  const canvas = make("canvas", { width: T, height: T }), context = canvas.getContext("2d");
  const image = context.createImageData(T, T), largest = most(values) || 1;
  values.forEach((value, cell) => {
    const [red, green, blue] = (signed && value < 0 ? reds : blues)[Math.round(255 * Math.abs(value) / largest) || 0];
    image.data.set([red, green, blue, 255], 4 * cell);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

// The same with several dots a cell, so that no viewer of a saved file blurs its edges.
function enlarged(canvas) {
  const scale = Math.max(1, Math.floor(1024 / T)), large = make("canvas", { width: scale * T, height: scale * T });
  const context = large.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, large.width, large.height);
  return large.toDataURL();
}

function thumbnail(values, signed) {
  const canvas = picture(values, signed);
  canvas.style = "width:84px;height:84px";
  return canvas;
}

function drawGrid() {
  const grid = document.getElementById("grid");
  const columns = Math.max(...data.panels.map((panel) => panel.heads));
  grid.style.gridTemplateColumns = `auto repeat(${columns}, 92px)`;
  data.panels.forEach((panel, index) => {
    const name = make("span");
    name.append(make("b", {}, panel.layer), make("br"), document.createTextNode(panel.mixer));
    grid.append(name);
    for (let head = 0; head < columns; head++) {
      if (head >= panel.heads) { grid.append(make("span")); continue; }
      const where = panel.heads > 1 ? `${panel.layer}, head ${head + 1}` : panel.layer;
      const button = make("button", { "aria-label": `${where}, ${panel.mixer}`, "data-panel": index, "data-head": head });
      button.append(thumbnail(panel.weights.subarray(head * T * T, (head + 1) * T * T), panel.kind === "signed"));
      button.addEventListener("click", () => { chosen.panel = index; chosen.head = head; show(); });
      grid.append(button);
    }
  });
}

// A square map with labelled axes; `describe(row, column, value)` is what a cell says when it is pointed at.
function drawMap(into, values, { signed, rows, columns, describe, choose }) {
  const cell = Math.max(7, Math.min(26, Math.floor(560 / T))), edge = 46, size = edge + T * cell + 4;
  const svg = make("svg", { xmlns: NS, width: size, height: size, viewBox: `0 0 ${size} ${size}`, role: "img",
    "font-family": "monospace" });
  svg.append(make("rect", { width: size, height: size, fill: "#fff" }));
  const largest = most(values);
  for (let place = 0; place < T; place++) {
    const middle = edge + place * cell + cell / 2;
    for (const [x, y] of [[middle - cell / 2, edge - 20], [edge - 20, middle - cell / 2]])
      svg.append(make("rect", { x, y, width: x < edge ? 18 : cell, height: y < edge ? 18 : cell, fill: tint(place, 86) }));
    const mark = place < data.prompt ? "normal" : "bold";
    const name = label(place), size = name.length > 1 ? Math.min(13, 1.7 * cell / name.length) : Math.min(13, cell + 2);
    const style = { "text-anchor": "middle", "font-weight": mark, "font-size": size };
    svg.append(make("text", { x: middle, y: edge - 7, ...style }, name), make("text", { x: edge - 11, y: middle + 4, ...style }, name));
  }
  if (data.prompt < T) {
    const at = edge + data.prompt * cell;
    svg.append(make("line", { x1: at, y1: edge, x2: at, y2: edge + T * cell, stroke: "#999", "stroke-dasharray": "3 3" }));
    svg.append(make("line", { x1: edge, y1: at, x2: edge + T * cell, y2: at, stroke: "#999", "stroke-dasharray": "3 3" }));
  }
  svg.append(make("text", { x: edge, y: 12, "font-size": 11 }, columns), make("text",
    { x: 10, y: edge, "font-size": 11, transform: `rotate(90 10 ${edge})` }, rows));
  const area = { x: edge, y: edge, width: T * cell, height: T * cell };
  svg.append(make("image", { ...area, href: enlarged(picture(values, signed)), style: "image-rendering: pixelated" }));
  if (choose) svg.append(make("rect", { class: "row-chosen", fill: "none", stroke: "#d0500a", "stroke-width": 2, x: edge,
    y: edge + chosen.row * cell, width: T * cell, height: cell, "pointer-events": "none" }));
  const pointed = make("rect", { class: "pointed", fill: "none", stroke: "#d0500a", width: cell, height: cell,
    visibility: "hidden", "pointer-events": "none" });
  const cells = make("rect", { class: "cells", ...area, fill: "transparent" });
  const at = (event) => {
    const box = cells.getBoundingClientRect(), place = (from, side) => Math.floor(T * from / side);
    return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)]
      .map((index) => Math.max(0, Math.min(T - 1, index)));
  };
  cells.addEventListener("mousemove", (event) => {
    const [row, column] = at(event);
    say(describe(row, column, values[row * T + column]));
    mark(row, column);
    for (const [name, value] of Object.entries({ x: edge + column * cell, y: edge + row * cell, visibility: "visible" }))
      pointed.setAttribute(name, value);
  });
  cells.addEventListener("mouseleave", () => { mark(); pointed.setAttribute("visibility", "hidden"); });
  if (choose) cells.addEventListener("click", (event) => choose(at(event)[0]));
  svg.append(pointed, cells);
  document.getElementById(into).replaceChildren(svg);
}

function mark(...places) {
  document.querySelectorAll(".token").forEach((token) =>
    token.classList.toggle("marked", places.includes(Number(token.dataset.place))));
}

function show() {
  const panel = data.panels[chosen.panel], from = chosen.head * T * T;
  document.querySelectorAll("#grid button").forEach((button) => button.setAttribute("aria-pressed",
    Number(button.dataset.panel) === chosen.panel && Number(button.dataset.head) === chosen.head));
  const head = panel.heads > 1 ? `, head ${chosen.head + 1}` : "";
  document.getElementById("name").textContent = `${panel.layer}${head}: ${panel.mixer}`;
  document.getElementById("explained").textContent = data.explained[panel.kind];
  const paired = Boolean(panel.pairs), signed = panel.kind === "signed";
  document.getElementById("first").textContent = paired ? "summed over the second keys" : "weights";
  const choose = (row) => { chosen.row = row; show(); };
  const reads = (what) => (row, column, value) => `${named(row)} reads ${named(column)}${what}: ${number(value)}`;
  drawMap("map", panel.weights.subarray(from, from + T * T), { signed, rows: "reads", columns: "is read",
    describe: reads(paired ? " as first key" : ""), choose });
  document.getElementById("secondfigure").hidden = document.getElementById("pairfigure").hidden = !paired;
  if (!paired) return;
  drawMap("second", panel.second.subarray(from, from + T * T), { signed, rows: "reads", columns: "is read",
    describe: reads(" as second key"), choose });
  const start = (chosen.head * T + chosen.row) * T * T;
  document.getElementById("pairname").textContent = `pairs that ${named(chosen.row)} reads (choose another row on the left)`;
  drawMap("pairs", panel.pairs.subarray(start, start + T * T), { signed, rows: "first key", columns: "second key",
    describe: (j, k, value) => `${named(chosen.row)} reads the pair of ${named(j)} and ${named(k)}: ${number(value)}` });
}

function save(kind, from) {
  const svg = document.querySelector(`#${from} svg`), text = new XMLSerializer().serializeToString(svg);
  const name = `${document.getElementById("name").textContent.replace(/[^\w]+/g, "-")}-${from}.${kind}`;
  const download = (blob) => {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    document.body.append(link);
    link.click();
    document.body.dataset.saved = `${name} ${blob.size}`;
    setTimeout(() => { URL.revokeObjectURL(link.href); link.remove(); }, 1000);
  };
  if (kind === "svg") { download(new Blob([text], { type: "image/svg+xml" })); return; }
  const image = new Image(), scale = 3;
  image.onload = () => {
    const canvas = make("canvas", { width: scale * svg.width.baseVal.value, height: scale * svg.height.baseVal.value });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(download, "image/png");
  };
  image.src = `data:image/svg+xml;base64,${btoa(unescape(encodeURIComponent(text)))}`;
}

drawTokens();
drawGrid();
show();
document.querySelectorAll("[data-save]").forEach((button) =>
  button.addEventListener("click", () => save(button.dataset.save, button.dataset.from)));
document.body.dataset.ready = "yes";
