// The timeline of a run: who runs when, who owns the memory, what each step computes, and why. One file without
// dependencies: marimo and Jupyter load it as a widget, a report carries it inline with its data (`standalone`).
//
// Python sends batches (llmlab/ui/frames.py); `Book` keeps what they say, `View` draws it. Times are ticks.

const CSS = `
.llt { --ink:#1f2933; --mute:#5d6772; --line:#e3e7ec; --paper:#fff; --chip:#eef1f4; --hot:#d55e00; --blue:#0072b2; --good:#00734f;
  color:var(--ink); background:var(--paper); font:13px/1.45 system-ui,-apple-system,"Segoe UI","Liberation Sans",Helvetica,Arial,sans-serif;
  box-sizing:border-box; padding:12px 14px 14px; border-radius:10px; min-width:0; outline:none; text-align:left; container-type:inline-size; }
.llt[data-theme=dark] { --ink:#e6e9ee; --mute:#9aa5b1; --line:#2b333d; --paper:#15191e; --chip:#222932; --hot:#ff7a33; --blue:#3d9bd9; --good:#1fb98c; color-scheme:dark; }
.llt *, .llt *::before { box-sizing:border-box; }
.llt :focus-visible { outline:2px solid var(--blue); outline-offset:2px; border-radius:4px; }
.llt h3 { font-size:17px; line-height:1.3; font-weight:600; margin:0; text-wrap:balance; color:var(--ink); }
.llt h4 { font-size:13px; font-weight:600; margin:0; color:var(--ink); }
.llt p { margin:0; }
.llt .facts { color:var(--mute); margin:1px 0 8px; }
.llt .mode { display:inline-block; border:1px solid var(--line); background:var(--chip); color:var(--ink); border-radius:5px; padding:0 6px; margin-right:6px; }
.llt .bar { display:flex; flex-wrap:wrap; gap:6px; align-items:center; margin:2px 0 6px; }
.llt button, .llt select { font:inherit; color:var(--ink); background:var(--chip); border:1px solid var(--line); border-radius:7px; padding:3px 9px; cursor:pointer; min-width:30px; }
.llt button:hover, .llt select:hover { border-color:var(--mute); }
.llt .play { min-width:66px; font-weight:600; }
.llt .gap { flex:1; }
.llt canvas { display:block; width:100%; contain:strict; touch-action:pan-y; cursor:crosshair; }
.llt .over { border-radius:6px; cursor:ew-resize; }
.llt .tiles { display:flex; flex-wrap:wrap; gap:4px 22px; margin:8px 0 12px; contain:layout style; }
.llt .tiles div { min-width:62px; }
.llt .tiles span { color:var(--mute); display:block; font-size:12px; }
.llt .tiles b { font-size:17px; font-weight:600; font-variant-numeric:tabular-nums; white-space:nowrap; }
.llt .tiles b.hot { color:var(--hot); }
.llt .stage { display:grid; grid-template-columns:minmax(0,1fr) 320px; gap:18px; }
.llt .stage > * { min-width:0; }
.llt .head { display:flex; flex-wrap:wrap; gap:2px 12px; align-items:baseline; margin:0 0 4px; }
.llt .head .note { color:var(--mute); font-size:12px; margin-left:auto; }
.llt .legend { display:flex; flex-wrap:wrap; gap:2px 12px; color:var(--mute); font-size:12px; }
.llt .legend i { display:inline-block; width:11px; height:9px; margin-right:4px; border-radius:1.5px; }
.llt .legend i.thin { height:3px; vertical-align:3px; }
.llt .legend i.tick { width:2px; height:11px; vertical-align:-1px; border-radius:0; }
.llt .below { margin-top:12px; }
.llt ol { list-style:none; margin:4px 0 0; padding:0; }
.llt .log { max-height:300px; overflow:auto; scrollbar-width:thin; }
.llt .log li { display:grid; grid-template-columns:max-content 34px 1fr; gap:0 8px; padding:2px 4px 2px 6px; border-left:3px solid transparent; color:var(--mute); font-size:12.5px; }
.llt .log li.now { color:var(--ink); border-left-color:var(--blue); background:var(--chip); }
.llt .log b { font-weight:600; }
.llt .log .t, .llt .log .who { font-variant-numeric:tabular-nums; white-space:nowrap; color:inherit; }
.llt .log .what { overflow-wrap:anywhere; }
.llt .log .k-preempt, .llt .log .k-victim, .llt .log .k-full, .llt .log .k-failed, .llt .log .k-refuse { color:var(--hot); }
.llt .log .k-admit, .llt .log .k-resume { color:var(--good); }
.llt .log .k-finish { color:var(--blue); }
.llt .log ul { margin:1px 0 3px; padding:0; list-style:none; color:var(--mute); }
.llt .log ul li { display:block; padding:0; border:0; background:none; }
.llt .log ul li.now { background:none; }
.llt .log ul button { padding:0 6px; min-width:0; font-size:11.5px; margin-left:5px; }
.llt code { font:12px ui-monospace,"Liberation Mono",Menlo,Consolas,monospace; background:var(--chip); color:var(--ink); border-radius:4px; padding:1px 5px; overflow-wrap:anywhere; }
.llt .why { margin-top:14px; border-top:1px solid var(--line); padding-top:10px; }
.llt .why .head button { margin-left:auto; }
.llt .why ol { margin-top:8px; }
.llt .why ol li { position:relative; padding:0 0 9px 20px; border-left:2px solid var(--line); margin-left:6px; max-width:76em; }
.llt .why ol li:last-child { border-left-color:transparent; padding-bottom:0; }
.llt .why ol li::before { content:""; position:absolute; left:-7px; top:4px; width:12px; height:12px; border-radius:50%; background:var(--dot); border:2px solid var(--paper); }
.llt .why .when { color:var(--mute); }
.llt .tip { position:fixed; z-index:10; pointer-events:none; background:var(--paper); color:var(--ink); border:1px solid var(--line); border-radius:7px; padding:4px 9px; box-shadow:0 4px 14px rgb(0 0 0 / .18); font-size:12.5px; max-width:290px; white-space:pre-line; }
.llt .sr { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); white-space:nowrap; }
.llt .empty { color:var(--mute); padding:24px 0; }
@container (max-width: 820px) { .llt .stage { grid-template-columns:minmax(0,1fr); } .llt .log { max-height:230px; } }
@container (max-width: 520px) { .llt .tiles { gap:4px 16px; } .llt h3 { font-size:15px; } .llt .log li { gap:0 5px; } .llt .optional { display:none; } }
`;

const LEFT = 46, RIGHT = 10, AXIS = 20;
const SLOTS = [6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 100, 128, 160, 200, 260, 340, 440, 580, 760, 1000];
const SECONDS_ON_SCREEN = 30; // a whole run at speed 1
const LIVE_MS = 120; // between two pictures of a live run, however often its data come
const WORDS_MS = 330; // between two texts (and walls) while pictures move: nobody reads faster, and a new word makes the page lay itself out
const SHARE = 30; // a picture of a live run may take one part in so many of the time: a slow machine draws fewer
const SLOW_MS = 500; // between two pictures of what changes slowly while a live run is followed
const [QUEUED, PREFILL, DECODE, PREEMPTED, SWAPPED, RECOMPUTE, HELD] = [0, 1, 2, 3, 4, 5, 6];
const DOING = ["in the queue", "computing its prompt", "decoding", "preempted", "swapped out", "computing again what was dropped", "running, but in no step"];

