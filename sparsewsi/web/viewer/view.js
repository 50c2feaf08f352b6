// The stage: where the slide is looked at, how that is drawn, and the pointer on it.

const MAGNIFICATIONS = [1.25, 2.5, 5, 10, 20, 40];
let fitted = false; // the whole slide is shown, and stays so when the window changes
let frame = 0; // of the animation that will draw next

const COS = [1, 0, -1, 0]; // of quarter turns
const SIN = [0, 1, 0, -1];
const rotate = (dx, dy, turn) => [dx * COS[turn] - dy * SIN[turn], dx * SIN[turn] + dy * COS[turn]];
const toFlat = (x, y) => [(x - view.x) * view.scale + size[0] / 2, (y - view.y) * view.scale + size[1] / 2]; // not turned
const toScreen = (x, y) => {
  const [dx, dy] = rotate((x - view.x) * view.scale, (y - view.y) * view.scale, view.turn);
  return [dx + size[0] / 2, dy + size[1] / 2];
};
const toSlide = (sx, sy) => {
  const [dx, dy] = rotate(sx - size[0] / 2, sy - size[1] / 2, (4 - view.turn) % 4);
  return [dx / view.scale + view.x, dy / view.scale + view.y];
};
const corners = () => {
  const [x0, y0] = toSlide(0, 0);
  const [x1, y1] = toSlide(...size);
  return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
};
// The whole slide is shown below the tools and the badge, CSS px.
const bottomOf = (part) => (part.offsetHeight ? part.offsetTop + part.offsetHeight : 0);
const toolsTop = () => Math.max(bottomOf($(".tools")), bottomOf($(".badge")));
const fitScale = () => {
  const [wide, high] = [size[0], size[1] - toolsTop()];
  const [w, h] = view.turn % 2 ? [high, wide] : [wide, high];
  return 0.94 * Math.min(w / slide.size[0], h / slide.size[1]);
};
const bounded = (scale) => Math.min(Math.max(scale, fitScale() / 2), slide.mpp ? Math.max(8 * slide.mpp, 4) : 4);
const magnification = () => (10 * view.scale) / slide.mpp; // 10x is 1 um per px of the screen

// jump: to a place of this slide, where a viewer of another one does not follow
function moveTo(x, y, scale, jump = false) {
  const before = { ...view };
  view.x = Math.min(Math.max(x, 0), slide.size[0]);
  view.y = Math.min(Math.max(y, 0), slide.size[1]);
  view.scale = bounded(scale);
  fitted = false;
  draw();
  remember();
  tellLook(before, jump);
}

function fit() {
  if (!slide || !size[0]) return;
  const before = { ...view };
  view.scale = fitScale();
  const [dx, dy] = rotate(0, -toolsTop() / 2, (4 - view.turn) % 4);
  view.x = slide.size[0] / 2 + dx / view.scale;
  view.y = slide.size[1] / 2 + dy / view.scale;
  fitted = true;
  draw();
  remember();
  tellLook(before, false, true);
}

function zoom(factor, sx = size[0] / 2, sy = size[1] / 2) {
  if (!slide) return;
  const [x, y] = toSlide(sx, sy);
  const scale = bounded(view.scale * factor);
  const change = view.scale / scale;
  moveTo(x + (view.x - x) * change, y + (view.y - y) * change, scale);
}

function magnify(times) {
  if (slide && slide.mpp) moveTo(view.x, view.y, (times * slide.mpp) / 10, true);
}

function buildMagnifications() {
  const native = slide.mpp ? 10 / slide.mpp : 0;
  const make = (text, does, title) => {
    const b = document.createElement("button");
    b.type = "button";
    b.textContent = text;
    b.title = title;
    b.onclick = does;
    return b;
  };
  const buttons = MAGNIFICATIONS.map((times, i) => {
    const b = make(
      `${times}×`,
      () => magnify(times),
      slide.mpp
        ? `${times}× (${i + 1})${times > 1.3 * native ? ", finer than the scan" : ""}`
        : "The slide states no resolution: magnification unknown",
    );
    b.disabled = !slide.mpp;
    return b;
  });
  $(".mags").replaceChildren(make("Fit", fit, "Whole slide (0)"), ...buttons);
}

function draw() {
  if (!frame) frame = requestAnimationFrame(paint);
}

