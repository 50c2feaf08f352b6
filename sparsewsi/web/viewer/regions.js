// Patches in a region of the slide or in a lasso on the map.

const CHIPS = 120; // patches that are listed by their number

function setMembers(indices, where) {
  shared.members = new Set(indices);
  const panel = $(".members");
  const held = indices.filter((index) => kept.includes(index)).length;
  panel.dataset.on = where ? 1 : "";
  if (where) {
    if (!["patches", "map"].includes(root.dataset.tab)) showTab("patches");
    const many = `${indices.length.toLocaleString("en")} patch${indices.length === 1 ? "" : "es"}`;
    $(".members b").textContent = indices.length
      ? `${many} ${where.startsWith("near") ? where : `in the ${where}`}, ${held} of them selected`
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
  showMembers();
  draw();
  drawMap();
}

function showMembers() {
  $(".members").hidden = !$(".members").dataset.on || !["patches", "map"].includes(root.dataset.tab);
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
    if (test(x, y, i)) found.push(i);
  }
  return found;
}

function endRegion() {
  const [a, b] = [toSlide(band[0], band[1]), toSlide(band[2], band[3])];
  const [x0, x1] = [Math.min(a[0], b[0]), Math.max(a[0], b[0])];
  const [y0, y1] = [Math.min(a[1], b[1]), Math.max(a[1], b[1])];
  band = null;
  setMode("");
  setMembers(
    indicesWhere((x, y, index) => x >= x0 && x <= x1 && y >= y0 && y <= y1 && isHere(index)),
    "region",
  );
}

function setMode(name) {
  mode = name;
  canvas.classList.toggle("drawing", !!mode);
  for (const kind of ["region", "ruler"]) act(kind).setAttribute("aria-pressed", mode === kind);
}
