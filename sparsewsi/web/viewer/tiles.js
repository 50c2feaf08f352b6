// Tiles: which are needed, fetched and drawn.

const TILE_LIMIT = 400; // kept in memory
const LOADING_LIMIT = 6; // at a time

const tiles = new Map(); // "z/column_row" -> {image, ready}; insertion order = least recently used first
let wanted = [];
let loading = 0;

function address(rest, of = slide) {
  const base = (window.gradio_config && window.gradio_config.root) || location.origin + location.pathname;
  return `${base.replace(/\/$/, "")}/gradio_api/slide/${of.token}/${rest}`;
}

const topLevel = () => Math.max(0, Math.ceil(Math.log2(Math.max(...slide.size) / slide.tile)));

function tile(key) {
  const found = tiles.get(key);
  if (found) {
    tiles.delete(key);
    tiles.set(key, found);
  }
  return found && found.ready ? found.image : null;
}

function loadTiles() {
  while (loading < LOADING_LIMIT && wanted.length) {
    const key = wanted.shift();
    if (tiles.has(key)) continue;
    const entry = { image: new Image(), ready: false };
    const of = slide.token;
    tiles.set(key, entry);
    loading += 1;
    entry.image.onload = () => {
      loading -= 1;
      entry.ready = true;
      draw();
    };
    entry.image.onerror = () => {
      loading -= 1;
      if (slide && slide.token === of) setTimeout(() => tiles.delete(key), 2000);
      loadTiles();
    };
    entry.image.src = address(`${key}.jpg`);
    if (tiles.size > TILE_LIMIT) tiles.delete(tiles.keys().next().value);
  }
}

function drawTiles(pen, ratio) {
  const highest = topLevel();
  const level = Math.min(highest, Math.max(0, Math.floor(Math.log2(1 / (view.scale * ratio)) + 0.01)));
  const span = slide.tile * 2 ** level;
  const [left, upper, right, lower] = corners();
  const missing = [];
  const columns = [
    Math.max(0, Math.floor(left / span)),
    Math.min(Math.ceil(slide.size[0] / span) - 1, Math.floor(right / span)),
  ];
  const rows = [
    Math.max(0, Math.floor(upper / span)),
    Math.min(Math.ceil(slide.size[1] / span) - 1, Math.floor(lower / span)),
  ];
  let waiting = 0;
  for (let row = rows[0]; row <= rows[1]; row++)
    for (let column = columns[0]; column <= columns[1]; column++) {
      const key = `${level}/${column}_${row}`;
      const image = tile(key);
      if (image) {
        place(pen, image, level, column, row, 0, 0, 1);
        continue;
      }
      waiting += 1;
      missing.push([Math.hypot((column + 0.5) * span - view.x, (row + 0.5) * span - view.y), key]);
      for (let up = 1; level + up <= highest; up++) {
        // a coarser tile stands in until the sharp one is there
        const shift = 2 ** up;
        const from = tile(`${level + up}/${column >> up}_${row >> up}`);
        if (from) {
          place(pen, from, level, column, row, column % shift, row % shift, shift);
          break;
        }
      }
    }
  wanted = missing.sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
  if (!tiles.has(`${highest}/0_0`)) wanted.unshift(`${highest}/0_0`);
  loadTiles();
  root.dataset.waiting = waiting; // tests wait for 0
}

function place(pen, image, level, column, row, partX, partY, shift) {
  const span = slide.tile * 2 ** level;
  const px = slide.tile / shift;
  const sw = Math.min(px, image.naturalWidth - partX * px);
  const sh = Math.min(px, image.naturalHeight - partY * px);
  if (sw <= 0 || sh <= 0) return;
  const [sx, sy] = toFlat(column * span, row * span);
  const across = Math.min(span, slide.size[0] - column * span) * view.scale;
  const down = Math.min(span, slide.size[1] - row * span) * view.scale;
  const x0 = Math.round(sx * 2) / 2;
  const y0 = Math.round(sy * 2) / 2; // on half px, so that no seam shows between tiles
  pen.drawImage(
    image,
    partX * px,
    partY * px,
    sw,
    sh,
    x0,
    y0,
    Math.round((sx + across) * 2) / 2 - x0,
    Math.round((sy + down) * 2) / 2 - y0,
  );
}
