// What is drawn over the slide: boxes by focus, numbers, what was left out, tissue while it is analysed.

const paper = () => getComputedStyle(root).getPropertyValue("--stage").trim() || "#e9e9ec";
const inkOf = (index) => {
  if (!layers.foci || !foci.length) return YELLOW;
  return focusOf.has(index) ? FOCUS_COLOURS[focusOf.get(index) % FOCUS_COLOURS.length] : ALONE;
};

// The colours come again after the last one: then lines are double and diamonds have a dark middle.
const comesAgain = (place) => layers.foci && place >= FOCUS_COLOURS.length;

// Left out: dimmed, so that the stain of what was kept stays as it is. Near the cut: dimmed half as far.
function drawLeftOut(pen) {
  const [left, upper, right, lower] = corners();
  const { side } = partAt(shownNumber());
  const [from, to] = shownRows();
  const shown = [];
  for (let i = from; i < to; i++) {
    const x = bag.xy[2 * i];
    const y = bag.xy[2 * i + 1];
    if (x + side > left && x < right && y + side > upper && y < lower) shown.push(i);
  }
  if (shown.length > 6000) {
    // too many rectangles for a smooth drag: one picture of them all
    const [x, y] = toFlat(0, 0);
    pen.globalAlpha = 1;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(leftOutPicture(), x, y, slide.size[0] * view.scale, slide.size[1] * view.scale);
    return;
  }
  const held = new Set(kept);
  pen.fillStyle = paper();
  for (const i of shown) {
    if (held.has(i)) continue;
    const near = bag.rank[i] <= bag.lastNear;
    const [sx, sy] = toFlat(bag.xy[2 * i], bag.xy[2 * i + 1]);
    const w = side * view.scale;
    pen.globalAlpha = near ? layers.opacity / 3 : layers.opacity;
    pen.fillRect(sx, sy, w, w);
    if (near && w > 3) {
      pen.globalAlpha = 1;
      pen.lineWidth = 1.5;
      pen.strokeStyle = SKY;
      pen.strokeRect(sx + 1, sy + 1, w - 2, w - 2);
    }
  }
  pen.globalAlpha = 1;
}

function leftOutPicture() {
  const stamp = `${slide.token}/${layers.opacity}/${paper()}/${kept.length}/${kept[0]}`;
  if (bag.picture && bag.stamp === stamp) return bag.picture;
  const part = partAt(shownNumber());
  const scale = Math.min(4 / part.side, 2400 / Math.max(...slide.size));
  bag.stamp = stamp;
  bag.picture = document.createElement("canvas");
  bag.picture.width = Math.ceil(slide.size[0] * scale);
  bag.picture.height = Math.ceil(slide.size[1] * scale);
  const pen = bag.picture.getContext("2d");
  const side = Math.max(1, part.side * scale);
  const held = new Set(kept);
  const [from, to] = shownRows();
  for (let i = from; i < to; i++) {
    if (held.has(i)) continue;
    const near = bag.rank[i] <= bag.lastNear;
    pen.globalAlpha = near ? 0.8 : layers.opacity;
    pen.fillStyle = near ? SKY : paper();
    pen.fillRect(bag.xy[2 * i] * scale, bag.xy[2 * i + 1] * scale, side, side);
  }
  return bag.picture;
}

// The patches that are analysed, outlined where the tissue ends, and those kept so far.
function drawTissue(pen) {
  const { xy, side } = tissue;
  if (!tissue.edge)
    tissue.edge = outline(
      Array.from({ length: xy.length / 2 }, (_, i) => [xy[2 * i], xy[2 * i + 1]]),
      side,
    );
  strokeOutline(pen, tissue.edge, "#ffffff", 2);
  pen.setLineDash([5, 4]);
  for (const i of tissue.kept) {
    const [x, y] = toScreen(xy[2 * i] + side / 2, xy[2 * i + 1] + side / 2);
    const w = Math.max(side * view.scale, 11);
    for (const [width, ink] of [
      [4, DARK],
      [2, YELLOW],
    ]) {
      pen.lineWidth = width;
      pen.strokeStyle = ink;
      pen.strokeRect(x - w / 2, y - w / 2, w, w);
    }
  }
  pen.setLineDash([]);
}

// Edges [x0, y0, x1, y1] of the union of squares; those between two squares of one grid are inside, and left out.
function outline(corners, side) {
  const edges = new Map();
  for (const [x, y] of corners)
    for (const edge of [
      [x, y, x + side, y],
      [x, y + side, x + side, y + side],
      [x, y, x, y + side],
      [x + side, y, x + side, y + side],
    ]) {
      const key = edge.join();
      if (edges.has(key)) edges.delete(key);
      else edges.set(key, edge);
    }
  return [...edges.values()];
}