function paint() {
  frame = 0;
  const ratio = window.devicePixelRatio || 1;
  const pen = prepare(canvas, size, ratio);
  pen.clearRect(0, 0, ...size);
  if (!slide || !view.scale) return;
  pen.imageSmoothingEnabled = true;
  pen.save();
  pen.translate(size[0] / 2, size[1] / 2);
  pen.rotate((view.turn * Math.PI) / 2);
  pen.translate(-size[0] / 2, -size[1] / 2);
  drawTiles(pen, ratio);
  if (bag && layers.heat) drawLeftOut(pen);
  pen.restore();
  if (tissue && tissue.token === slide.token) drawTissue(pen);
  if (bag) drawMembers(pen);
  if (bag && layers.foci) drawFoci(pen);
  if (bag && layers.boxes) drawBoxes(pen);
  if (band) {
    pen.setLineDash([6, 4]);
    pen.lineWidth = 2;
    pen.strokeStyle = DARK;
    pen.strokeRect(band[0], band[1], band[2] - band[0], band[3] - band[1]);
    pen.setLineDash([]);
  }
  if (ruler) drawRuler(pen);
  drawScale();
  drawNavigator(ratio);
  Object.assign(root.dataset, {
    x: view.x,
    y: view.y,
    scale: view.scale,
    current: bag && shared.current >= 0 ? bag.rank[shared.current] : "",
  });
}

function prepare(target, [width, height], ratio) {
  const w = Math.round(width * ratio);
  const h = Math.round(height * ratio);
  if (target.width !== w || target.height !== h) {
    target.width = w;
    target.height = h;
  }
  const pen = target.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return pen;
}

const SCALE_FROM = { argument: "as given by hand", "objective power": "guessed from the magnification" };

function drawScale() {
  const bar = $(".scale");
  const said = $(".mag");
  bar.hidden = !slide.mpp;
  $(".corner").title = slide.mpp
    ? `${+slide.mpp.toPrecision(4)} µm/px, ${SCALE_FROM[slide.mpp_source] || "as stated in the file"}; not checked`
    : "The file states no scale";
  if (!slide.mpp) {
    said.textContent = "scale unknown";
    return;
  }
  const room = Math.min(150, size[0] / 3);
  const um = (room * slide.mpp) / view.scale;
  const ten = 10 ** Math.floor(Math.log10(um));
  const length = [5, 2, 1].map((v) => v * ten).find((v) => v <= um);
  bar.querySelector("i").style.width = `${(length * view.scale) / slide.mpp}px`;
  bar.querySelector("span").textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  root.dataset.bar = length;
  const m = magnification();
  const over = view.scale > 1.3 ? ` (scan enlarged ${view.scale.toFixed(1)}×)` : "";
  said.textContent = `${+m.toFixed(m < 10 ? 2 : 1)}×${over}`;
}

const tellLength = (um) => (um >= 1000 ? `${+(um / 1000).toPrecision(3)} mm` : `${+um.toPrecision(3)} µm`);

function drawRuler(pen) {
  const [a, b] = [toScreen(ruler[0], ruler[1]), toScreen(ruler[2], ruler[3])];
  const px = Math.hypot(ruler[2] - ruler[0], ruler[3] - ruler[1]);
  for (const [width, ink] of [
    [5, DARK],
    [2.5, "#fff"],
  ]) {
    pen.lineWidth = width;
    pen.strokeStyle = ink;
    pen.beginPath();
    pen.moveTo(...a);
    pen.lineTo(...b);
    pen.stroke();
  }
  if (px)
    tag(pen, slide.mpp ? tellLength(px * slide.mpp) : `${Math.round(px)} px`, [
      (a[0] + b[0]) / 2,
      (a[1] + b[1]) / 2 - 14,
    ]);
}

function tag(pen, text, [x, y]) {
  pen.font = "600 13px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  const width = pen.measureText(text).width + 12;
  pen.fillStyle = "rgba(15, 15, 20, 0.85)";
  pen.fillRect(x - width / 2, y - 11, width, 22);
  pen.fillStyle = "#fff";
  pen.fillText(text, x, y);
}

