// The map of the features.

function mapFrame() {
  const box = map.getBoundingClientRect();
  const pad = 16;
  const [w, h] = [map.clientWidth, map.clientHeight];
  if (!points.range) {
    const r = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < points.rows.length; i++) {
      const x = points.xy[2 * i];
      const y = points.xy[2 * i + 1];
      r[0] = Math.min(r[0], x);
      r[1] = Math.min(r[1], y);
      r[2] = Math.max(r[2], x);
      r[3] = Math.max(r[3], y);
    }
    points.range = r;
  }
  const [x0, y0, x1, y1] = points.range;
  const scale = Math.min((w - 2 * pad) / (x1 - x0 || 1), (h - 2 * pad) / (y1 - y0 || 1));
  return {
    box,
    w,
    h,
    at: (i) => [
      w / 2 + (points.xy[2 * i] - (x0 + x1) / 2) * scale,
      h / 2 - (points.xy[2 * i + 1] - (y0 + y1) / 2) * scale,
    ],
  };
}

function drawMap() {
  const ratio = window.devicePixelRatio || 1;
  const dims = [map.clientWidth, map.clientHeight];
  if (!dims[0]) return;
  const pen = prepare(map, dims, ratio);
  pen.clearRect(0, 0, ...dims);
  if (!points || !bag) {
    pen.fillStyle = getComputedStyle(root).getPropertyValue("--quiet");
    pen.font = "14px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(bag ? "The map is being made …" : "", dims[0] / 2, dims[1] / 2, dims[0] - 16);
    return;
  }
  showLegend();
  const { at } = mapFrame();
  const stamp = `${dims}/${ratio}/${mapColour()}/${kept.length}`;
  if (points.stamp !== stamp) {
    points.stamp = stamp;
    points.base = cloud(dims, ratio, at);
  }
  pen.save();
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.drawImage(points.base, 0, 0);
  pen.restore();
  points.place = points.place || new Map([...points.rows].map((row, i) => [row, i]));
  pen.fillStyle = PURPLE;
  for (const index of shared.members)
    if (points.place.has(index)) {
      const [x, y] = at(points.place.get(index));
      pen.fillRect(x - 3, y - 3, 6, 6);
    }
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  for (const index of [...kept].reverse())
    if (points.place.has(index))
      diamond(pen, ...at(points.place.get(index)), 6, keptInk(index), byFocus() && comesAgain(focusOf.get(index)));
  if (shared.current >= 0 && points.place.has(shared.current)) {
    const [x, y] = at(points.place.get(shared.current));
    pen.lineWidth = 5;
    pen.strokeStyle = "#fff";
    pen.beginPath();
    pen.arc(x, y, 10, 0, 7);
    pen.stroke();
    pen.lineWidth = 3;
    pen.strokeStyle = DARK;
    pen.beginPath();
    pen.arc(x, y, 10, 0, 7);
    pen.stroke();
  }
  const named = dims[0] > 500 ? kept : kept.filter((index) => index === shared.current);
  const written = [];
  for (const index of named)
    if (points.place.has(index)) {
      // the best first; a number that would cover another is left out
      const [x, y] = at(points.place.get(index));
      const text = `${bag.rank[index]}`;
      if (written.some(([a, b]) => Math.abs(a - x) < 26 && Math.abs(b - y) < 13)) continue;
      written.push([x, y]);
      pen.lineWidth = 3;
      pen.strokeStyle = "#fff";
      pen.strokeText(text, x + 8, y - 8);
      pen.fillStyle = DARK;
      pen.fillText(text, x + 8, y - 8);
    }
  if (lasso) trace(pen, lasso, "#cc3311");
}

// All points, drawn once: the current patch moves over them.
function cloud(dims, ratio, at) {
  const layer = document.createElement("canvas");
  const pen = prepare(layer, dims, ratio);
  const r = points.rows.length > 5000 ? 1.2 : 2;
  const colour = mapColour();
  const groups = new Map();
  for (let i = 0; i < points.rows.length; i++) {
    const key = mapInk(points.rows[i], colour);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(i);
  }
  for (const [key, list] of groups) {
    const [ink, opacity] = key.split("/");
    pen.globalAlpha = opacity;
    pen.fillStyle = ink;
    for (const i of list) {
      const [x, y] = at(i);
      pen.fillRect(x - r, y - r, 2 * r, 2 * r);
    }
  }
  return layer;
}

const mapColour = () => $(".features select").value;
const byFocus = () => !["slide", "word"].includes(mapColour());
const RAMP = Array.from({ length: 16 }, (_, i) => `hsl(${255 - 10 * i} 55% ${30 + 2.6 * i}%)`); // low to high, ever lighter
// Of words, the commonest first: told from each other on white and on black, also without colour vision as far as 10 can be.
const WORD_COLOURS = "#0077bb #ee7733 #009988 #cc3311 #aa4499 #ccbb44 #33bbee #117733 #882255 #999933".split(" ");
const wordInk = (word) => WORD_COLOURS[words.order.indexOf(word)] || "#777777";