function strokeOutline(pen, edges, ink, width) {
  pen.beginPath();
  for (const [x0, y0, x1, y1] of edges) {
    pen.moveTo(...toScreen(x0, y0));
    pen.lineTo(...toScreen(x1, y1));
  }
  pen.lineCap = "round";
  pen.lineWidth = width + 2.5;
  pen.strokeStyle = DARK;
  pen.stroke();
  pen.lineWidth = width;
  pen.strokeStyle = ink;
  pen.stroke();
  pen.lineCap = "butt";
}

// A focus is outlined where its patches lie together; one that is spread over the slide in several places.
function drawFoci(pen) {
  if (bag.side * view.scale > 160) return; // so near that the boxes say it
  foci.forEach((focus, place) => {
    if (!isHere(focus.indices[0])) return; // a focus lies on one slide
    focus.areas = focus.areas || gather(focus.indices).filter((area) => area.length > 1);
    const ink = FOCUS_COLOURS[place % FOCUS_COLOURS.length];
    for (const area of focus.areas) {
      pen.beginPath();
      hull(area.flatMap(cornersOf)).forEach(([x, y]) => pen.lineTo(x, y));
      pen.closePath();
      pen.lineJoin = "round";
      for (const [width, stroke] of [
        [comesAgain(place) ? 7 : 5, DARK],
        [comesAgain(place) ? 5 : 2.5, ink],
        ...(comesAgain(place) ? [[2, DARK]] : []),
      ]) {
        pen.lineWidth = width;
        pen.strokeStyle = stroke;
        pen.stroke();
      }
    }
  });
}

// Of the box of a patch on the screen, with a margin.
const cornersOf = (index) => {
  const [x, y, w] = boxOf(index, 15);
  const [x0, y0, x1, y1] = [x - 9, y - 9, x + w + 9, y + w + 9];
  return [
    [x0, y0],
    [x1, y0],
    [x0, y1],
    [x1, y1],
  ];
};

// Groups of patches of which each is near to another: their centres at most NEAR sides apart.
const NEAR = 3;
function gather(indices) {
  const left = new Set(indices);
  const groups = [];
  for (const first of indices) {
    if (!left.delete(first)) continue;
    const group = [first];
    for (const one of group)
      for (const other of left) {
        const [a, b] = [centre(one), centre(other)];
        if (Math.hypot(a[0] - b[0], a[1] - b[1]) > NEAR * sideOf(one)) continue;
        left.delete(other);
        group.push(other);
      }
    groups.push(group);
  }
  return groups;
}

// Convex hull of points, by Andrew's monotone chain.
function hull(all) {
  const sorted = [...all].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const half = (list) => {
    const chain = [];
    for (const p of list) {
      while (chain.length > 1) {
        const [a, b] = chain.slice(-2);
        if ((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) > 0) break;
        chain.pop();
      }
      chain.push(p);
    }
    return chain.slice(0, -1);
  };
  return [...half(sorted), ...half(sorted.reverse())];
}

function boxOf(index, least) {
  const [sx, sy] = toScreen(...centre(index));
  const half = Math.max(sideOf(index) * view.scale, least) / 2;
  return [sx - half, sy - half, 2 * half];
}

// Places over which buttons, the badge, the scale or the little map stand, as label() places: no number goes there.
function findCovered() {
  const { left, top } = canvas.getBoundingClientRect();
  return [".tools", ".slides", ".badge", ".corner", ".nav"]
    .map((name) => $(`.stage > ${name}`).getBoundingClientRect())
    .filter((one) => one.width)
    .map((one) => [one.left + one.width / 2 - left, one.top + one.height / 2 - top, one.width, one.height]);
}