function drawNavigator(ratio) {
  const scale = Math.min(150 / slide.size[0], 120 / slide.size[1], size[0] / 4 / slide.size[0]);
  const w = slide.size[0] * scale;
  const h = slide.size[1] * scale;
  nav.style.width = `${w}px`;
  nav.style.height = `${h}px`;
  const pen = prepare(nav, [w, h], ratio);
  const whole = tile(`${topLevel()}/0_0`);
  pen.clearRect(0, 0, w, h);
  if (whole) pen.drawImage(whole, 0, 0, w, h);
  for (const index of kept) {
    if (!isHere(index)) continue;
    const [x, y] = centre(index);
    pen.fillStyle = DARK;
    pen.fillRect(x * scale - 2.5, y * scale - 2.5, 5, 5);
    pen.fillStyle = YELLOW;
    pen.fillRect(x * scale - 1.5, y * scale - 1.5, 3, 3);
  }
  const [left, upper, right, lower] = corners();
  pen.lineWidth = 3;
  pen.strokeStyle = "#fff";
  pen.strokeRect(left * scale, upper * scale, (right - left) * scale, (lower - upper) * scale);
  pen.lineWidth = 1.5;
  pen.strokeStyle = DARK;
  pen.strokeRect(left * scale, upper * scale, (right - left) * scale, (lower - upper) * scale);
  nav.scaleOf = scale;
}

const placeOf = (event, of) => {
  const box = of.getBoundingClientRect();
  return [event.clientX - box.left - of.clientLeft, event.clientY - box.top - of.clientTop];
};
const down = new Map(); // pointer -> last place on the stage
let travelled = 0;
let pinch = 0;

canvas.addEventListener("pointerdown", (event) => {
  if (!slide || event.button > 0) return;
  canvas.setPointerCapture(event.pointerId);
  const at = placeOf(event, canvas);
  down.set(event.pointerId, at);
  travelled = 0;
  pinch = 0;
  if (mode === "ruler") ruler = [...toSlide(...at), ...toSlide(...at)];
  else if ((mode === "region" || event.shiftKey) && bag) band = [...at, ...at];
});
canvas.addEventListener("pointermove", (event) => {
  if (!down.has(event.pointerId)) return;
  const at = placeOf(event, canvas);
  const before = down.get(event.pointerId);
  down.set(event.pointerId, at);
  travelled += Math.hypot(at[0] - before[0], at[1] - before[1]);
  if (down.size === 2) {
    // two fingers: zoom about their middle
    const [a, b] = [...down.values()];
    const apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (pinch) zoom(apart / pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    pinch = apart;
    band = null;
  } else if (mode === "ruler" && ruler) {
    [ruler[2], ruler[3]] = toSlide(...at);
    draw();
  } else if (band) {
    band[2] = at[0];
    band[3] = at[1];
    draw();
  } else {
    const [dx, dy] = rotate(before[0] - at[0], before[1] - at[1], (4 - view.turn) % 4);
    moveTo(view.x + dx / view.scale, view.y + dy / view.scale, view.scale);
  }
});
for (const name of ["pointerup", "pointercancel"])
  canvas.addEventListener(name, (event) => {
    const at = down.get(event.pointerId);
    down.delete(event.pointerId);
    if (!at) return;
    if (mode === "ruler") return setMode("");
    if (band) return endRegion();
    if (travelled < 5 && bag && name === "pointerup") go(patchAt(...toSlide(...at)), false);
  });
canvas.addEventListener("contextmenu", (event) => {
  const index = bag ? patchAt(...toSlide(...placeOf(event, canvas))) : -1;
  if (index < 0) return;
  event.preventDefault();
  go(index, false);
  DEEDS.likes();
});
canvas.addEventListener("dblclick", (event) => zoom(2, ...placeOf(event, canvas)));
canvas.addEventListener(
  "wheel",
  (event) => {
    if (slide) {
      event.preventDefault();
      zoom(2 ** (-event.deltaY / (event.ctrlKey ? 100 : 300)), ...placeOf(event, canvas));
    }
  },
  { passive: false },
);

// A selected one first: its box is on top.
function patchAt(x, y) {
  const hit = (index) => {
    const [cx, cy] = centre(index);
    const half = Math.max(sideOf(index), 15 / view.scale) / 2;
    return isHere(index) && Math.abs(x - cx) <= half && Math.abs(y - cy) <= half;
  };
  const inPatch = (index) => {
    const [cx, cy] = centre(index);
    return isHere(index) && Math.max(Math.abs(x - cx), Math.abs(y - cy)) <= sideOf(index) / 2;
  };
  return kept.find(hit) ?? bag.order.find(inPatch) ?? -1;
}

function navigate(event) {
  if (slide && event.buttons) {
    const [sx, sy] = placeOf(event, nav);
    moveTo(sx / nav.scaleOf, sy / nav.scaleOf, view.scale, true);
  }
}
nav.addEventListener("pointerdown", (event) => {
  nav.setPointerCapture(event.pointerId);
  navigate(event);
});
nav.addEventListener("pointermove", navigate);