// Colour and opacity of a patch on the map.
function mapInk(index, colour) {
  if (colour === "score") return `${RAMP[Math.round((1 - bag.rank[index] / bag.n) * (RAMP.length - 1))]}/0.9`;
  if (colour === "slide") return `${slideInk(numberOf(index))}/0.55`;
  if (colour !== "word") return `${GREY}/0.55`;
  const word = words.nearest[index];
  return word < 0 ? `${GREY}/0.4` : `${wordInk(word)}/${words.cosine[index] > 0.6 ? 0.95 : 0.5}`;
}

const keptInk = (index) => {
  if (mapColour() === "slide") return slideInk(numberOf(index));
  if (mapColour() !== "word") return inkOf(index);
  return words.nearest[index] < 0 ? GREY : wordInk(words.nearest[index]);
};

function showLegend() {
  const swatch = (kind, style, text) => `<span><i class="${kind}" style="${style}"></i>${text}</span>`;
  const byWord = mapColour() === "word";
  $(".by-word").hidden = !byWord;
  const stamp = `${mapColour()}/${foci.map((focus) => focus.name)}/${bag.n}/${slides.length}`;
  if ($(".legend").dataset.stamp === stamp) return;
  $(".legend").dataset.stamp = stamp;
  if (byWord) {
    const shown = words.order.filter((word) => words.counts[word]);
    const none = bag.n - shown.reduce((sum, word) => sum + words.counts[word], 0);
    $(".legend").replaceChildren(
      ...[...shown, ...(none ? [-1] : [])].map((word) => {
        const name = word < 0 ? "near no word" : words.names[word];
        const share = (word < 0 ? none : words.counts[word]) / bag.n;
        const entry = document.createElement("button");
        entry.type = "button";
        entry.innerHTML = swatch("square", `background:${word < 0 ? GREY : wordInk(word)}`, "");
        entry.append(`${name} ${share < 0.01 ? "< 1" : Math.round(100 * share)} %`);
        entry.onclick = () =>
          setMembers(
            indicesWhere((_x, _y, index) => words.nearest[index] === word),
            word < 0 ? name : `nearest to ${name}`,
          );
        return entry;
      }),
    );
    return;
  }
  const bySlide = mapColour() === "slide";
  const parts = (bySlide ? [] : foci).map((focus, i) =>
    swatch(
      comesAgain(i) ? "diamond again" : "diamond",
      `background-color:${FOCUS_COLOURS[i % FOCUS_COLOURS.length]}`,
      `focus ${focus.name}`,
    ),
  );
  if (bySlide) parts.push(...slides.map((_, i) => swatch("diamond", `background:${slideInk(i)}`, `slide ${i + 1}`)));
  else if (parts.length) parts.push(swatch("diamond", `background:${ALONE}`, "on its own"));
  else parts.push(swatch("diamond", `background:${YELLOW}`, "selected"));
  if (mapColour() === "score")
    parts.push(swatch("ramp", `background:linear-gradient(90deg,${RAMP.join()})`, "score, lowest to highest"));
  else if (!bySlide) parts.push(swatch("dot", "", "left out"));
  parts.push(swatch("ring", "", "current"), swatch("cross", "", "in the list"));
  $(".legend").innerHTML = parts.join("");
}

// twice: of a focus whose colour another one has, too
function diamond(pen, x, y, r, ink, twice = false) {
  pen.beginPath();
  pen.moveTo(x, y - r);
  pen.lineTo(x + r, y);
  pen.lineTo(x, y + r);
  pen.lineTo(x - r, y);
  pen.closePath();
  pen.fillStyle = ink;
  pen.fill();
  pen.lineWidth = 1;
  pen.strokeStyle = DARK;
  pen.stroke();
  if (!twice) return;
  pen.beginPath();
  pen.arc(x, y, r / 3, 0, 7);
  pen.fillStyle = DARK;
  pen.fill();
}

function nearestOnMap(sx, sy) {
  const { at } = mapFrame();
  const held = new Set(kept);
  let best = -1;
  let least = 12;
  for (let i = 0; i < points.rows.length; i++) {
    const [x, y] = at(i);
    const d = Math.hypot(x - sx, y - sy) - (held.has(points.rows[i]) ? 4 : 0); // selected ones are bigger
    if (d < least) {
      least = d;
      best = points.rows[i];
    }
  }
  return best;
}

map.addEventListener("pointerdown", (event) => {
  if (points && bag) {
    map.setPointerCapture(event.pointerId);
    lasso = [placeOf(event, map)];
  }
});
map.addEventListener("pointermove", (event) => {
  if (lasso) {
    lasso.push(placeOf(event, map));
    drawMap();
  }
});
map.addEventListener("pointerup", () => {
  if (!lasso) return;
  const ring = lasso;
  const long = ring.some(([x, y]) => Math.hypot(x - ring[0][0], y - ring[0][1]) > 6);
  lasso = null;
  if (!long) {
    const index = nearestOnMap(...ring[0]);
    if (index >= 0) go(index);
    return drawMap();
  }
  const { at } = mapFrame();
  setMembers(
    [...points.rows].filter((_, i) => inside(ring, ...at(i))),
    "lasso",
  );
});
map.addEventListener("pointercancel", () => {
  lasso = null;
  drawMap();
});
