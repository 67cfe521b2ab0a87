// Draws the figures into their places, as wide as the page allows, in the theme of the page.
"use strict";
let FIGURES = {};
const root = document.documentElement;
const button = document.getElementById("theme");
const margins = {}; // pixels that axes and padding of a figure need besides its plotting area

if (root.dataset.theme === "auto") {
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

async function unzipped(text) {
  const packed = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip")));
}

async function load() {
  const vega = document.createElement("script");
  vega.textContent = await (await unzipped(document.getElementById("vega").textContent)).text();
  document.head.append(vega);
  FIGURES = await (await unzipped(document.getElementById("figures").textContent)).json();
}

function setWidth(spec, width) {
  if (spec.vconcat) spec.vconcat.forEach(part => setWidth(part, width));
  else spec.width = width;
}

async function embed(place, width) {
  const figure = FIGURES[place.dataset.figure];
  const spec = structuredClone(figure.specs[root.dataset.theme]);
  spec.datasets = figure.datasets;
  setWidth(spec, width);
  await vegaEmbed(place, spec, { actions: false, renderer: "svg", tooltip: { theme: root.dataset.theme } });
  return place.querySelector("svg").getBoundingClientRect().width - width;
}

// The first time a figure is drawn twice: once to learn how much room its axes take.
async function draw(place) {
  const name = place.dataset.figure, room = place.clientWidth;
  if (!(name in margins)) margins[name] = await embed(place, Math.max(200, room - 80));
  await embed(place, Math.max(200, Math.floor(room - margins[name])));
}

async function drawAll() {
  button.textContent = root.dataset.theme === "dark" ? "light" : "dark";
  for (const place of document.querySelectorAll(".plot")) await draw(place);
  root.dataset.drawn = "yes";
}

button.addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  drawAll();
});

let waiting = 0, drawnAt = innerWidth;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); } }, 150);
});

const save = document.getElementById("save");
if (save) save.addEventListener("click", async () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await unzipped(save.dataset.trace)).blob());
  link.download = "trace.json";
  link.click();
  URL.revokeObjectURL(link.href);
});

load().then(drawAll);
