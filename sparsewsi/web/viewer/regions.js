// Patches in a region of the slide or in a lasso on the map.

const CHIPS = 120; // patches that are listed by their number

function setMembers(indices, where) {
  shared.members = new Set(indices);
  const panel = $(".members");
  const held = indices.filter((index) => kept.includes(index)).length;
  panel.hidden = !where;
  if (where) {
    const many = `${indices.length.toLocaleString("en")} patch${indices.length === 1 ? "" : "es"}`;
    $(".members b").textContent = indices.length
      ? `${many} in the ${where}, ${held} of them selected`
      : `No patch of tissue has its centre in the ${where}`;
    const shown = [...indices].sort((a, b) => bag.rank[a] - bag.rank[b]).slice(0, CHIPS);
    $(".members .list").replaceChildren(
      ...shown.map((index) => {
        const chip = document.createElement("button");
        chip.type = "button";
        chip.textContent = `#${bag.rank[index]}`;
        chip.className = kept.includes(index) ? "kept" : "";
        chip.title = describe(index);
        chip.onclick = () => go(index);
        return chip;
      }),
      ...(indices.length > CHIPS ? [document.createTextNode(` and ${indices.length - CHIPS} more`)] : []),
    );
    say($(".members b").textContent);
  }
  draw();
  drawMap();
}

// Ray casting.
function inside(ring, x, y) {
  let odd = false;
  for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
    const [xi, yi] = ring[i];
    const [xj, yj] = ring[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
  }
  return odd;
}

function indicesWhere(test) {
  const found = [];
  for (let i = 0; i < bag.n; i++) {
    const [x, y] = centre(i);
    if (test(x, y)) found.push(i);
  }
  return found;
}

function endRegion() {
  const [x0, y0] = toSlide(Math.min(band[0], band[2]), Math.min(band[1], band[3]));
  const [x1, y1] = toSlide(Math.max(band[0], band[2]), Math.max(band[1], band[3]));
  band = null;
  setMode("");
  setMembers(
    indicesWhere((x, y) => x >= x0 && x <= x1 && y >= y0 && y <= y1),
    "region",
  );
}

function setMode(name) {
  mode = name;
  canvas.classList.toggle("drawing", mode === "region");
  act("region").setAttribute("aria-pressed", mode === "region");
}
