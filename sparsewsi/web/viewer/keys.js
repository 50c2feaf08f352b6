// Buttons and keys.

const act = (name) => root.querySelector(`[data-do="${name}"]`);
const KEYS = [
  ["1 … 6", "1.25× … 40×"],
  ["0", "whole slide"],
  ["+  −", "zoom"],
  ["arrows", "move"],
  ["n  p", "next, previous selected patch"],
  ["Enter", "enlarge the patch"],
  ["a  d", "agree, disagree"],
  ["i  x", "pin, drop (for a what-if)"],
  ["b  h", "boxes, scores"],
  ["r", "draw a region (or Shift and drag)"],
  ["m", "larger map"],
  ["Esc", "close, clear"],
];
$(".help").innerHTML = `<dl>${KEYS.map(([key, does]) => `<dt>${key}</dt><dd>${does}</dd>`).join("")}</dl>`;

const DEEDS = {
  boxes: () => {
    layers.boxes = !layers.boxes;
    showAllLayers();
  },
  heat: () => {
    layers.heat = !layers.heat;
    showAllLayers();
  },
  region: () => setMode(mode === "region" ? "" : "region"),
  keys: () => {
    const help = $(".help");
    help.hidden = !help.hidden;
    act("keys").setAttribute("aria-pressed", !help.hidden);
  },
  enlarge,
  shrink: () => {
    $(".card").hidden = true;
  },
  agree: () => mark("agree"),
  disagree: () => mark("disagree"),
  pin: () => {
    if (shared.current >= 0) {
      toggle(shared.pinned, shared.dropped, shared.current);
      tellPicks();
    }
  },
  drop: () => {
    if (shared.current >= 0) {
      toggle(shared.dropped, shared.pinned, shared.current);
      tellPicks();
    }
  },
  "pin-all": () => {
    for (const index of shared.members) {
      shared.pinned.add(index);
      shared.dropped.delete(index);
    }
    tellPicks();
  },
  "drop-all": () => {
    for (const index of shared.members) {
      shared.dropped.add(index);
      shared.pinned.delete(index);
    }
    tellPicks();
  },
  clear: () => setMembers([], ""),
  previous: () => step(-1),
  next: () => step(1),
  grow: () => {
    const grown = $(".below").classList.toggle("grown");
    act("grow").setAttribute("aria-pressed", grown);
    drawMap();
  },
};

function showAllLayers() {
  act("boxes").setAttribute("aria-pressed", layers.boxes);
  act("heat").setAttribute("aria-pressed", layers.heat);
  $(".colours").hidden = $(".opacity").hidden = !layers.heat;
  draw();
  drawMap();
  remember();
}

root.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button && !button.disabled) DEEDS[button.dataset.do]();
});
$(".opacity input").addEventListener("input", (event) => {
  layers.opacity = event.target.value / 100;
  draw();
});
$(".patches select").addEventListener("change", fillStrip);

const pan = (dx, dy) =>
  moveTo(view.x + (dx * size[0]) / 6 / view.scale, view.y + (dy * size[1]) / 6 / view.scale, view.scale);
const PRESS = {
  n: DEEDS.next,
  p: DEEDS.previous,
  b: DEEDS.boxes,
  h: DEEDS.heat,
  r: DEEDS.region,
  m: DEEDS.grow,
  a: DEEDS.agree,
  d: DEEDS.disagree,
  i: DEEDS.pin,
  x: DEEDS.drop,
  "?": DEEDS.keys,
  0: fit,
  "+": () => zoom(1.5),
  "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  ArrowLeft: () => pan(-1, 0),
  ArrowRight: () => pan(1, 0),
  ArrowUp: () => pan(0, -1),
  ArrowDown: () => pan(0, 1),
  Enter: () => ($(".card").hidden ? enlarge() : DEEDS.shrink()),
  Escape: () => {
    $(".card").hidden = $(".help").hidden = true;
    act("keys").setAttribute("aria-pressed", false);
    setMode("");
    band = null;
    setMembers([], "");
  },
};
MAGNIFICATIONS.forEach((times, i) => {
  PRESS[i + 1] = () => magnify(times);
});

root.addEventListener("keydown", (event) => {
  if (!slide || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea"))
    return;
  const press = PRESS[event.key];
  const onButton = event.target.matches("button");
  if (!press || (onButton && event.key === "Enter" && !event.target.matches(".item"))) return;
  if (!bag && "npbhrmadixEnter".includes(event.key)) return;
  event.preventDefault();
  press();
});

// A citation anywhere on the page, [#5](#patch-5), goes to its patch without asking the server.
document.addEventListener(
  "click",
  (event) => {
    const link = event.target.closest && event.target.closest('a[href*="#patch-"]');
    if (!link || !root.isConnected || !bag) return;
    event.preventDefault();
    event.stopPropagation();
    go(indexOfRank(+link.getAttribute("href").split("#patch-")[1]));
    if (stage.getBoundingClientRect().bottom < 80 || stage.getBoundingClientRect().top > window.innerHeight - 80)
      stage.scrollIntoView({ block: "center" });
  },
  true,
);

// A file's name may name a patient: it does not leave the browser. The file itself is not copied.
document.addEventListener(
  "change",
  (event) => {
    const input = event.target;
    if (!root.isConnected || !input.matches || !input.matches("input[type=file]") || !input.files.length) return;
    const renamed = new DataTransfer();
    for (const file of input.files)
      renamed.items.add(
        new File([file], `slide${(file.name.match(/[.][a-zA-Z0-9]{1,8}$/) || [""])[0]}`, { type: file.type }),
      );
    input.files = renamed.files;
  },
  true,
);
