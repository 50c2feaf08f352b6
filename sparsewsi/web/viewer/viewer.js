// The slide viewer. Gradio runs this file as the body of a function: element, props, trigger and watch are given.
// Frames: level-0 px of the slide ("x", "y"), CSS px of the stage ("sx", "sy"); view.scale = CSS px per level-0 px.
// A patch is known by its index in the bag and shown by its rank by score among all N patches, 1 = highest.
"use strict";

const $ = (name) => element.querySelector(name);
const root = $(".viewer"), stage = $(".stage"), canvas = $(".slide"), nav = $(".nav"), map = $(".map"), strip = $(".strip");
const YELLOW = "#ffe119", DARK = "#0f0f14", BLUE = "#0072b2", ORANGE = "#e69f00", PURPLE = "#cc79a7", GREY = "#8a8f98", SKY = "#56b4e9";
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // as in plots.py
const MAGNIFICATIONS = [1.25, 2.5, 5, 10, 20, 40];
const TILE_LIMIT = 400, LOADING_LIMIT = 6, CHIPS = 120, STEPS = 32;

let slide = null; // {token, size: [w, h], tile, mpp, name, source}
let bag = null; // {n, side, xy: Int32Array, scores: Float32Array, rank: Int32Array, order: Int32Array, share: Float32Array}
let kept = []; // indices of the selected patches, best score first
let effects = new Map(); // index -> what the answer loses without the patch, in nats
let points = null; // {xy: Float32Array, rows: Int32Array, title}
const view = { x: 0, y: 0, scale: 0 };
const shared = { current: -1, members: new Set(), seen: new Set(), marks: new Map(), pinned: new Set(), dropped: new Set() };
const layers = { boxes: true, heat: false, opacity: 0.55 };
let mode = "", band = null, lasso = null, size = [0, 0], frame = 0, journal = [], restored = false;

// ---- what Python sends

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

function openSlide() {
  const fresh = props.slide && (!slide || slide.token !== props.slide.token);
  slide = props.slide || null;
  $(".empty").hidden = !!slide; nav.hidden = !slide;
  if (!fresh) return draw();
  tiles.clear(); wanted = [];
  bag = points = null; kept = []; effects = new Map();
  Object.assign(shared, { current: -1, members: new Set(), seen: new Set(), marks: new Map(), pinned: new Set(), dropped: new Set() });
  layers.heat = false;
  buildMagnifications(); fit(); showAll(); restore();
}