function drawBoxes(pen) {
  const placed = findCovered();
  const provisional = slides.length > bag.parts.length; // slides of the case are not analysed yet
  const list = kept.includes(shared.current) || shared.current < 0 ? kept : [...kept, shared.current];
  const shown = list.filter((index) => {
    const [x, y, w] = boxOf(index, 15);
    return isHere(index) && x + w > 0 && y + w > 0 && x < size[0] && y < size[1];
  });
  for (const index of [...shown].reverse()) {
    // the best is drawn last, on top
    const [x, y, w] = boxOf(index, 15);
    const now = index === shared.current;
    const dropped = shared.dropped.has(index);
    pen.setLineDash(provisional || dropped || !kept.includes(index) ? [5, 4] : []);
    pen.lineWidth = now ? 7 : 5;
    pen.strokeStyle = DARK;
    pen.strokeRect(x, y, w, w);
    const twice = comesAgain(focusOf.get(index));
    pen.lineWidth = (now ? 3.5 : 2.5) + (twice ? 2 : 0);
    pen.strokeStyle = inkOf(index);
    pen.strokeRect(x, y, w, w);
    if (twice) {
      pen.lineWidth = now ? 2 : 1.5;
      pen.strokeStyle = DARK;
      pen.strokeRect(x, y, w, w);
    }
    pen.setLineDash([]);
    if (now) brackets(pen, x, y, w);
  }
  pen.font = "600 14px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  const boxes = shown.map((index) => boxOf(index, 15));
  const first = shown.indexOf(shared.current);
  const order = shown.map((_, i) => i).sort((a, b) => (b === first) - (a === first));
  for (const i of order)
    label(
      pen,
      `${focusOf.has(shown[i]) && layers.foci ? foci[focusOf.get(shown[i])].name : ""}${bag.rank[shown[i]]}${shared.pinned.has(shown[i]) ? "◆" : shared.dropped.has(shown[i]) ? "✕" : ""}`,
      boxes[i],
      placed,
      boxes,
    );
}

// The current patch is told by a shape too, not by colour alone.
function brackets(pen, x, y, w) {
  const gap = 7;
  const long = Math.max(8, w / 4);
  const far = w + gap;
  pen.beginPath();
  for (const [a, b, da, db] of [
    [-gap, -gap, 1, 1],
    [far, -gap, -1, 1],
    [-gap, far, 1, -1],
    [far, far, -1, -1],
  ]) {
    pen.moveTo(x + a + da * long, y + b);
    pen.lineTo(x + a, y + b);
    pen.lineTo(x + a, y + b + db * long);
  }
  pen.lineWidth = 6;
  pen.strokeStyle = DARK;
  pen.stroke();
  pen.lineWidth = 3;
  pen.strokeStyle = "#fff";
  pen.stroke();
}

// The number goes into its box where there is room, else to the nearest free place, tied to the box by a line.
function label(pen, text, [x, y, w], placed, boxes) {
  const width = pen.measureText(text).width + 6;
  const height = 17;
  const cx = x + w / 2;
  const cy = y + w / 2;
  const spots = w > width + 8 && w > 30 ? [[x + width / 2 + 3, y + height / 2 + 3]] : [];
  for (let far = w / 2 + 11; far < w / 2 + 90; far += 13)
    for (let turn = 0; turn < 12; turn++) {
      spots.push([
        cx + (far + width / 4) * Math.cos((turn * Math.PI) / 6 - 0.8),
        cy + far * Math.sin((turn * Math.PI) / 6 - 0.8),
      ]);
    }
  const clash = ([a, b], c) => Math.abs(a - c[0]) < (width + c[2]) / 2 && Math.abs(b - c[1]) < (height + c[3]) / 2;
  const others = boxes.filter((box) => box[0] !== x || box[1] !== y).map(([a, b, s]) => [a + s / 2, b + s / 2, s, s]);
  const onScreen = ([a, b]) => a > width / 2 && a < size[0] - width / 2 && b > height / 2 && b < size[1] - height / 2;
  const free = (s, i) => !placed.some((c) => clash(s, c)) && ((w > 30 && i === 0) || !others.some((c) => clash(s, c)));
  const spot = spots.find((s, i) => onScreen(s) && free(s, i)) || spots.find(onScreen) || spots[0];
  placed.push([spot[0], spot[1], width, height]);
  const edge = [Math.min(Math.max(spot[0], x), x + w), Math.min(Math.max(spot[1], y), y + w)];
  if (Math.hypot(edge[0] - spot[0], edge[1] - spot[1]) > 8) {
    pen.lineWidth = 1.5;
    pen.strokeStyle = DARK;
    pen.beginPath();
    pen.moveTo(...edge);
    pen.lineTo(...spot);
    pen.stroke();
  }
  pen.lineWidth = 4;
  pen.strokeStyle = DARK;
  pen.strokeText(text, ...spot);
  pen.fillStyle = "#fff";
  pen.fillText(text, ...spot);
}

function drawMembers(pen) {
  pen.strokeStyle = PURPLE;
  pen.lineWidth = 2;
  for (const index of shared.members) {
    if (!isHere(index)) continue;
    const [x, y, w] = boxOf(index, 5);
    pen.strokeRect(x, y, w, w);
  }
}

function trace(pen, line, stroke) {
  if (line.length < 2) return;
  pen.beginPath();
  pen.moveTo(...line[0]);
  for (const point of line.slice(1)) pen.lineTo(...point);
  pen.lineWidth = 2.5;
  pen.strokeStyle = stroke;
  pen.stroke();
}