// ------------------------------------------------------------------------------------------ small things
function bisect(sorted, value) { // the number of entries <= value
  let low = 0, high = sorted.length;
  while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] <= value) low = middle + 1; else high = middle; }
  return low;
}
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
function seconds(s) {
  const size = Math.abs(s);
  if (size >= 100) return s.toFixed(0) + " s";
  if (size >= 1) return s.toFixed(2) + " s";
  if (size >= 1e-3 || size === 0) return +(s * 1e3).toPrecision(3) + " ms";
  return +(s * 1e6).toPrecision(3) + " µs";
}
const plural = (n, noun) => n.toLocaleString("en") + " " + noun + (n === 1 ? "" : "s");
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(child => child != null));
  return node;
}
function say(node, text) { // only a new text touches the page
  if (node.textContent !== text) node.textContent = text;
}
function niceStep(span, most) { // 1, 2, 5 times a power of ten, at most `most` of them in `span`
  const raw = span / most, power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find(m => m * power >= raw * 0.999);
}
async function unpacked(bytes) { // gzip of JSON
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// ----------------------------------------------------------------------------- what the batches said
const COLUMNS = ["step", "start", "end", "prefill", "decode", "running", "waiting", "used", "predicted"];

class Book {
  constructor() { this.clear(); }

  clear() {
    this.meta = null; this.now = 0; this.number = 0; this.lost = 0;
    this.requests = new Map(); this.byArrival = []; this.notes = []; this.noteSteps = [];
    this.base = 0; this.steps = Object.fromEntries(COLUMNS.map(name => [name, []]));
    this.walls = new Map(); this.wall0 = []; this.tape = null; this.nextNote = 0;
  }

  get length() { return this.steps.step.length; }

  // False if a batch is missing: ask for everything again.
  add(batch) {
    if (batch.whole) this.clear();
    else if (!this.meta && !batch.meta) return false;
    else if (batch.number !== this.number + 1 || batch.row > this.base + this.length) return batch.number <= this.number;
    this.number = batch.number;
    if (batch.meta) this.meta = batch.meta;
    this.now = batch.now; this.lost = batch.lost;
    if (batch.whole) { this.base = batch.row; this.wall0 = batch.wall0 || []; this.nextNote = batch.note; }
    this.addSteps(batch.steps, this.base + this.length - batch.row);
    for (const [row, changes] of batch.walls) this.walls.set(row, changes);
    for (const fields of batch.requests) this.addRequest(fields);
    for (const [step, t, kind, request, text, cost, options, seq] of batch.notes.slice(this.nextNote - batch.note)) {
      this.nextNote++;
      this.notes.push({ step, t, kind, request, text, cost, options, seq });
      this.noteSteps.push(Math.max(step, this.noteSteps.at(-1) ?? step));
    }
    if (this.meta.keep && this.length > this.meta.keep * 1.25) this.forget(this.length - this.meta.keep);
    return true;
  }

  addSteps(columns, known) { // the first `known` of them have been sent before
    const s = this.steps;
    let step = 0, end = 0;
    for (let i = 0; i < columns.step.length; i++) {
      step += columns.step[i];
      const start = end + columns.start[i];
      end = start + columns.end[i];
      if (i < known) continue;
      s.step.push(step); s.start.push(start); s.end.push(end);
      s.predicted.push(columns.predicted[i] === null ? -1 : columns.predicted[i] + columns.end[i]);
      for (const name of ["prefill", "decode", "running", "waiting", "used"]) s[name].push(columns[name][i]);
    }
  }

  addRequest([index, id, arrival, prompt, first, end, reason, output, cached, status, from, flat]) {
    let r = this.requests.get(index);
    if (!r) {
      r = { index, id, arrival, prompt, spans: [] };
      this.requests.set(index, r);
      let at = this.byArrival.length;
      while (at > 0 && this.byArrival[at - 1].arrival > arrival) at--;
      this.byArrival.splice(at, 0, r);
    }
    Object.assign(r, { first, end, reason, output, cached, status });
    r.spans.length = Math.min(r.spans.length, from);
    for (let i = 0; i < flat.length; i += 5) r.spans.push({ kind: flat[i], a: flat[i + 1], b: flat[i + 2], steps: flat[i + 3], tokens: flat[i + 4] });
  }

  forget(count) {
    this.wall0 = this.wallAt(this.base + count - 1).flatMap((value, key) => value === this.nobody ? [] : [key, value]);
    this.tape = null;
    for (let row = this.base; row < this.base + count; row++) this.walls.delete(row);
    for (const name of COLUMNS) this.steps[name].splice(0, count);
    this.base += count;
    const step = this.steps.step[0], start = this.steps.start[0], old = bisect(this.noteSteps, step - 1);
    this.notes.splice(0, old); this.noteSteps.splice(0, old);
    this.byArrival = this.byArrival.filter(r => r.end < 0 || r.end >= start);
    this.requests = new Map(this.byArrival.map(r => [r.index, r]));
  }

  get nobody() { return this.meta.wall === "holds" ? 0 : -1; }

  // The wall while `row` runs: an array by block (level 3) or of blocks held by each request (level 2).
  wallAt(row) {
    const far = 512;
    if (!this.tape) {
      const size = this.meta.wall === "blocks" ? this.meta.num_blocks : 0, cells = new Array(size).fill(-1);
      for (let i = 0; i < this.wall0.length; i += 2) cells[this.wall0[i]] = this.wall0[i + 1];
      this.tape = { row: this.base - 1, cells, marks: new Map([[this.base - 1, cells.slice()]]) };
    }
    const tape = this.tape;
    if (row < tape.row || row - tape.row > far) {
      let from = -1e18;
      for (const mark of tape.marks.keys()) if (mark <= row && mark > from) from = mark;
      if (row < tape.row || from > tape.row) { tape.cells = tape.marks.get(from).slice(); tape.row = from; }
    }
    while (tape.row < row) {
      const changes = this.walls.get(++tape.row) || [];
      for (let i = 0; i < changes.length; i += 2) tape.cells[changes[i]] = changes[i + 1];
      if ((tape.row - this.base) % far === 0) tape.marks.set(tape.row, tape.cells.slice());
    }
    return tape.cells;
  }

  // Row of a step number: the step itself, or the last one before it.
  rowOf(step) { return step < 0 ? this.length - 1 : clamp(bisect(this.steps.step, step) - 1, 0, this.length - 1); }

  rowAt(time) { return clamp(bisect(this.steps.start, time) - 1, 0, this.length - 1); }

  get begin() { return Math.min(this.byArrival[0]?.arrival ?? Infinity, this.steps.start[0] ?? Infinity, this.now); }

  find(id) { return this.byArrival.find(r => r.id === id); }
}

// ------------------------------------------------------------------------------------------- theme
// Dark if the first background behind the element is dark; otherwise what the system prefers.
function surroundings(element) {
  const dot = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  for (let node = element.parentNode; node; node = node.parentNode || node.host) {
    if (!(node instanceof Element)) continue;
    dot.clearRect(0, 0, 1, 1);
    dot.fillStyle = getComputedStyle(node).backgroundColor; // in whatever colour space the page thinks: the canvas knows them all
    dot.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = dot.getImageData(0, 0, 1, 1).data;
    if (alpha > 127) return 0.3 * red + 0.59 * green + 0.11 * blue < 110 ? "dark" : "light";
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

// -------------------------------------------------------------------------------------------- view
class View {
  constructor(model, el) {
    this.model = model; this.book = new Book(); this.row = 0; this.follow = true; this.zoom = null;
    this.hover = null; this.drawnAt = 0; this.whys = new Map(); this.widths = new Map(); this.entries = new Map(); this.slowAt = -1e9; this.took = 0; this.dirty = true; this.coming = false; this.wordy = true; this.wordsAt = -1e9; this.saidStep = null; this.alive = true; this.forks = new Map();
    this.build(el);
    this.cleanups = [];
    this.wire();
  }

  // ---------------------------------------------------------------------------------------- the page
  build(el) {
    const button = (label, title, act, name = "") => make("button", { type: "button", title, "aria-label": title, class: name, onclick: act }, label);
    this.title = make("h3"); this.facts = make("p", { class: "facts" });
    this.play = button("Play", "Play (space)", () => this.setPlaying(!this.playing), "play");
    this.speed = make("select", { title: "Speed", "aria-label": "Speed", onchange: () => this.save("speed", +this.speed.value) },
      ...[0.05, 0.1, 0.25, 0.5, 1, 2, 4].map(x => make("option", { value: x }, x + "x")));
    this.themeButton = button("Dark", "Switch between light and dark", () => this.save("theme", this.theme === "dark" ? "light" : "dark"), "theme");
    const controls = make("div", { class: "bar" }, this.play,
      button("|‹", "First step (home)", () => this.goTo(0)), button("‹", "Step before (left arrow)", () => this.goBy(-1), "before"),
      button("›", "Next step (right arrow)", () => this.goBy(1), "next"), button("›|", "Newest step (end)", () => this.goTo(Infinity)),
      this.speed, make("span", { class: "gap" }),
      button("−", "Show more time (minus)", () => this.zoomBy(2)), button("+", "Show less time (plus)", () => this.zoomBy(0.5)),
      button("All", "Show the whole run (0)", () => this.zoomBy(Infinity), "optional"), this.themeButton);
    this.over = make("canvas", { class: "over", tabindex: 0, role: "slider", "aria-label": "Step of the run" });
    this.tiles = make("div", { class: "tiles" });
    this.lines = make("canvas", { role: "img", "aria-label": "Timeline of the requests" });
    this.strip = make("canvas", { role: "img", "aria-label": "Tokens in each step" });
    this.wall = make("canvas", { role: "img", "aria-label": "Owners of the KV blocks" });
    this.legend = make("span", { class: "legend" });
    this.linesNote = make("span", { class: "note" }); this.stripNote = make("span", { class: "note" });
    this.wallNote = make("span", { class: "note" }); this.wallSmall = make("p", { class: "legend" });
    this.log = make("ol", { class: "log", tabindex: 0, "aria-label": "Decisions" }); this.logTitle = make("h4", {}, "Decisions");
    this.why = make("section", { class: "why", hidden: true, "aria-label": "Why was it late" });
    this.live = make("div", { class: "sr", "aria-live": "polite", "aria-atomic": "true" });
    this.tip = make("div", { class: "tip", hidden: true });
    this.empty = make("p", { class: "empty" }, "No step yet.");
    this.main = make("div", { hidden: true }, controls, this.over, this.tiles,
      make("div", { class: "stage" },
        make("div", {}, make("div", { class: "head" }, make("h4", {}, "Who runs when"), this.legend, this.linesNote), this.lines,
          make("div", { class: "head below" }, make("h4", {}, "Tokens in each step (square root scale)"), this.stripNote), this.strip),
        make("div", {}, make("div", { class: "head" }, make("h4", {}, "Who owns the KV blocks"), this.wallNote), this.wall, this.wallSmall,
          make("div", { class: "head below" }, this.logTitle), this.log)),
      this.why);
    this.root = make("div", { class: "llt", tabindex: -1, role: "group", "aria-label": "Timeline of a run" },
      make("style", {}, CSS), this.title, this.facts, this.empty, this.main, this.live, this.tip);
    el.replaceChildren(this.root);
  }

  wire() {
    const { model, root } = this;
    const on = (name, act) => { model.on(name, act); this.cleanups.push(() => model.off(name, act)); };
    on("msg:custom", message => this.hear(message));
    on("change:_packed", () => this.unpack());
    on("change:_mode", () => { this.book.number = -2; this.whys.clear(); this.zoom = null; this.follow = true; this.shown = null; this.start(); }); // no batch fits before the whole
    on("change:step", () => { if (model.get("step") !== this.sentStep) this.showStep(model.get("step")); });
    on("change:selected", () => this.showWhy());
    on("change:theme", () => this.redress());
    on("change:playing", () => { this.clock = null; this.redraw(); });
    on("change:speed", () => this.redraw());
    root.addEventListener("keydown", event => this.key(event));
    this.dragging(this.over, x => this.seekOver(x));
    this.dragging(this.strip, x => this.seekLines(x));
    this.dragging(this.lines, x => this.seekLines(x), (x, y) => this.clickLines(x, y));
    this.wall.addEventListener("click", event => this.clickWall(event));
    for (const canvas of [this.lines, this.strip, this.wall]) {
      canvas.addEventListener("pointermove", event => this.pointAt(canvas, event));
      canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; if (this.hover) { this.hover = null; this.redraw(); } });
    }
    const resized = new ResizeObserver(entries => { for (const one of entries) this.widths.delete(one.target); this.redraw(); });
    for (const node of [root, this.over, this.lines, this.strip, this.wall]) resized.observe(node);
    const dressed = new MutationObserver(() => this.redress());
    for (const node of [document.documentElement, document.body]) dressed.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-theme", "data-jp-theme-light"] });
    const prefers = matchMedia("(prefers-color-scheme: dark)"), redress = () => this.redress();
    prefers.addEventListener("change", redress);
    this.cleanups.push(() => resized.disconnect(), () => dressed.disconnect(), () => prefers.removeEventListener("change", redress));
    this.redress();
  }

  async start() {
    if (this.model.get("_mode") === "live") this.model.send({ type: "hello" });
    else await this.unpack();
    if (this.model.get("selected")) this.showWhy();
  }

  close() { this.alive = false; for (const act of this.cleanups) act(); }

  redraw(pause = 0) { this.dirty = true; this.schedule(pause); }

  // One frame for all that changed until then, `pause` ms after the last one; none while nothing does.
  schedule(pause = 0) {
    if (this.coming || !this.alive) return;
    this.coming = true;
    const wait = pause && pause - (performance.now() - this.drawnAt);
    const ask = () => requestAnimationFrame(now => { this.coming = false; if (this.alive) this.frame(now); });
    if (wait > 1) setTimeout(ask, wait); else ask();
  }

  width(node) { // asking the page makes it lay out everything
    if (!this.widths.has(node)) this.widths.set(node, node.clientWidth);
    return this.widths.get(node);
  }

  // --------------------------------------------------------------------------------------- messages
  async unpack() {
    const packed = this.model.get("_packed");
    if (!packed || !packed.byteLength) return;
    this.hear({ type: "batch", batch: await unpacked(packed) });
    this.showStep(this.model.get("step"));
  }

  hear(message) {
    if (message.type === "batch") {
      const fresh = !this.book.meta;
      if (!this.book.add(message.batch)) { this.model.send({ type: "hello" }); return; }
      if (message.batch.meta) this.describe();
      if (fresh || message.batch.whole) this.redress();
      if (this.follow && this.book.length) this.row = this.book.length - 1;
      else if (this.shown != null) this.row = this.book.rowOf(this.shown);
      this.redraw(this.isLive ? clamp(SHARE * this.took, LIVE_MS, 250) : 0);
    } else if (message.type === "why") {
      this.whys.set(message.request, message);
      if (this.model.get("selected") === message.request) this.showWhy();
    } else if (message.type === "fork") {
      this.forks.set(message.key, message.call);
      this.saidLog = null; this.redraw();
    }
  }

  describe() {
    const m = this.book.meta;
    this.title.textContent = m.title || "";
    this.title.hidden = !m.title;
    const policies = Object.entries(m.policies || {}).map(([seam, name]) => `${seam} ${name}`).join(", ");
    this.facts.replaceChildren(make("span", { class: "mode" }, m.mode || "not said"), `${m.model} on ${m.hardware}, seed ${m.seed ?? "?"}. ` +
      (policies ? policies[0].toUpperCase() + policies.slice(1) + "." : "") + (m.facts ? " " + m.facts : ""));
  }

  save(name, value) { this.model.set(name, value); this.model.save_changes(); }

  get playing() { return !!this.model.get("playing"); }
  get isLive() { return this.model.get("_mode") === "live"; }

  setPlaying(playing) {
    if (playing && this.isLive) this.goTo(Infinity);
    if (playing && !this.isLive && this.row >= this.book.length - 1) { this.row = 0; this.follow = false; }
    if (!playing) { this.follow = false; this.tell(true); }
    this.clock = null;
    this.save("playing", playing);
    this.redraw();
  }

  // ------------------------------------------------------------------------------------- where we are
  goTo(row) {
    const last = this.book.length - 1;
    this.follow = row > last && this.isLive;
    this.row = clamp(row, 0, Math.max(0, last));
    this.tell();
    this.redraw();
  }

  goBy(steps) { if (this.playing) this.setPlaying(false); this.goTo(clamp(this.row + steps, 0, this.book.length - 1)); }

  showStep(step) {
    if (!this.book.length) return;
    this.follow = step < 0 && this.isLive;
    this.row = this.book.rowOf(step);
    this.shown = this.follow ? null : this.book.steps.step[this.row];
    this.redraw();
  }

  // Tell Python where we are, at most five times a second.
  tell(atOnce = false) {
    this.shown = this.follow ? null : this.book.steps.step[this.row] ?? null;
    const send = () => {
      this.telling = null;
      const step = this.follow ? -1 : this.book.steps.step[this.row] ?? -1;
      if (this.model.get("step") === step) return;
      this.sentStep = step;
      this.save("step", step);
    };
    if (atOnce) { clearTimeout(this.telling); send(); }
    else this.telling ??= setTimeout(send, 200);
  }

  get cursor() { // ticks: the middle of the step, or the newest instant while following
    if (this.follow) return this.book.now;
    const s = this.book.steps;
    return s.start[this.row] ?? this.book.now;
  }

  get whole() { const { begin, now } = this.book; return [begin, Math.max(now, begin + 1)]; }

  get autoSpan() {
    const [a, b] = this.whole, n = this.book.byArrival.length;
    if (n <= 60) return b - a;
    return this.isLive ? niceStep((b - a) * 40 / n, 1) : (b - a) * 48 / n;
  }

  get window() {
    const [a, b] = this.whole, room = 0.02;
    const span = Math.min(this.zoom ?? this.autoSpan, (b - a) * (1 + room));
    if (span >= (b - a)) return [a - (b - a) * 0.005, b + (b - a) * room];
    if (this.follow) return [b - span * (1 - room), b + span * room];
    const start = clamp(this.cursor - 0.62 * span, a, b + span * room - span);
    return [start, start + span];
  }

  zoomBy(factor) {
    const [a, b] = this.whole, [from, to] = this.window;
    this.zoom = factor === Infinity ? b - a : clamp((to - from) * factor, Math.max(10, this.shortest() * 4), (b - a) * 1.02);
    this.redraw();
  }

  shortest() { const s = this.book.steps; return this.book.length ? s.end[this.row] - s.start[this.row] : 1; }

  // ---------------------------------------------------------------------------------------- by hand
  key(event) {
    if (event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => this.goBy(event.shiftKey ? -10 : -1), ArrowRight: () => this.goBy(event.shiftKey ? 10 : 1),
      PageUp: () => this.goBy(-50), PageDown: () => this.goBy(50),
      Home: () => { if (this.playing) this.setPlaying(false); this.goTo(0); }, End: () => this.goTo(this.isLive ? Infinity : this.book.length - 1),
      "+": () => this.zoomBy(0.5), "=": () => this.zoomBy(0.5), "-": () => this.zoomBy(2), 0: () => this.zoomBy(Infinity),
      ArrowUp: () => this.selectBy(-1), ArrowDown: () => this.selectBy(1), Escape: () => this.select(""),
      " ": () => { if (event.target.tagName === "BUTTON") return false; this.setPlaying(!this.playing); },
    }[event.key];
    if (!act || event.target.closest(".log") && event.key.startsWith("Arrow") && event.key.length > 9) return;
    if (act() !== false) { event.preventDefault(); event.stopPropagation(); }
  }

  dragging(canvas, move, click = null) {
    let from = null, moved = false;
    canvas.addEventListener("pointerdown", event => { from = event; moved = false; canvas.setPointerCapture(event.pointerId); if (!click) move(event.offsetX); });
    canvas.addEventListener("pointermove", event => {
      if (!from) return;
      moved ||= Math.abs(event.clientX - from.clientX) > 4;
      if (moved || !click) { if (this.playing) this.setPlaying(false); move(event.offsetX); }
    });
    canvas.addEventListener("pointerup", event => { if (from && !moved && click) click(event.offsetX, event.offsetY); from = null; });
    canvas.addEventListener("pointercancel", () => { from = null; });
  }

  seek(time) { if (this.book.length) { if (this.playing) this.setPlaying(false); this.goTo(this.book.rowAt(time)); } }

  seekOver(x) {
    const [a, b] = this.whole;
    this.seek(a + clamp((x - LEFT) / (this.over.clientWidth - LEFT - RIGHT), 0, 1) * (b - a));
  }

  timeAt(x) { const [a, b] = this.drawn || this.window; return a + (x - LEFT) / (this.lines.clientWidth - LEFT - RIGHT) * (b - a); }

  seekLines(x) { this.seek(this.timeAt(Math.max(x, LEFT))); }

  clickLines(x, y) {
    const hit = this.requestAt(x, y);
    if (hit) this.select(hit.id === this.model.get("selected") ? "" : hit.id);
    else this.seekLines(x);
  }

  clickWall(event) {
    const owner = this.ownerAt(event.offsetX, event.offsetY);
    if (owner) this.select(owner.id);
  }

  select(id) {
    this.save("selected", id);
    this.showWhy();
  }

  selectBy(by) {
    const shown = this.shownRequests || [];
    if (!shown.length) return;
    const at = shown.findIndex(r => r.id === this.model.get("selected"));
    this.select(shown[clamp(at < 0 ? (by > 0 ? 0 : shown.length - 1) : at + by, 0, shown.length - 1)].id);
  }

  requestAt(x, y) {
    const i = Math.floor((y - 4) / this.rowHeight), r = this.shownRequests?.[i];
    if (!r || y < 4) return null;
    const t = this.timeAt(x), slack = (this.drawn[1] - this.drawn[0]) * 6 / this.lines.clientWidth;
    return x < LEFT || (t >= r.arrival - slack && t <= (r.end < 0 ? this.book.now : r.end) + slack) ? r : null;
  }

  ownerAt(x, y) {
    const g = this.grid;
    if (!g) return null;
    const column = Math.floor(x / g.pitch), row = Math.floor(y / g.pitch);
    const value = column < g.columns ? g.cells[(row * g.columns + column) * g.group] : undefined;
    return value >= 0 ? this.book.requests.get(value >> 1) : null;
  }

  pointAt(canvas, event) {
    const words = canvas === this.lines ? this.linesTip(event) : canvas === this.strip ? this.stripTip(event) : this.wallTip(event);
    const before = this.hover;
    this.hover = canvas === this.lines ? this.requestAt(event.offsetX, event.offsetY) : canvas === this.wall ? this.ownerAt(event.offsetX, event.offsetY) : null;
    if (this.hover !== before) this.redraw();
    this.tip.hidden = !words;
    if (!words) return;
    this.tip.textContent = words;
    const right = event.clientX > innerWidth - 310;
    this.tip.style.left = right ? "" : event.clientX + 14 + "px";
    this.tip.style.right = right ? innerWidth - event.clientX + 14 + "px" : "";
    this.tip.style.top = Math.min(event.clientY + 14, innerHeight - 90) + "px";
  }

  secs(ticks) { return seconds(ticks / this.book.meta.ticks); }

  linesTip(event) {
    const r = this.requestAt(event.offsetX, event.offsetY);
    if (!r) return "";
    const t = this.timeAt(event.offsetX), s = r.spans.find(s => t >= s.a && t <= s.b);
    const doing = s ? `\n${DOING[s.kind]} for ${this.secs(s.b - s.a)}` + (s.steps ? `: ${plural(s.steps, "step")}` + (s.tokens >= 0 ? `, ${plural(s.tokens, "token")}` : "") : "") : "";
    const first = r.first >= 0 ? `\nfirst token after ${this.secs(r.first - r.arrival)}` : "\nno token yet";
    const end = r.end >= 0 ? `, end after ${this.secs(r.end - r.arrival)}` : "";
    return `${r.id}: ${r.prompt} → ${r.output} tokens${r.cached ? `, ${r.cached} cached` : ""}${doing}${first}${end}\nclick: why was it late?`;
  }

  stripTip(event) {
    if (!this.book.length) return "";
    const row = this.book.rowAt(this.timeAt(event.offsetX)), s = this.book.steps;
    const kinds = s.prefill[row] >= 0 ? `${s.prefill[row]} prefill, ${s.decode[row]} decode` : `${s.decode[row]}`;
    return `step ${s.step[row]}: ${kinds} tokens\n${this.secs(s.end[row] - s.start[row])}` + (s.predicted[row] >= 0 ? `, predicted ${this.secs(s.predicted[row])}` : "");
  }

  wallTip(event) {
    const g = this.grid;
    if (!g) return "";
    const cell = Math.floor(event.offsetY / g.pitch) * g.columns + Math.floor(event.offsetX / g.pitch), value = g.cells[cell * g.group];
    if (value === undefined || Math.floor(event.offsetX / g.pitch) >= g.columns) return "";
    const name = this.book.meta.wall === "blocks" ? (g.group > 1 ? `blocks from ${cell * g.group}` : `block ${cell}`) : "a block";
    if (value === -1) return `${name}: free`;
    if (value === -2) return `${name}: free, its tokens can still be found`;
    if (value === -3) return `${name}: in use`;
    const owner = this.book.requests.get(value >> 1);
    return `${name}: ${owner ? owner.id : "a request of before"}${value & 1 ? " and others" : ""}`;
  }

  // --------------------------------------------------------------------------------------- every frame
  frame(now) {
    const moving = this.playing && !this.isLive && this.book.length;
    if (moving) this.advance(now);
    if (moving && this.playing) this.schedule();
    if (!this.dirty || !this.width(this.root)) return;
    this.dirty = false; this.drawnAt = performance.now();
    const has = !!this.book.meta && (this.book.length > 0 || this.book.byArrival.length > 0);
    this.main.hidden = !has; this.empty.hidden = has;
    if (has) this.draw();
    this.took = 0.8 * this.took + 0.2 * (performance.now() - this.drawnAt);
  }

  advance(now) {
    if (this.clock) {
      const [a, b] = this.whole;
      this.clock.t += (now - this.clock.now) / 1e3 * (b - a) / SECONDS_ON_SCREEN * (this.model.get("speed") || 1);
      const row = this.book.rowAt(this.clock.t);
      if (row !== this.row) { this.row = row; this.follow = false; this.tell(); this.redraw(); }
      if (this.clock.t >= this.book.steps.end.at(-1)) this.setPlaying(false);
    } else this.clock = { t: this.cursor };
    if (this.clock) this.clock.now = now;
  }

  redress() {
    const wanted = this.model.get("theme");
    this.theme = wanted === "light" || wanted === "dark" ? wanted : surroundings(this.root);
    if (this.root.dataset.theme !== this.theme) this.root.dataset.theme = this.theme;
    this.themeButton.textContent = this.theme === "dark" ? "Light" : "Dark";
    const colours = this.book.meta?.colours;
    if (colours) {
      this.c = colours[this.theme];
      this.c.held = this.c.grid; this.hatches = {};
      const fill = (colour, name, word) => make("span", {}, make("i", { class: name, style: `background:${colour}` }), word);
      this.legend.replaceChildren(fill(this.c.waiting, "thin", "waiting"), fill(this.c.prefill, "", "prefill"), fill(this.c.decode, "", "decode"),
        fill(this.c.preempted, "thin", "preempted"), fill(this.c.transfer, "thin", "swapped"), fill(this.c.ink, "tick", "first token"));
    }
    this.redraw();
  }

  draw() {
    const b = this.book, s = b.steps, row = this.row;
    this.drawn = this.window;
    this.wordy = !this.playing || this.drawnAt - this.wordsAt >= WORDS_MS;
    this.drawLines(); this.drawStrip(); if (this.wordy || !this.isLive) this.drawWall(); // all canvases before the first new word: text on a canvas asks for the page's style
    this.root.dataset.step = s.step[row] ?? -1; this.root.dataset.batch = b.number; this.root.dataset.drawn = "yes";
    if (this.wordy) this.drawWords();
    else this.later ??= setTimeout(() => { this.later = null; this.redraw(); }, WORDS_MS);
  }

  drawWords() { // numbers and sentences
    const b = this.book, s = b.steps, row = this.row;
    this.wordsAt = this.drawnAt;
    if (!(this.isLive && this.follow) || this.drawnAt - this.slowAt >= SLOW_MS) this.drawSlowly();
    say(this.play, this.playing ? "Pause" : this.isLive ? "Follow" : "Play");
    this.play.ariaLabel = this.play.textContent;
    const m = b.meta, tokens = s.prefill[row] < 0 ? s.decode[row] : s.prefill[row] + s.decode[row];
    const budget = this.budget(s.start[row] ?? 0), blocks = this.pool(s.start[row] ?? 0), full = blocks && s.used[row] > 0.95 * blocks;
    const tile = (name, value, hot = false) => [name, String(value), hot];
    this.showTiles(b.length ? [
      tile("step", s.step[row].toLocaleString("en")), tile("clock", this.moment(s.start[row])),
      tile("step time", this.secs(s.end[row] - s.start[row])), ...(s.predicted[row] >= 0 ? [tile("predicted", this.secs(s.predicted[row]))] : []),
      tile(budget ? `tokens of ${budget}` : "tokens", tokens), tile("running", s.running[row]), tile("waiting", s.waiting[row]),
      tile("KV in use", blocks ? Math.round(100 * s.used[row] / blocks) + "%" : s.used[row], full)] :
      [tile("steps", "are recorded from log_level=1 on")]);
    this.drawLog();
  }

  note(node, text) { // words beside a picture, with the others
    if (this.wordy) say(node, text);
  }

  drawSlowly() { // the whole run, and what assistants are told of it
    const s = this.book.steps, row = this.row;
    this.slowAt = this.drawnAt;
    this.drawOver();
    this.speed.hidden = this.isLive;
    this.speed.value = this.model.get("speed");
    this.over.setAttribute("aria-valuemin", s.step[0] ?? 0); this.over.setAttribute("aria-valuemax", s.step.at(-1) ?? 0);
    this.over.setAttribute("aria-valuenow", s.step[row] ?? 0);
    this.over.setAttribute("aria-valuetext", this.book.length ? `step ${s.step[row]}, ${this.secs(s.start[row])}` : "no step");
  }

  showTiles(tiles) { // only what changed touches the page
    while (this.tiles.children.length < tiles.length) this.tiles.append(make("div", {}, make("span"), make("b")));
    while (this.tiles.children.length > tiles.length) this.tiles.lastChild.remove();
    tiles.forEach(([name, value, hot], i) => {
      const [label, number] = this.tiles.children[i].children;
      say(label, name); say(number, value);
      if (number.className !== (hot ? "hot" : "")) number.className = hot ? "hot" : "";
    });
  }

  // A canvas as sharp as the screen; the context is in CSS pixels.
  sheet(canvas, height, keep = false) {
    const width = this.width(canvas), ratio = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); canvas.style.height = height + "px";
    }
    const g = canvas.getContext("2d", { alpha: false }); // nothing shines through, so nothing needs to be mixed
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (!keep) this.wipe(g, 0, 0, width, height);
    if (!g.font.startsWith("11.5px")) g.font = "11.5px system-ui, 'Liberation Sans', Helvetica, Arial, sans-serif";
    g.textBaseline = "middle"; g.textAlign = "left";
    return { g, width, height };
  }

  wipe(g, x, y, width, height) { g.globalAlpha = 1; g.fillStyle = this.c.paper; g.fillRect(x, y, width, height); }

  hatch(g, colour, over) { // diagonal lines of `over` on `colour`
    const key = colour + over;
    if (!this.hatches[key]) {
      const tile = document.createElement("canvas");
      tile.width = tile.height = 6;
      const h = tile.getContext("2d");
      h.fillStyle = colour; h.fillRect(0, 0, 6, 6);
      h.strokeStyle = over; h.lineWidth = 1.6;
      h.beginPath(); h.moveTo(-1, 7); h.lineTo(7, -1); h.moveTo(-1, 1); h.lineTo(1, -1); h.moveTo(5, 7); h.lineTo(7, 5); h.stroke();
      this.hatches[key] = g.createPattern(tile, "repeat");
    }
    return this.hatches[key];
  }

  owner(index) { return this.c.owners[index % this.c.owners.length]; }

  // The whole run: how full the memory is, preemptions, what the timeline shows, and where we are.
  drawOver() {
    const { g, width, height } = this.sheet(this.over, 46), c = this.c, b = this.book, s = b.steps, [a, z] = this.whole;
    const left = LEFT, wide = width - LEFT - RIGHT, x = t => left + (t - a) / (z - a) * wide, base = height - 6, top = 10;
    g.fillStyle = c.mute; g.textAlign = "right";
    g.fillText("KV", left - 8, (base + top) / 2);
    g.fillStyle = c.grid; g.fillRect(left, top, wide, base - top);
    if (b.length && b.meta.num_blocks) {
      const peak = new Float32Array(Math.ceil(wide) + 1);
      for (let i = 0; i < b.length; i++) {
        const share = s.used[i] / this.pool(s.start[i]), from = Math.floor(x(s.start[i]) - left), to = Math.floor(x(s.end[i]) - left);
        for (let p = Math.max(0, from); p <= to && p < peak.length; p++) if (share > peak[p]) peak[p] = share;
      }
      g.globalAlpha = 0.55; g.fillStyle = c.mute;
      for (let p = 0; p < wide; p++) { const h = peak[p] * (base - top); g.fillRect(left + p, base - h, 1, h); }
      g.globalAlpha = 1;
    }
    g.fillStyle = c.preempted;
    for (const r of b.byArrival) for (const one of r.spans) if (one.kind === PREEMPTED || one.kind === SWAPPED) g.fillRect(x(one.a) - 0.75, 3, 1.5, 6);
    const [from, to] = this.drawn;
    if (to - from < (z - a) * 0.98) { g.strokeStyle = c.ink; g.lineWidth = 1; g.strokeRect(x(Math.max(a, from)) + 0.5, top - 1.5, Math.max(3, x(Math.min(z, to)) - x(Math.max(a, from))), base - top + 3); }
    const at = clamp(x(this.cursor), left, left + wide);
    g.fillStyle = c.decode; g.fillRect(at - 1, 4, 2, height - 6);
    g.beginPath(); g.arc(at, height - 6, 5, 0, 7); g.fill();
    g.strokeStyle = c.paper; g.lineWidth = 1.5; g.stroke();
  }

  axis(g, width, y, height, labels) {
    const [a, b] = this.drawn, per = this.book.meta.ticks, wide = width - LEFT - RIGHT, step = niceStep((b - a) / per, Math.max(4, wide / 90));
    const unit = step >= 0.5 ? [1, "s"] : step >= 5e-4 ? [1e3, "ms"] : [1e6, "µs"];
    g.textAlign = "center"; g.strokeStyle = this.c.grid; g.lineWidth = 1;
    for (let t = Math.ceil(a / per / step) * step; t * per <= b; t += step) {
      const x = Math.round(LEFT + (t * per - a) / (b - a) * wide) + 0.5;
      g.beginPath(); g.moveTo(x, y); g.lineTo(x, y + height); g.stroke();
      if (labels && x < width - RIGHT - 26) { g.fillStyle = this.c.mute; g.fillText(String(+(t * unit[0]).toPrecision(7)), x, y + height + 11); }
    }
    if (labels) { g.textAlign = "right"; g.fillStyle = this.c.mute; g.fillText(unit[1], width - 2, y + height + 11); }
    g.textAlign = "left";
  }

  drawLines() {
    const b = this.book, c = this.c, [a, z] = this.drawn, now = b.now;
    const shown = b.byArrival.filter(r => r.arrival <= z && (r.end < 0 ? now : r.end) >= a);
    this.shownRequests = shown;
    const narrow = this.width(this.root) < 840, slots = SLOTS.find(n => n >= shown.length) ?? shown.length;
    const tall = clamp(slots * 18, 150, narrow ? 300 : 372), { g, width } = this.sheet(this.lines, tall + 8 + AXIS);
    const h = this.rowHeight = tall / slots, wide = width - LEFT - RIGHT, x = t => LEFT + (t - a) / (z - a) * wide;
    this.axis(g, width, 4, tall, true);
    const cut = this.follow ? width : x(this.cursor);
    g.save(); g.beginPath(); g.rect(LEFT, 0, width - LEFT, tall + 8); g.clip();
    shown.forEach((r, i) => this.drawRequest(g, r, 4 + i * h, h, x, z, wide));
    if (cut < width) { g.globalAlpha = 0.66; g.fillStyle = c.paper; g.fillRect(cut, 0, width - cut, tall + 4); g.globalAlpha = 1; }
    g.restore();
    this.labels(g, shown, h, width, x, z);
    if (!this.follow) { g.fillStyle = c.decode; g.fillRect(Math.round(cut) - 1, 2, 2, tall + 4); }
    const active = b.length ? `${plural(shown.length, "request")} in view` : plural(shown.length, "request");
    this.note(this.linesNote, active + (b.lost ? `; ${plural(b.lost, "event")} fell out of the log unread` : ""));
    if (this.wordy) this.lines.setAttribute("aria-label", `Timeline: ${active}, from ${this.secs(Math.max(0, a))} to ${this.secs(z)}`);
  }

  drawRequest(g, r, y, h, x, z, wide) {
    const c = this.c, chosen = this.model.get("selected"), faded = chosen && chosen !== r.id && chosen !== "";
    const thick = Math.max(1, h * 0.66), thin = Math.max(1, Math.min(4, h * 0.24)), middle = y + h / 2;
    g.globalAlpha = faded ? 0.55 : 1;
    if (r === this.hover || chosen === r.id) { g.globalAlpha = 0.14; g.fillStyle = c.decode; g.fillRect(LEFT, y, wide, h); g.globalAlpha = 1; }
    const bar = (kind, from, to) => {
      const x0 = x(from), w = Math.max(x(to) - x0, kind === QUEUED || kind === HELD ? 0.3 : 0.8);
      if (x0 > LEFT + wide || x0 + w < LEFT) return;
      const size = kind === QUEUED || kind === PREEMPTED || kind === SWAPPED || kind === HELD ? thin : thick;
      g.fillStyle = [c.waiting, c.prefill, c.decode, c.preempted, c.transfer, h > 6 ? this.hatch(g, c.prefill, c.paper) : c.prefill, c.waiting][kind];
      if (kind === HELD) g.globalAlpha *= 0.55;
      g.fillRect(x0, middle - size / 2, w, size);
      if (kind === HELD) g.globalAlpha = faded ? 0.55 : 1;
      if ((kind === PREEMPTED || kind === SWAPPED) && h > 4) this.cross(g, x0, middle, Math.min(4.5, h * 0.3));
    };
    for (const s of r.spans) bar(s.kind, s.a, s.b);
    const covered = r.spans.at(-1)?.b ?? r.arrival;
    if (r.end < 0 && this.book.now > covered && (r.status === QUEUED || r.status === PREEMPTED || r.status === SWAPPED)) bar(r.status, covered, this.book.now);
    if (h > 9) {
      const at = x(r.arrival);
      g.fillStyle = c.ink; g.beginPath(); g.moveTo(at - 3, middle - 4); g.lineTo(at + 4, middle); g.lineTo(at - 3, middle + 4); g.fill();
    }
    if (r.first >= 0 && h > 5) { g.fillStyle = c.ink; g.fillRect(x(r.first) - 0.75, middle - thick / 2 - 1, 1.5, thick + 2); }
    g.globalAlpha = 1;
  }

  cross(g, x, y, size) {
    g.strokeStyle = this.c.preempted; g.lineWidth = 1.8;
    g.beginPath(); g.moveTo(x - size, y - size); g.lineTo(x + size, y + size); g.moveTo(x + size, y - size); g.lineTo(x - size, y + size); g.stroke();
  }

  labels(g, shown, h, width, x, z) {
    const c = this.c, every = h >= 11 ? 1 : Math.ceil(13 / h), chosen = this.model.get("selected");
    shown.forEach((r, i) => {
      const y = Math.max(7, 4 + i * h + h / 2), mine = r.id === chosen || r === this.hover;
      if (i % every === 0 || mine) {
        g.textAlign = "right"; g.fillStyle = mine ? c.ink : c.mute;
        const name = r.id.length > 6 ? "…" + r.id.slice(-5) : r.id;
        if (mine && every > 1) { g.fillStyle = c.paper; g.fillRect(0, y - 7, LEFT - 10, 14); g.fillStyle = c.ink; }
        g.fillText(name, LEFT - 12, y);
      }
      if (h >= 5) { g.fillStyle = this.owner(r.index); g.fillRect(LEFT - 8, y - Math.min(4, h * 0.3), 4, Math.min(8, h * 0.6)); }
      const end = r.end < 0 ? this.book.now : r.end;
      if (h >= 12 && end <= z) {
        const words = `${r.prompt} → ${r.output}` + (r.reason === "abort" || r.reason === "error" ? ` ${r.reason}` : ""), at = x(end) + 6;
        g.textAlign = "left"; g.fillStyle = c.mute;
        if (at + this.wide(g, words) < width) g.fillText(words, at, y);
      }
    });
    g.textAlign = "left";
  }

  wide(g, words) { // pixels; the words of a finished request never change
    this.lengths ??= new Map();
    if (this.lengths.size > 2000) this.lengths.clear();
    if (!this.lengths.has(words)) this.lengths.set(words, g.measureText(words).width);
    return this.lengths.get(words);
  }

  // Tokens of each step as two bars, where there is room for that; cheaper than pixel by pixel.
  drawBars(g, first, last, x, y, future) {
    const s = this.book.steps, c = this.c, known = s.prefill[first] >= 0;
    for (const [late, alpha] of future < Infinity ? [[false, 1], [true, 0.4]] : [[false, 1]]) {
      const bars = [new Path2D(), new Path2D()];
      for (let i = first; i < last; i++) {
        if (x(s.start[i]) - LEFT > future !== late) continue;
        const from = Math.max(LEFT, Math.round(x(s.start[i]))), to = Math.max(from + 1, Math.round(x(s.end[i])));
        const decode = y(s.decode[i]), both = y(s.decode[i] + Math.max(0, s.prefill[i]));
        bars[0].rect(from, decode, to - from, y(0) - decode);
        if (both < decode) bars[1].rect(from, both, to - from, decode - both);
      }
      g.globalAlpha = alpha;
      g.fillStyle = known ? c.decode : c.mute; g.fill(bars[0]);
      g.fillStyle = c.prefill; g.fill(bars[1]);
    }
  }

  drawPixels(g, first, last, x, y, future) { // means, and in pale the peaks
    const s = this.book.steps, c = this.c, known = s.prefill[first] >= 0, wide = this.width(this.strip) - LEFT - RIGHT;
    const n = Math.ceil(wide) + 1, sums = [new Float64Array(n), new Float64Array(n)], peak = new Float64Array(n), busy = new Float64Array(n);
    for (let i = first; i < last; i++) {
      const from = Math.max(0, x(s.start[i]) - LEFT), to = Math.min(n - 1, Math.max(x(s.end[i]) - LEFT, x(s.start[i]) - LEFT + 0.2));
      for (let p = Math.floor(from); p <= to; p++) {
        const weight = Math.min(to, p + 1) - Math.max(from, p);
        if (weight <= 0) continue;
        busy[p] += weight; sums[0][p] += weight * s.decode[i]; sums[1][p] += weight * Math.max(0, s.prefill[i]);
        peak[p] = Math.max(peak[p], s.decode[i] + Math.max(0, s.prefill[i]));
      }
    }
    for (let p = 0; p < n; p++) {
      if (!busy[p]) continue;
      const decode = sums[0][p] / Math.max(busy[p], 1e-9), both = decode + sums[1][p] / Math.max(busy[p], 1e-9), faint = p > future ? 0.4 : 1;
      g.globalAlpha = 0.4 * faint; g.fillStyle = c.prefill; g.fillRect(LEFT + p, y(peak[p]), 1, y(both) - y(peak[p]));
      g.globalAlpha = faint; g.fillRect(LEFT + p, y(both), 1, y(decode) - y(both));
      g.fillStyle = known ? c.decode : c.mute; g.fillRect(LEFT + p, y(decode), 1, y(0) - y(decode));
    }
  }

  drawStrip() {
    const b = this.book, s = b.steps, c = this.c, [a, z] = this.drawn, tall = 84;
    const { g, width } = this.sheet(this.strip, tall + 10), wide = width - LEFT - RIGHT, x = t => LEFT + (t - a) / (z - a) * wide;
    this.axis(g, width, 8, tall, false);
    const first = Math.max(0, bisect(s.end, a) - 1), last = Math.min(b.length, bisect(s.start, z) + 1), budgets = b.meta.budgets || [], budget = this.budget(Math.min(z, b.now));
    let most = 1;
    for (let i = first; i < last; i++) most = Math.max(most, Math.max(0, s.prefill[i]) + s.decode[i]);
    const shownBudget = budget && budget <= 4 * most, top = shownBudget ? Math.max(budget, most) * 1.06 : most * 1.15, y = n => 8 + tall - Math.sqrt(n / top) * tall;
    const known = b.length && s.prefill[first] >= 0, future = this.follow ? Infinity : x(this.cursor) - LEFT + 1;
    if (2 * (last - first) < wide) this.drawBars(g, first, last, x, y, future);
    else this.drawPixels(g, first, last, x, y, future);
    g.globalAlpha = 1; g.textAlign = "right"; g.fillStyle = c.mute;
    g.fillText("0", LEFT - 8, y(0) - 4);
    if (shownBudget) {
      g.strokeStyle = c.ink; g.setLineDash([5, 3]); g.beginPath();
      budgets.forEach(([from, tokens], i) => {
        const x0 = clamp(i ? x(from) : LEFT, LEFT, LEFT + wide), x1 = clamp(i + 1 < budgets.length ? x(budgets[i + 1][0]) : LEFT + wide, LEFT, LEFT + wide);
        if (x1 > x0) { g.moveTo(x0, y(Math.min(tokens, top))); g.lineTo(x1, y(Math.min(tokens, top))); }
      });
      g.stroke(); g.setLineDash([]);
      g.fillText(budget, LEFT - 8, y(budget));
    } else g.fillText(most, LEFT - 8, y(most));
    if (!this.follow && b.length) { const at = x(s.start[this.row]); g.fillStyle = c.decode; g.fillRect(Math.round(at) - 1, 4, 2, tall + 4); }
    g.textAlign = "left";
    this.note(this.stripNote, (budget ? (shownBudget ? `dashed: budget ${budget}` : `budget ${budget}, far above`) : "") + (known || !b.length ? "" : "; prefill and decode are told apart from log_level=2 on"));
  }

  pool(time) { // blocks in service at this instant
    const pools = this.book.meta.pools || [];
    return (pools.findLast(([from]) => from <= time) || pools[0] || [0, this.book.meta.num_blocks])[1];
  }

  budget(time) { // tokens that a step may have at this instant
    const budgets = this.book.meta.budgets || [];
    return (budgets.findLast(([from]) => from <= time) || budgets[0] || [0, 0])[1];
  }

  // ------------------------------------------------------------------------------------- the KV wall
  cells() {
    const b = this.book, m = b.meta, used = b.steps.used[this.row] ?? 0;
    if (m.wall === "blocks") return b.wallAt(b.base + this.row);
    const cells = new Array(m.num_blocks).fill(-1);
    let at = 0;
    if (m.wall === "holds") {
      b.wallAt(b.base + this.row).forEach((blocks, index) => { for (let i = 0; i < blocks && at < cells.length; i++) cells[at++] = 2 * index; });
    }
    for (; at < Math.min(used, cells.length); at++) cells[at] = -3;
    return cells;
  }

  drawWall() {
    const b = this.book, m = b.meta, c = this.c, total = m.num_blocks;
    this.grid = null;
    if (!total || !b.length) { this.sheet(this.wall, 1); this.wallNote.textContent = "not recorded"; this.wallSmall.textContent = ""; return; }
    const cells = this.cells(), wide = this.width(this.wall), room = wide > 420 ? 150 : 216;
    let group = 1, pitch;
    for (; ; group++) {
      const n = Math.ceil(total / group);
      pitch = Math.min(20, Math.floor(Math.sqrt(wide * room / n)));
      while (pitch > 3 && Math.ceil(n / Math.floor(wide / pitch)) * pitch > room) pitch--;
      if (pitch >= 4) break;
    }
    const n = Math.ceil(total / group), columns = Math.floor(wide / pitch), rows = Math.ceil(n / columns), gap = pitch > 6 ? 2 : 1;
    const chosen = this.book.find(this.model.get("selected") || "") || null;
    const wanted = this.hover || chosen, bright = wanted && cells.some(value => value >= 0 && value >> 1 === wanted.index) ? wanted : null;
    this.grid = { cells, columns, pitch, group };
    const look = [wide, pitch, group, total, this.theme, bright?.index, devicePixelRatio].join(), before = this.painted?.look === look ? this.painted.values : null;
    const { g } = this.sheet(this.wall, rows * pitch, !!before), values = this.painted?.values ?? [];
    this.painted = { look, values };
    for (let i = 0; i < n; i++) {
      const value = cells[i * group];
      if (before && before[i] === value) continue; // it is there already
      values[i] = value;
      const x = i % columns * pitch, y = Math.floor(i / columns) * pitch, size = pitch - gap;
      if (before) this.wipe(g, x, y, pitch, pitch);
      g.globalAlpha = bright && value >> 1 !== bright.index ? 0.25 : 1;
      g.fillStyle = value >= 0 ? this.owner(value >> 1) : value === -3 ? c.mute : value === -2 && size > 8 ? this.hatch(g, c.grid, c.cached) : c.grid;
      g.fillRect(x, y, size, size);
      if (value === -2 && size <= 8) { g.globalAlpha *= 0.38; g.fillStyle = c.cached; g.fillRect(x, y, size, size); }
      if (value >= 0 && value & 1) { g.fillStyle = c.owner_ink; g.fillRect(x + size * 0.3, y + size * 0.3, size * 0.4, size * 0.4); }
    }
    g.globalAlpha = 1;
    const service = this.pool(b.steps.start[this.row]);
    say(this.wallNote, `${b.steps.used[this.row]} of ${service} in use` + (service < total ? `, ${total - service} out of service` : ""));
    this.wallNote.style.color = b.steps.used[this.row] > 0.95 * service ? "var(--hot)" : "";
    this.wall.ariaLabel = `KV blocks: ${this.wallNote.textContent}`;
    const keyed = m.wall + group + this.theme;
    if (keyed === this.wallKey) return;
    this.wallKey = keyed;
    const fill = (background, word) => make("span", {}, make("i", { style: `background:${background}` }), word);
    const hatched = `repeating-linear-gradient(135deg,${c.cached} 0 1.5px,${c.grid} 1.5px 4px)`;
    this.wallSmall.replaceChildren(...(m.wall === "blocks" ? [fill(hatched, "free, but findable"), fill(`radial-gradient(circle,${c.owner_ink} 30%,${c.owners[0]} 32%)`, "shared"), fill(c.grid, "free")]
      : m.wall === "holds" ? ["By computed tokens; which block is whose: log_level=3."] : ["Owners are recorded from log_level=2 on."]),
    group > 1 ? `A square is ${group} blocks.` : "");
  }

  // ----------------------------------------------------------------------------------- the decisions
  drawLog() {
    const b = this.book, step = b.steps.step[this.row] ?? Infinity, key = `${b.nextNote}:${this.follow ? "" : step}:${bisect(b.noteSteps, step)}:${this.forks.size}:${this.theme}`;
    if (key === this.saidLog) return;
    this.saidLog = key;
    const end = bisect(b.noteSteps, step), start = bisect(b.noteSteps, step - 1);
    const shown = b.notes.slice(Math.max(0, Math.min(start, end - 14)), end).slice(-60).reverse();
    const current = b.notes.slice(start, end);
    this.logTitle.textContent = this.follow || !b.length ? "Decisions, newest first" : current.length ? `${plural(current.length, "sentence")} on step ${step}` : `Nothing new in step ${step}`;
    const entries = new Map(shown.map(note => [note.seq + "/" + (note.step >= step), note]));
    this.entries = new Map([...entries].map(([key, note]) => [key, this.entries.get(key) ?? this.entry(note, note.step >= step)]));
    this.place(this.log, [...this.entries.values()]);
    if (!shown.length) this.log.replaceChildren(make("li", {}, b.meta.level < 2 ? "Decisions are recorded from log_level=2 on." : "No decision yet."));
    if (!this.follow) this.log.scrollTop = 0;
    const loud = note => ["failed", "preempt", "refuse", "victim"].indexOf(note.kind) + 1 || 9; // these first, if there are many
    const words = current.slice().sort((a, b) => loud(a) - loud(b)).slice(0, 6).map(n => `${this.name(n)} ${n.kind}: ${n.text}`).join(". ");
    const speech = b.length ? `Step ${step}. ${words || "Nothing new."}` : "";
    if (this.live.textContent !== speech && !(this.isLive && this.follow && !current.length)) this.live.textContent = speech;
  }

  place(list, nodes) { // what stands there already stays
    nodes.forEach((node, i) => { if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null); });
    while (list.children.length > nodes.length) list.lastChild.remove();
  }

  moment(t) { // an instant, as exact as a step of this run is long
    const per = this.book.meta.ticks, [a, b] = this.whole, step = (b - a) / per / Math.max(1, this.book.length);
    return b / per < 1 ? seconds(t / per) : (t / per).toFixed(clamp(Math.ceil(-Math.log10(step)), 0, 5)) + " s";
  }

  name(note) { return note.request >= 0 ? this.book.requests.get(note.request)?.id ?? "" : ""; }

  entry(note, now) {
    const name = this.name(note);
    const cost = note.cost >= 0 ? ` (predicted ${this.secs(note.cost)})` : "";
    const what = make("span", { class: "what" }, make("b", { class: "k-" + note.kind }, note.kind + " "), note.text + cost);
    if (now && note.options.length) what.append(make("ul", {}, ...note.options.map(option => this.option(note, option))));
    return make("li", { class: now ? "now" : "" }, make("span", { class: "t" }, this.moment(note.t)), make("span", { class: "who" }, name), what);
  }

  option(note, [option, score, cost, feasible, whyNot]) {
    const notes = [];
    if (cost >= 0) notes.push(`predicted ${this.secs(cost)}`); else if (score) notes.push(`score ${score}`);
    if (!feasible) notes.push("not possible");
    if (whyNot) notes.push(whyNot);
    const li = make("li", {}, `or ${option}${notes.length ? ": " + notes.join(", ") : ""}`);
    const key = `${note.seq}/${option}`, call = this.forks.get(key);
    if (call) li.append(make("div", {}, make("code", {}, call)));
    else if (this.model.get("_forks") && feasible && ["victim", "memory"].includes(note.kind)) {
      li.append(make("button", { type: "button", title: "Print the call that forks the run here with this option", onclick: () => this.model.send({ type: "fork", seq: note.seq, option, key }) }, "fork here"));
    }
    return li;
  }

  // -------------------------------------------------------------------------------- why was it late?
  showWhy() {
    const id = this.model.get("selected");
    this.redraw();
    this.why.hidden = !id;
    if (!id) return;
    const found = this.whys.get(id), head = make("div", { class: "head" }, make("h4", {}, `Why was ${id} late?`),
      make("button", { type: "button", "aria-label": "Close", onclick: () => this.select("") }, "Close"));
    const complete = found && !found.growing;
    if (!complete && this.asked !== id + this.book.number) { this.asked = id + this.book.number; this.model.send({ type: "why", request: id }); }
    if (!found) { this.why.replaceChildren(head, make("p", { class: "facts" }, "Asking the run ...")); return; }
    const dots = { queued: "waiting", prompt: "prefill", decode: "decode", preempted: "preempted", recompute: "prefill" };
    this.why.replaceChildren(head, make("p", {}, found.headline), make("ol", {}, ...found.stretches.map(([kind, title, start, end, sentences]) =>
      make("li", { style: `--dot:${this.c?.[dots[kind]] || "#888"}` }, make("b", {}, title), " ",
        make("span", { class: "when" }, `${seconds(end - start)}, from ${seconds(start)} to ${seconds(end)}`), ...sentences.map(s => make("p", {}, s))))));
    this.live.textContent = found.headline;
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  view.start();
  return () => view.close();
}

// The same page without Python: `packed` (gzip of a batch) and `whys` (gzip of {request: answer}) are inside the file.
function standalone(el, packed, whys, traits = {}) {
  const values = { step: -1, selected: "", theme: "auto", playing: false, speed: 1, _mode: "static", _forks: false, ...traits, _packed: packed };
  const listeners = new Map();
  const fire = (name, ...args) => { for (const act of [...(listeners.get(name) || [])]) act(...args); };
  const answers = whys ? unpacked(whys) : Promise.resolve({});
  const model = {
    get: name => values[name],
    set: (name, value) => { if (values[name] !== value) { values[name] = value; fire("change:" + name); } },
    save_changes: () => {},
    on: (name, act) => listeners.set(name, [...(listeners.get(name) || []), act]),
    off: (name, act) => listeners.set(name, (listeners.get(name) || []).filter(one => one !== act)),
    send: async message => {
      if (message.type !== "why") return;
      const answer = (await answers)[message.request];
      fire("msg:custom", { type: "why", request: message.request, headline: "This file does not carry the answer. In Python: run.why(" + JSON.stringify(message.request) + ")", stretches: [], ...answer });
    },
  };
  render({ model, el });
  return model;
}

export default { render };