function openBag() {
  const given = props.bag;
  if (!given) { bag = null; kept = []; return showAll(); }
  const scores = new Float32Array(bytes(given.scores)), n = scores.length;
  const order = Int32Array.from({ length: n }, (_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);
  const rank = new Int32Array(n), share = new Float32Array(n);
  order.forEach((index, place) => { rank[index] = place + 1; share[index] = n > 1 ? 1 - place / (n - 1) : 1; });
  bag = { n, side: given.side, xy: new Int32Array(bytes(given.coords)), scores, rank, order, share, picture: null };
  openSelection(); restoreRank();
}

function openSelection() {
  if (!bag) return;
  kept = [...new Int32Array(bytes(props.kept || ""))].sort((a, b) => bag.rank[a] - bag.rank[b]);
  effects = new Map(); // they belong to an answer from other patches
  if (!kept.includes(shared.current) && kept.length) shared.current = -1;
  showAll();
}

function openEvidence() {
  const given = props.evidence;
  effects = new Map(given ? given.indices.map((index, i) => [index, given.effects[i]]) : []);
  showAll();
}

function openMap() {
  const given = props.map;
  points = given ? { xy: new Float32Array(bytes(given.xy)), rows: new Int32Array(bytes(given.rows)), title: given.title, base: null } : null;
  drawMap();
}

function openMembers() { // patches that Python found, such as those in an imported region: {indices, where}
  if (bag && props.members) setMembers(props.members.indices, props.members.where);
}

function openFiles() {
  const names = (slide && props.files) || [];
  $(".files").hidden = !names.length;
  $(".files").replaceChildren(...names.flatMap(([name, words], i) => {
    const link = document.createElement("a");
    link.href = address(name); link.download = `sparsewsi-${name}`; link.textContent = words;
    return [document.createTextNode(i ? " · " : "Download: "), link];
  }));
}

function ask() { // another part of the page asks for a patch: {rank, nonce}
  if (props.focus) go(indexOfRank(props.focus.rank));
}

// ---- one selection shared by slide, strip, map and citations

const indexOfRank = (rank) => (bag && rank >= 1 && rank <= bag.n ? bag.order[rank - 1] : -1);
const centre = (index) => [bag.xy[2 * index] + bag.side / 2, bag.xy[2 * index + 1] + bag.side / 2];

function go(index, move = true) {
  if (!bag || !(index >= 0 && index < bag.n)) return;
  shared.current = index;
  if (kept.includes(index)) shared.seen.add(index);
  if (move) {
    const onScreen = bag.side * view.scale, room = Math.min(...size);
    const scale = onScreen > 0.15 * room && onScreen < 0.9 * room ? view.scale : (0.42 * room) / bag.side;
    moveTo(...centre(index), scale);
  }
  markStrip(true); showInspect(); draw(); drawMap(); remember();
  say(describe(index));
}

function step(by) {
  const list = ordered();
  if (!list.length) return;
  const at = list.indexOf(shared.current);
  go(list[at < 0 ? (by > 0 ? 0 : list.length - 1) : (at + by + list.length) % list.length]);
}

const ordered = () => ($(".patches select").value === "evidence" && effects.size
  ? [...kept].sort((a, b) => (effects.get(b) ?? 0) - (effects.get(a) ?? 0)) : kept);

function setMembers(indices, where) {
  shared.members = new Set(indices);
  const panel = $(".members"), held = indices.filter((index) => kept.includes(index)).length;
  panel.hidden = !where;
  if (where) {
    const many = `${indices.length.toLocaleString("en")} patch${indices.length === 1 ? "" : "es"}`;
    $(".members b").textContent = indices.length ? `${many} in the ${where}, ${held} of them selected` : `No patch of tissue has its centre in the ${where}`;
    const shown = [...indices].sort((a, b) => bag.rank[a] - bag.rank[b]).slice(0, CHIPS);
    $(".members .list").replaceChildren(...shown.map((index) => {
      const chip = document.createElement("button");
      chip.type = "button"; chip.textContent = `#${bag.rank[index]}`; chip.className = kept.includes(index) ? "kept" : "";
      chip.title = describe(index); chip.onclick = () => go(index);
      return chip;
    }), ...(indices.length > CHIPS ? [document.createTextNode(` and ${indices.length - CHIPS} more`)] : []));
    say($(".members b").textContent);
  }
  draw(); drawMap();
}

function describe(index) {
  const effect = effects.get(index), um = slide && slide.mpp ? centre(index).map((v) => Math.round(v * slide.mpp).toLocaleString("en")) : null;
  return [`#${bag.rank[index]}`, `score ${bag.scores[index].toFixed(2)} (top ${top(bag.rank[index] / bag.n)} %)`,
    effect === undefined ? "" : effect < -0.005 ? "the answer is likelier without it" : `evidence ${times(effect)}`, um ? `at ${um[0]}, ${um[1]} µm` : "", kept.includes(index) ? "" : "left out"].filter(Boolean).join(" · ");
}

const top = (share) => (share < 0.01 ? (100 * share).toFixed(1) : Math.ceil(100 * share));
const times = (effect) => (effect > Math.log(1000) ? "> 1000×" : `${+Math.exp(effect).toPrecision(3)}×`); // less likely without it
function say(text) { $(".said").textContent = text; }

function toggle(set, other, index) {
  if (set.has(index)) set.delete(index); else { set.add(index); other.delete(index); }
}

function tellPicks() {
  trigger("picks", { pinned: [...shared.pinned], dropped: [...shared.dropped] });
  markStrip(); showInspect(); draw();
}

function mark(word) {
  const index = shared.current;
  if (index < 0) return;
  if (shared.marks.get(index) === word) shared.marks.delete(index); else shared.marks.set(index, word);
  journal.push({ mark: shared.marks.get(index) || "none", rank: bag.rank[index] });
  markStrip(); showInspect(); tellSoon();
}

// ---- strip and inspector

const patchAddress = (index, px) => address(`patch/${bag.xy[2 * index]}_${bag.xy[2 * index + 1]}_${bag.side}_${px}.jpg`);

function showAll() {
  $(".below").hidden = !bag; $(".colours").hidden = !(bag && layers.heat); $(".opacity").hidden = !(bag && layers.heat);
  for (const name of ["boxes", "heat", "region"]) { const b = act(name); b.disabled = !bag; }
  act("boxes").setAttribute("aria-pressed", layers.boxes); act("heat").setAttribute("aria-pressed", layers.heat);
  if (!bag) { $(".members").hidden = true; $(".inspect").hidden = true; $(".card").hidden = true; return draw(); }
  const choice = $(".patches select");
  choice.options[1].disabled = !effects.size;
  if (!effects.size) choice.value = "score";
  fillStrip(); showInspect(); setMembers([], ""); showColours();
}

function fillStrip() {
  strip.replaceChildren(...ordered().map((index) => {
    const item = document.createElement("button"), effect = effects.get(index);
    item.type = "button"; item.className = "item"; item.dataset.index = index; item.title = describe(index);
    item.innerHTML = `<img alt="" loading="lazy" draggable="false"><span><b>#${bag.rank[index]}</b> <em></em></span><u></u>`;
    item.querySelector("img").src = patchAddress(index, 168);
    item.querySelector("em").textContent = $(".patches select").value === "evidence" && effect !== undefined ? times(effect) : bag.scores[index].toFixed(2);
    item.onclick = () => go(index);
    item.ondblclick = enlarge;
    return item;
  }));
  markStrip();
}

function markStrip(scroll = false) {
  for (const item of strip.children) {
    const index = +item.dataset.index, now = index === shared.current;
    item.setAttribute("aria-current", now);
    item.setAttribute("aria-label", `${describe(index)}${shared.seen.has(index) ? ", seen" : ""}`);
    item.classList.toggle("dropped", shared.dropped.has(index));
    item.querySelector("u").textContent = (shared.seen.has(index) ? "✓" : "") + ({ agree: " +", disagree: " −" }[shared.marks.get(index)] || "")
      + (shared.pinned.has(index) ? " ◆" : "") + (shared.dropped.has(index) ? " ✕" : "");
    if (now && scroll) strip.scrollTo({ top: item.offsetTop - strip.offsetTop - strip.clientHeight / 2 + item.offsetHeight / 2 });
  }
  const seen = kept.filter((index) => shared.seen.has(index)).length;
  if (bag) $(".count").textContent = `${kept.length} of ${bag.n.toLocaleString("en")} patches · ${seen} seen`;
}

function showInspect() {
  const index = shared.current, on = bag && index >= 0;
  $(".inspect").hidden = !on;
  if (!on) return ($(".card").hidden = true);
  $(".inspect .what").textContent = describe(index);
  for (const word of ["agree", "disagree"]) act(word).setAttribute("aria-pressed", shared.marks.get(index) === word);
  act("pin").setAttribute("aria-pressed", shared.pinned.has(index)); act("drop").setAttribute("aria-pressed", shared.dropped.has(index));
  if (!$(".card").hidden) enlarge();
}

function enlarge() {
  if (!bag || shared.current < 0) return;
  $(".card img").src = patchAddress(shared.current, 448);
  $(".card span").textContent = describe(shared.current);
  $(".card").hidden = false;
}

function showColours() {
  if (!bag || !bag.n) return;
  const lowest = bag.scores[bag.order[bag.n - 1]], highest = bag.scores[bag.order[0]];
  $(".low").textContent = `0 % (${lowest.toFixed(2)})`; $(".high").textContent = `100 % (${highest.toFixed(2)})`;
}

// ---- tiles

const tiles = new Map(); // "z/column_row" -> {image, ready}; insertion order = least recently used first
let wanted = [], loading = 0;

function address(rest) {
  const base = (window.gradio_config && window.gradio_config.root) || location.origin + location.pathname;
  return `${base.replace(/\/$/, "")}/gradio_api/slide/${slide.token}/${rest}`;
}

const topLevel = () => Math.max(0, Math.ceil(Math.log2(Math.max(...slide.size) / slide.tile)));

function tile(key) {
  const found = tiles.get(key);
  if (found) { tiles.delete(key); tiles.set(key, found); }
  return found && found.ready ? found.image : null;
}

function loadTiles() {
  while (loading < LOADING_LIMIT && wanted.length) {
    const key = wanted.shift();
    if (tiles.has(key)) continue;
    const entry = { image: new Image(), ready: false }, of = slide.token;
    tiles.set(key, entry); loading += 1;
    entry.image.onload = () => { loading -= 1; entry.ready = true; draw(); };
    entry.image.onerror = () => { loading -= 1; if (slide && slide.token === of) setTimeout(() => tiles.delete(key), 2000); loadTiles(); };
    entry.image.src = address(`${key}.jpg`);
    if (tiles.size > TILE_LIMIT) tiles.delete(tiles.keys().next().value);
  }
}

function drawTiles(pen, ratio) {
  const highest = topLevel(), level = Math.min(highest, Math.max(0, Math.floor(Math.log2(1 / (view.scale * ratio)) + 0.01)));
  const span = slide.tile * 2 ** level, [left, upper, right, lower] = corners(), missing = [];
  const columns = [Math.max(0, Math.floor(left / span)), Math.min(Math.ceil(slide.size[0] / span) - 1, Math.floor(right / span))];
  const rows = [Math.max(0, Math.floor(upper / span)), Math.min(Math.ceil(slide.size[1] / span) - 1, Math.floor(lower / span))];
  let waiting = 0;
  for (let row = rows[0]; row <= rows[1]; row++) for (let column = columns[0]; column <= columns[1]; column++) {
    const key = `${level}/${column}_${row}`, image = tile(key);
    if (image) { place(pen, image, level, column, row, 0, 0, 1); continue; }
    waiting += 1;
    missing.push([Math.hypot((column + 0.5) * span - view.x, (row + 0.5) * span - view.y), key]);
    for (let up = 1; level + up <= highest; up++) { // a coarser tile stands in until the sharp one is there
      const shift = 2 ** up, from = tile(`${level + up}/${column >> up}_${row >> up}`);
      if (from) { place(pen, from, level, column, row, column % shift, row % shift, shift); break; }
    }
  }
  wanted = missing.sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
  if (!tiles.has(`${highest}/0_0`)) wanted.unshift(`${highest}/0_0`);
  loadTiles();
  root.dataset.waiting = waiting; // tests wait for 0
}

function place(pen, image, level, column, row, partX, partY, shift) {
  const span = slide.tile * 2 ** level, px = slide.tile / shift;
  const sw = Math.min(px, image.naturalWidth - partX * px), sh = Math.min(px, image.naturalHeight - partY * px);
  if (sw <= 0 || sh <= 0) return;
  const [sx, sy] = toScreen(column * span, row * span);
  const across = Math.min(span, slide.size[0] - column * span) * view.scale, down = Math.min(span, slide.size[1] - row * span) * view.scale;
  const x0 = Math.round(sx * 2) / 2, y0 = Math.round(sy * 2) / 2; // on half px, so that no seam shows between tiles
  pen.drawImage(image, partX * px, partY * px, sw, sh, x0, y0, Math.round((sx + across) * 2) / 2 - x0, Math.round((sy + down) * 2) / 2 - y0);
}

// ---- the stage

const toScreen = (x, y) => [(x - view.x) * view.scale + size[0] / 2, (y - view.y) * view.scale + size[1] / 2];
const toSlide = (sx, sy) => [(sx - size[0] / 2) / view.scale + view.x, (sy - size[1] / 2) / view.scale + view.y];
const corners = () => [...toSlide(0, 0), ...toSlide(...size)];
const fitScale = () => 0.96 * Math.min(size[0] / slide.size[0], size[1] / slide.size[1]);
const bounded = (scale) => Math.min(Math.max(scale, fitScale() / 2), slide.mpp ? Math.max(8 * slide.mpp, 4) : 4);
const magnification = () => (10 * view.scale) / slide.mpp; // 10x is 1 um per px of the screen

function moveTo(x, y, scale) {
  view.x = Math.min(Math.max(x, 0), slide.size[0]); view.y = Math.min(Math.max(y, 0), slide.size[1]);
  view.scale = bounded(scale);
  draw(); remember();
}

function fit() { if (slide && size[0]) moveTo(slide.size[0] / 2, slide.size[1] / 2, fitScale()); }

function zoom(factor, sx = size[0] / 2, sy = size[1] / 2) {
  if (!slide) return;
  const [x, y] = toSlide(sx, sy), scale = bounded(view.scale * factor), change = view.scale / scale;
  moveTo(x + (view.x - x) * change, y + (view.y - y) * change, scale);
}

function magnify(times) { if (slide && slide.mpp) moveTo(view.x, view.y, (times * slide.mpp) / 10); }

function buildMagnifications() {
  const native = slide.mpp ? 10 / slide.mpp : 0;
  const make = (text, does, title) => { const b = document.createElement("button"); b.type = "button"; b.textContent = text; b.title = title; b.onclick = does; return b; };
  const buttons = MAGNIFICATIONS.map((times, i) => {
    const b = make(`${times}×`, () => magnify(times), slide.mpp ? `${times}× (${i + 1})${times > 1.3 * native ? ", finer than the scan" : ""}` : "The slide states no resolution: magnification unknown");
    b.disabled = !slide.mpp;
    return b;
  });
  $(".mags").replaceChildren(make("Fit", fit, "Whole slide (0)"), ...buttons);
}

function draw() { if (!frame) frame = requestAnimationFrame(paint); }

function paint() {
  frame = 0;
  const ratio = window.devicePixelRatio || 1, pen = prepare(canvas, size, ratio);
  pen.clearRect(0, 0, ...size);
  if (!slide || !view.scale) return;
  pen.imageSmoothingEnabled = true;
  drawTiles(pen, ratio);
  if (bag && layers.heat) drawHeat(pen);
  if (bag) drawMembers(pen);
  if (bag && layers.boxes) drawBoxes(pen);
  if (band) { pen.setLineDash([6, 4]); pen.lineWidth = 2; pen.strokeStyle = DARK; pen.strokeRect(band[0], band[1], band[2] - band[0], band[3] - band[1]); pen.setLineDash([]); }
  drawScale(); drawNavigator(ratio);
  Object.assign(root.dataset, { x: view.x, y: view.y, scale: view.scale, current: bag && shared.current >= 0 ? bag.rank[shared.current] : "" });
}

function prepare(target, [width, height], ratio) {
  const w = Math.round(width * ratio), h = Math.round(height * ratio);
  if (target.width !== w || target.height !== h) { target.width = w; target.height = h; }
  const pen = target.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return pen;
}

function viridis(share) {
  const at = Math.min(share, 0.9999) * 4, low = Math.floor(at), part = at - low;
  return VIRIDIS[low].map((v, i) => Math.round(v + (VIRIDIS[low + 1][i] - v) * part));
}
const RAMP = Array.from({ length: STEPS }, (_, i) => `rgb(${viridis(i / (STEPS - 1))})`);
const colour = (share) => RAMP[Math.round(share * (STEPS - 1))];

function drawHeat(pen) {
  const [left, upper, right, lower] = corners(), side = bag.side, shown = [];
  for (let i = 0; i < bag.n; i++) {
    const x = bag.xy[2 * i], y = bag.xy[2 * i + 1];
    if (x + side > left && x < right && y + side > upper && y < lower) shown.push(i);
  }
  pen.globalAlpha = layers.opacity;
  if (shown.length > 6000) { // too many rectangles for a smooth drag: one picture of them all
    const [x, y] = toScreen(0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(heatPicture(), x, y, slide.size[0] * view.scale, slide.size[1] * view.scale);
  } else for (const i of shown) {
    const [sx, sy] = toScreen(bag.xy[2 * i], bag.xy[2 * i + 1]);
    pen.fillStyle = colour(bag.share[i]);
    pen.fillRect(sx, sy, side * view.scale, side * view.scale);
  }
  pen.globalAlpha = 1;
}

function heatPicture() {
  if (bag.picture) return bag.picture;
  const scale = Math.min(4 / bag.side, 2400 / Math.max(...slide.size));
  bag.picture = document.createElement("canvas");
  bag.picture.width = Math.ceil(slide.size[0] * scale); bag.picture.height = Math.ceil(slide.size[1] * scale);
  const pen = bag.picture.getContext("2d"), side = Math.max(1, bag.side * scale);
  for (let i = 0; i < bag.n; i++) { pen.fillStyle = colour(bag.share[i]); pen.fillRect(bag.xy[2 * i] * scale, bag.xy[2 * i + 1] * scale, side, side); }
  return bag.picture;
}

function boxOf(index, least) {
  const [sx, sy] = toScreen(...centre(index)), half = Math.max(bag.side * view.scale, least) / 2;
  return [sx - half, sy - half, 2 * half];
}

function drawBoxes(pen) {
  const placed = [], list = kept.includes(shared.current) || shared.current < 0 ? kept : [...kept, shared.current];
  const shown = list.filter((index) => { const [x, y, w] = boxOf(index, 15); return x + w > 0 && y + w > 0 && x < size[0] && y < size[1]; });
  for (const index of [...shown].reverse()) { // the best is drawn last, on top
    const [x, y, w] = boxOf(index, 15), now = index === shared.current, dropped = shared.dropped.has(index);
    pen.setLineDash(dropped || !kept.includes(index) ? [5, 4] : []);
    pen.lineWidth = now ? 7 : 5; pen.strokeStyle = DARK; pen.strokeRect(x, y, w, w);
    pen.lineWidth = now ? 3.5 : 2.5; pen.strokeStyle = now ? SKY : YELLOW; pen.strokeRect(x, y, w, w);
    pen.setLineDash([]);
    if (now) brackets(pen, x, y, w);
  }
  pen.font = "600 14px system-ui, sans-serif"; pen.textAlign = "center"; pen.textBaseline = "middle"; pen.lineJoin = "round";
  const boxes = shown.map((index) => boxOf(index, 15));
  const first = shown.indexOf(shared.current), order = shown.map((_, i) => i).sort((a, b) => (b === first) - (a === first));
  for (const i of order) label(pen, `${bag.rank[shown[i]]}${shared.pinned.has(shown[i]) ? "◆" : shared.dropped.has(shown[i]) ? "✕" : ""}`, boxes[i], placed, boxes);
}

function brackets(pen, x, y, w) { // the current patch is told by a shape too, not by colour alone
  const gap = 7, long = Math.max(8, w / 4), far = w + gap;
  pen.beginPath();
  for (const [a, b, da, db] of [[-gap, -gap, 1, 1], [far, -gap, -1, 1], [-gap, far, 1, -1], [far, far, -1, -1]]) {
    pen.moveTo(x + a + da * long, y + b); pen.lineTo(x + a, y + b); pen.lineTo(x + a, y + b + db * long);
  }
  pen.lineWidth = 6; pen.strokeStyle = DARK; pen.stroke(); pen.lineWidth = 3; pen.strokeStyle = SKY; pen.stroke();
}

// The number goes into its box where there is room, else to the nearest free place, tied to the box by a line.
function label(pen, text, [x, y, w], placed, boxes) {
  const width = pen.measureText(text).width + 6, height = 17, cx = x + w / 2, cy = y + w / 2;
  const spots = w > width + 8 && w > 30 ? [[x + width / 2 + 3, y + height / 2 + 3]] : [];
  for (let far = w / 2 + 11; far < w / 2 + 90; far += 13) for (let turn = 0; turn < 12; turn++) {
    spots.push([cx + (far + width / 4) * Math.cos((turn * Math.PI) / 6 - 0.8), cy + far * Math.sin((turn * Math.PI) / 6 - 0.8)]);
  }
  const clash = ([a, b], c) => Math.abs(a - c[0]) < (width + c[2]) / 2 && Math.abs(b - c[1]) < (height + c[3]) / 2;
  const others = boxes.filter((box) => box[0] !== x || box[1] !== y).map(([a, b, s]) => [a + s / 2, b + s / 2, s, s]);
  const spot = spots.find((s, i) => !placed.some((c) => clash(s, c)) && (w > 30 && i === 0 || !others.some((c) => clash(s, c)))) || spots[0];
  placed.push([spot[0], spot[1], width, height]);
  const edge = [Math.min(Math.max(spot[0], x), x + w), Math.min(Math.max(spot[1], y), y + w)];
  if (Math.hypot(edge[0] - spot[0], edge[1] - spot[1]) > 8) { pen.lineWidth = 1.5; pen.strokeStyle = DARK; pen.beginPath(); pen.moveTo(...edge); pen.lineTo(...spot); pen.stroke(); }
  pen.lineWidth = 4; pen.strokeStyle = DARK; pen.strokeText(text, ...spot); pen.fillStyle = "#fff"; pen.fillText(text, ...spot);
}

function drawMembers(pen) {
  pen.strokeStyle = PURPLE; pen.lineWidth = 2;
  for (const index of shared.members) { const [x, y, w] = boxOf(index, 5); pen.strokeRect(x, y, w, w); }
}

function trace(pen, line, stroke) {
  if (line.length < 2) return;
  pen.beginPath(); pen.moveTo(...line[0]);
  for (const point of line.slice(1)) pen.lineTo(...point);
  pen.lineWidth = 2.5; pen.strokeStyle = stroke; pen.stroke();
}

function drawScale() {
  const bar = $(".scale"), said = $(".mag");
  bar.hidden = !slide.mpp;
  if (!slide.mpp) { said.textContent = "scale unknown"; return; }
  const room = Math.min(150, size[0] / 3), um = (room * slide.mpp) / view.scale, ten = 10 ** Math.floor(Math.log10(um));
  const length = [5, 2, 1].map((v) => v * ten).find((v) => v <= um);
  bar.querySelector("i").style.width = `${(length * view.scale) / slide.mpp}px`;
  bar.querySelector("span").textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  root.dataset.bar = length;
  const m = magnification(), over = view.scale > 1.3 ? ` (scan enlarged ${view.scale.toFixed(1)}×)` : "";
  said.textContent = `${+m.toFixed(m < 10 ? 2 : 1)}×${over}`;
}

function drawNavigator(ratio) {
  const scale = Math.min(150 / slide.size[0], 120 / slide.size[1], size[0] / 4 / slide.size[0]), w = slide.size[0] * scale, h = slide.size[1] * scale;
  nav.style.width = `${w}px`; nav.style.height = `${h}px`;
  const pen = prepare(nav, [w, h], ratio), whole = tile(`${topLevel()}/0_0`);
  pen.clearRect(0, 0, w, h);
  if (whole) pen.drawImage(whole, 0, 0, w, h);
  for (const index of kept) { const [x, y] = centre(index); pen.fillStyle = DARK; pen.fillRect(x * scale - 2.5, y * scale - 2.5, 5, 5); pen.fillStyle = YELLOW; pen.fillRect(x * scale - 1.5, y * scale - 1.5, 3, 3); }
  const [left, upper, right, lower] = corners();
  pen.lineWidth = 3; pen.strokeStyle = "#fff"; pen.strokeRect(left * scale, upper * scale, (right - left) * scale, (lower - upper) * scale);
  pen.lineWidth = 1.5; pen.strokeStyle = BLUE; pen.strokeRect(left * scale, upper * scale, (right - left) * scale, (lower - upper) * scale);
  nav.scaleOf = scale;
}

// ---- map of the features

function mapFrame() {
  const box = map.getBoundingClientRect(), pad = 16, [w, h] = [map.clientWidth, map.clientHeight];
  if (!points.range) {
    const r = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < points.rows.length; i++) { const x = points.xy[2 * i], y = points.xy[2 * i + 1]; r[0] = Math.min(r[0], x); r[1] = Math.min(r[1], y); r[2] = Math.max(r[2], x); r[3] = Math.max(r[3], y); }
    points.range = r;
  }
  const [x0, y0, x1, y1] = points.range, scale = Math.min((w - 2 * pad) / (x1 - x0 || 1), (h - 2 * pad) / (y1 - y0 || 1));
  return { box, w, h, at: (i) => [w / 2 + (points.xy[2 * i] - (x0 + x1) / 2) * scale, h / 2 - (points.xy[2 * i + 1] - (y0 + y1) / 2) * scale] };
}

function drawMap() {
  const ratio = window.devicePixelRatio || 1, dims = [map.clientWidth, map.clientHeight];
  if (!dims[0]) return;
  const pen = prepare(map, dims, ratio);
  pen.clearRect(0, 0, ...dims);
  if (!points || !bag) {
    pen.fillStyle = getComputedStyle(root).getPropertyValue("--quiet"); pen.font = "14px system-ui, sans-serif"; pen.textAlign = "center"; pen.textBaseline = "middle";
    pen.fillText(bag ? "The map is being made …" : "", dims[0] / 2, dims[1] / 2, dims[0] - 16);
    return;
  }
  $(".features .title").textContent = points.title; $(".features .title").title = points.title;
  const { at } = mapFrame(), stamp = `${dims}/${ratio}/${layers.heat}`;
  if (points.stamp !== stamp) { points.stamp = stamp; points.base = cloud(dims, ratio, at); }
  pen.save(); pen.setTransform(1, 0, 0, 1, 0, 0); pen.drawImage(points.base, 0, 0); pen.restore();
  points.place = points.place || new Map([...points.rows].map((row, i) => [row, i]));
  pen.fillStyle = PURPLE;
  for (const index of shared.members) if (points.place.has(index)) { const [x, y] = at(points.place.get(index)); pen.fillRect(x - 3, y - 3, 6, 6); }
  pen.font = "600 12px system-ui, sans-serif"; pen.textAlign = "left"; pen.textBaseline = "middle"; pen.lineJoin = "round";
  for (const index of [...kept].reverse()) if (points.place.has(index)) diamond(pen, ...at(points.place.get(index)), 5);
  if (shared.current >= 0 && points.place.has(shared.current)) {
    const [x, y] = at(points.place.get(shared.current));
    pen.lineWidth = 5; pen.strokeStyle = "#fff"; pen.beginPath(); pen.arc(x, y, 10, 0, 7); pen.stroke();
    pen.lineWidth = 3; pen.strokeStyle = BLUE; pen.beginPath(); pen.arc(x, y, 10, 0, 7); pen.stroke();
  }
  const named = dims[0] > 500 ? kept : kept.filter((index) => index === shared.current);
  const written = [];
  for (const index of named) if (points.place.has(index)) { // the best first; a number that would cover another is left out
    const [x, y] = at(points.place.get(index)), text = `${bag.rank[index]}`;
    if (written.some(([a, b]) => Math.abs(a - x) < 26 && Math.abs(b - y) < 13)) continue;
    written.push([x, y]);
    pen.lineWidth = 3; pen.strokeStyle = "#fff"; pen.strokeText(text, x + 8, y - 8); pen.fillStyle = DARK; pen.fillText(text, x + 8, y - 8);
  }
  if (lasso) trace(pen, lasso, "#d55e00");
}

function cloud(dims, ratio, at) { // all points, drawn once: the current patch moves over them
  const layer = document.createElement("canvas"), pen = prepare(layer, dims, ratio), r = points.rows.length > 5000 ? 1.2 : 2;
  const groups = new Map();
  for (let i = 0; i < points.rows.length; i++) {
    const key = layers.heat ? colour(bag.share[points.rows[i]]) : GREY;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(i);
  }
  pen.globalAlpha = layers.heat ? 0.9 : 0.6;
  for (const [key, list] of groups) { pen.fillStyle = key; for (const i of list) { const [x, y] = at(i); pen.fillRect(x - r, y - r, 2 * r, 2 * r); } }
  return layer;
}

function diamond(pen, x, y, r) {
  pen.beginPath(); pen.moveTo(x, y - r); pen.lineTo(x + r, y); pen.lineTo(x, y + r); pen.lineTo(x - r, y); pen.closePath();
  pen.fillStyle = ORANGE; pen.fill(); pen.lineWidth = 1; pen.strokeStyle = DARK; pen.stroke();
}

function nearestOnMap(sx, sy) {
  const { at } = mapFrame(), held = new Set(kept);
  let best = -1, least = 12;
  for (let i = 0; i < points.rows.length; i++) {
    const [x, y] = at(i), d = Math.hypot(x - sx, y - sy) - (held.has(points.rows[i]) ? 4 : 0); // selected ones are bigger
    if (d < least) { least = d; best = points.rows[i]; }
  }
  return best;
}

function inside(ring, x, y) { // ray casting
  let odd = false;
  for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
    const [xi, yi] = ring[i], [xj, yj] = ring[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
  }
  return odd;
}

function indicesWhere(test) {
  const found = [];
  for (let i = 0; i < bag.n; i++) { const [x, y] = centre(i); if (test(x, y)) found.push(i); }
  return found;
}

// ---- pointers

const placeOf = (event, of) => { const box = of.getBoundingClientRect(); return [event.clientX - box.left - of.clientLeft, event.clientY - box.top - of.clientTop]; };
const down = new Map(); // pointer -> last place on the stage
let travelled = 0, pinch = 0;

canvas.addEventListener("pointerdown", (event) => {
  if (!slide) return;
  canvas.setPointerCapture(event.pointerId);
  const at = placeOf(event, canvas);
  down.set(event.pointerId, at); travelled = 0; pinch = 0;
  if ((mode === "region" || event.shiftKey) && bag) band = [...at, ...at];
});
canvas.addEventListener("pointermove", (event) => {
  if (!down.has(event.pointerId)) return;
  const at = placeOf(event, canvas), before = down.get(event.pointerId);
  down.set(event.pointerId, at);
  travelled += Math.hypot(at[0] - before[0], at[1] - before[1]);
  if (down.size === 2) { // two fingers: zoom about their middle
    const [a, b] = [...down.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (pinch) zoom(apart / pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    pinch = apart; band = null;
  } else if (band) { band[2] = at[0]; band[3] = at[1]; draw(); }
  else moveTo(view.x - (at[0] - before[0]) / view.scale, view.y - (at[1] - before[1]) / view.scale, view.scale);
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
  const at = down.get(event.pointerId);
  down.delete(event.pointerId);
  if (!at) return;
  if (band) return endRegion();
  if (travelled < 5 && bag && name === "pointerup") go(patchAt(...toSlide(...at)), false);
});
canvas.addEventListener("dblclick", (event) => zoom(2, ...placeOf(event, canvas)));
canvas.addEventListener("wheel", (event) => { if (slide) { event.preventDefault(); zoom(2 ** (-event.deltaY / (event.ctrlKey ? 100 : 300)), ...placeOf(event, canvas)); } }, { passive: false });

function patchAt(x, y) { // a selected one first: its box is on top
  const hit = (index) => { const [cx, cy] = centre(index), half = Math.max(bag.side, 15 / view.scale) / 2; return Math.abs(x - cx) <= half && Math.abs(y - cy) <= half; };
  const inPatch = (index) => { const [cx, cy] = centre(index); return Math.max(Math.abs(x - cx), Math.abs(y - cy)) <= bag.side / 2; };
  return kept.find(hit) ?? bag.order.find(inPatch) ?? -1;
}

function endRegion() {
  const [x0, y0] = toSlide(Math.min(band[0], band[2]), Math.min(band[1], band[3])), [x1, y1] = toSlide(Math.max(band[0], band[2]), Math.max(band[1], band[3]));
  band = null; setMode("");
  setMembers(indicesWhere((x, y) => x >= x0 && x <= x1 && y >= y0 && y <= y1), "region");
}

function setMode(name) {
  mode = name;
  canvas.classList.toggle("drawing", mode === "region");
  act("region").setAttribute("aria-pressed", mode === "region");
}

function navigate(event) { if (slide && event.buttons) { const [sx, sy] = placeOf(event, nav); moveTo(sx / nav.scaleOf, sy / nav.scaleOf, view.scale); } }
nav.addEventListener("pointerdown", (event) => { nav.setPointerCapture(event.pointerId); navigate(event); });
nav.addEventListener("pointermove", navigate);

map.addEventListener("pointerdown", (event) => { if (points && bag) { map.setPointerCapture(event.pointerId); lasso = [placeOf(event, map)]; } });
map.addEventListener("pointermove", (event) => { if (lasso) { lasso.push(placeOf(event, map)); drawMap(); } });
map.addEventListener("pointerup", () => {
  if (!lasso) return;
  const ring = lasso, long = ring.some(([x, y]) => Math.hypot(x - ring[0][0], y - ring[0][1]) > 6);
  lasso = null;
  if (!long) { const index = nearestOnMap(...ring[0]); if (index >= 0) go(index); return drawMap(); }
  const { at } = mapFrame();
  setMembers([...points.rows].filter((_, i) => inside(ring, ...at(i))), "lasso");
});
map.addEventListener("pointercancel", () => { lasso = null; drawMap(); });

// ---- buttons and keys

const act = (name) => root.querySelector(`[data-do="${name}"]`);
const KEYS = [["1 … 6", "1.25× … 40×"], ["0", "whole slide"], ["+  −", "zoom"], ["arrows", "move"], ["n  p", "next, previous selected patch"], ["Enter", "enlarge the patch"], ["a  d", "agree, disagree"],
  ["i  x", "pin, drop (for a what-if)"], ["b  h", "boxes, scores"], ["r", "draw a region (or Shift and drag)"], ["m", "larger map"], ["Esc", "close, clear"]];
$(".help").innerHTML = `<dl>${KEYS.map(([key, does]) => `<dt>${key}</dt><dd>${does}</dd>`).join("")}</dl>`;

const DEEDS = {
  boxes: () => { layers.boxes = !layers.boxes; showAllLayers(); },
  heat: () => { layers.heat = !layers.heat; showAllLayers(); },
  region: () => setMode(mode === "region" ? "" : "region"),
  keys: () => { const help = $(".help"); help.hidden = !help.hidden; act("keys").setAttribute("aria-pressed", !help.hidden); },
  enlarge, shrink: () => { $(".card").hidden = true; },
  agree: () => mark("agree"), disagree: () => mark("disagree"),
  pin: () => { if (shared.current >= 0) { toggle(shared.pinned, shared.dropped, shared.current); tellPicks(); } },
  drop: () => { if (shared.current >= 0) { toggle(shared.dropped, shared.pinned, shared.current); tellPicks(); } },
  "pin-all": () => { for (const index of shared.members) { shared.pinned.add(index); shared.dropped.delete(index); } tellPicks(); },
  "drop-all": () => { for (const index of shared.members) { shared.dropped.add(index); shared.pinned.delete(index); } tellPicks(); },
  clear: () => setMembers([], ""),
  previous: () => step(-1), next: () => step(1),
  grow: () => { const grown = $(".below").classList.toggle("grown"); act("grow").setAttribute("aria-pressed", grown); drawMap(); },
};

function showAllLayers() {
  act("boxes").setAttribute("aria-pressed", layers.boxes); act("heat").setAttribute("aria-pressed", layers.heat);
  $(".colours").hidden = $(".opacity").hidden = !layers.heat;
  draw(); drawMap(); remember();
}

root.addEventListener("click", (event) => { const button = event.target.closest("[data-do]"); if (button && !button.disabled) DEEDS[button.dataset.do](); });
$(".opacity input").addEventListener("input", (event) => { layers.opacity = event.target.value / 100; draw(); });
$(".patches select").addEventListener("change", fillStrip);

const pan = (dx, dy) => moveTo(view.x + (dx * size[0]) / 6 / view.scale, view.y + (dy * size[1]) / 6 / view.scale, view.scale);
const PRESS = {
  n: DEEDS.next, p: DEEDS.previous, b: DEEDS.boxes, h: DEEDS.heat, r: DEEDS.region, m: DEEDS.grow, a: DEEDS.agree, d: DEEDS.disagree, i: DEEDS.pin, x: DEEDS.drop, "?": DEEDS.keys,
  0: fit, "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), ArrowLeft: () => pan(-1, 0), ArrowRight: () => pan(1, 0), ArrowUp: () => pan(0, -1), ArrowDown: () => pan(0, 1),
  Enter: () => ($(".card").hidden ? enlarge() : DEEDS.shrink()),
  Escape: () => { $(".card").hidden = $(".help").hidden = true; act("keys").setAttribute("aria-pressed", false); setMode(""); band = null; setMembers([], ""); },
};
MAGNIFICATIONS.forEach((times, i) => { PRESS[i + 1] = () => magnify(times); });

root.addEventListener("keydown", (event) => {
  if (!slide || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  const press = PRESS[event.key], onButton = event.target.matches("button");
  if (!press || (onButton && event.key === "Enter" && !event.target.matches(".item"))) return;
  if (!bag && "npbhrmadixEnter".includes(event.key)) return;
  event.preventDefault();
  press();
});

// A citation anywhere on the page, [#5](#patch-5), goes to its patch without asking the server.
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest('a[href*="#patch-"]');
  if (!link || !root.isConnected || !bag) return;
  event.preventDefault(); event.stopPropagation();
  go(indexOfRank(+link.getAttribute("href").split("#patch-")[1]));
  if (stage.getBoundingClientRect().bottom < 80 || stage.getBoundingClientRect().top > window.innerHeight - 80) stage.scrollIntoView({ block: "center" });
}, true);

// A file's name may name a patient: it does not leave the browser. The file itself is not copied.
document.addEventListener("change", (event) => {
  const input = event.target;
  if (!root.isConnected || !input.matches || !input.matches("input[type=file]") || !input.files.length) return;
  const renamed = new DataTransfer();
  for (const file of input.files) renamed.items.add(new File([file], `slide${(file.name.match(/[.][a-zA-Z0-9]{1,8}$/) || [""])[0]}`, { type: file.type }));
  input.files = renamed.files;
}, true);

// ---- address and journal

let settle = 0, sending = 0, told = "";

function remember() { // once the view is at rest: into the address, and into the journal
  clearTimeout(settle);
  settle = setTimeout(() => {
    if (!slide || !root.isConnected) return;
    const query = new URLSearchParams(location.search), now = { x: Math.round(view.x), y: Math.round(view.y), s: view.scale.toPrecision(4) };
    for (const [key, value] of Object.entries(now)) query.set(key, value);
    if (bag && shared.current >= 0) query.set("patch", bag.rank[shared.current]); else if (bag) query.delete("patch");
    if (layers.heat) query.set("scores", 1); else query.delete("scores");
    if (slide.source) query.set("slide", slide.source); else query.delete("slide");
    try { history.replaceState(history.state, "", `${location.pathname}?${query}`); } catch { /* some frames forbid it */ }
    const entry = { x: now.x, y: now.y, magnification: slide.mpp ? +magnification().toFixed(2) : null, rank: bag && shared.current >= 0 ? bag.rank[shared.current] : null };
    if (JSON.stringify(entry) !== told) { told = JSON.stringify(entry); journal.push(entry); tellSoon(); }
  }, 700);
}

function tellSoon() { // many views in one call, never while somebody is looking around
  if (!sending) sending = setTimeout(() => { sending = 0; if (root.isConnected && journal.length) trigger("journal", { views: journal.splice(0, 200) }); }, 10000);
}

function restore() { // the first slide of a page is shown as its address says
  const query = new URLSearchParams(location.search);
  if (restored || !slide.source || query.get("slide") !== slide.source) { restored = true; return; }
  const [x, y, s] = ["x", "y", "s"].map((key) => parseFloat(query.get(key)));
  if ([x, y, s].every(Number.isFinite) && s > 0) moveTo(x, y, s);
  layers.heat = query.get("scores") === "1";
}

function restoreRank() {
  if (restored) return;
  restored = true;
  const rank = parseInt(new URLSearchParams(location.search).get("patch"), 10);
  if (rank >= 1) go(indexOfRank(rank), false);
}

// ---- start

new ResizeObserver(() => {
  const before = size[0];
  size = [stage.clientWidth, stage.clientHeight];
  if (slide && size[0] && !before) fit(); else draw();
  drawMap();
}).observe(stage);
new ResizeObserver(drawMap).observe(map);
new MutationObserver(() => drawMap()).observe(document.body, { attributes: true, attributeFilter: ["class"] }); // dark and light
size = [stage.clientWidth, stage.clientHeight];

watch("slide", openSlide); watch("bag", openBag); watch("kept", openSelection); watch("evidence", openEvidence);
watch("map", openMap); watch("members", openMembers); watch("files", openFiles); watch("focus", ask);
if (props.slide) openSlide();
if (props.bag) openBag();
if (props.map) openMap();
if (props.files) openFiles();
