// Buttons and keys.

const act = (name) => root.querySelector(`[data-do="${name}"]`);
const KEYS = [
  ["1 … 6", "1.25× … 40×"],
  ["0", "whole slide"],
  ["+  −", "zoom"],
  ["arrows", "move"],
  ["n  p", "next, previous selected patch"],
  ["s", "next slide of the case"],
  ["Enter", "enlarge the patch"],
  ["a  d", "agree, disagree"],
  ["i  x", "pin, drop (for a what-if)"],
  ["k", "find its likes"],
  ["b  o  h", "patches, foci, left out"],
  ["r", "draw a region (or Shift and drag)"],
  ["u", "ruler"],
  ["t", "turn by 90 degrees"],
  ["f", "full screen"],
  ["q", "go to the question"],
  ["Esc", "close, clear"],
];
$(".help").innerHTML = `<dl>${KEYS.map(([key, does]) => `<dt>${key}</dt><dd>${does}</dd>`).join("")}</dl>`;

function toggleLayer(name) {
  layers[name] = !layers[name];
  showLayers();
  if (name === "foci" && bag) fillStrip();
  drawMap();
  draw();
  remember();
  tell("slide-layers", { layers, together });
}

function pick(set, other) {
  if (shared.current < 0) return;
  toggle(set, other, shared.current);
  tellPicks();
}

const DEEDS = {
  boxes: () => toggleLayer("boxes"),
  foci: () => toggleLayer("foci"),
  heat: () => toggleLayer("heat"),
  layers: () => openMenu("layers"),
  save: () => openMenu("save"),
  keys: () => openMenu("keys"),
  region: () => setMode(mode === "region" ? "" : "region"),
  ruler: () => {
    const on = mode !== "ruler";
    ruler = null;
    setMode(on ? "ruler" : "");
    draw();
  },
  turn: () => {
    view.turn = (view.turn + 1) % 4;
    draw();
    remember();
    tellLook(view, true);
  },
  together: () => {
    together = !together;
    showLayers();
    tell("slide-layers", { layers, together });
    tellLook(view, true, fitted);
  },
  full: () => (document.fullscreenElement ? document.exitFullscreen() : stage.requestFullscreen()),
  enlarge,
  shrink: () => {
    $(".card").hidden = true;
  },
  agree: () => mark("agree"),
  disagree: () => mark("disagree"),
  likes: () => {
    if (shared.current >= 0) trigger("likes", { index: shared.current });
  },
  pin: () => pick(shared.pinned, shared.dropped),
  drop: () => pick(shared.dropped, shared.pinned),
  "pin-all": () => pickAll(shared.pinned, shared.dropped),
  "drop-all": () => pickAll(shared.dropped, shared.pinned),
  unpick,
  clear: () => setMembers([], ""),
  previous: () => step(-1),
  next: () => step(1),
  leave: () => trigger("leave", {}),
  cancel: () => {
    $(".work b").textContent = "Cancelling …";
    trigger("cancel", {});
  },
};

function showLayers() {
  for (const name of ["boxes", "foci", "heat"]) act(name).setAttribute("aria-pressed", layers[name]);
  act("together").setAttribute("aria-pressed", together);
  $(".colours").hidden = $(".opacity").hidden = !(bag && layers.heat);
}

root.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button && !button.disabled) DEEDS[button.dataset.do]();
});
$(".opacity input").addEventListener("input", (event) => {
  layers.opacity = event.target.value / 100;
  draw();
  tell("slide-layers", { layers, together });
});
$(".film select").addEventListener("change", (event) => {
  event.target.dataset.chosen = "yes";
  fillStrip();
});
$(".features select").addEventListener("change", drawMap);
document.addEventListener("fullscreenchange", () =>
  act("full").setAttribute("aria-pressed", !!document.fullscreenElement),
);

const pan = (dx, dy) => {
  const [x, y] = rotate((dx * size[0]) / 6, (dy * size[1]) / 6, (4 - view.turn) % 4);
  moveTo(view.x + x / view.scale, view.y + y / view.scale, view.scale);
};
const PRESS = {
  n: DEEDS.next,
  p: DEEDS.previous,
  s: () => showSlide((shownNumber() + 1) % slides.length),
  b: DEEDS.boxes,
  h: DEEDS.heat,
  r: DEEDS.region,
  o: DEEDS.foci,
  u: DEEDS.ruler,
  t: DEEDS.turn,
  f: DEEDS.full,
  k: DEEDS.likes,
  l: DEEDS.layers,
  q: () => {
    const box = document.querySelector("#question textarea");
    if (!box) return;
    showTab("ask");
    box.focus();
  },
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
    if (cited && cited.isConnected) cited.focus();
    cited = null;
    $(".card").hidden = true;
    openMenu("");
    setMode("");
    band = ruler = null;
    setMembers([], "");
  },
};
MAGNIFICATIONS.forEach((times, i) => {
  PRESS[i + 1] = () => magnify(times);
});

let cited = null; // the citation from which the keyboard came to the slide, and to which Escape returns

// Also where nothing has the focus, as after a slide was opened.
document.addEventListener("keydown", (event) => {
  const ours = root.contains(event.target) || (event.target === document.body && !second && root.isConnected);
  if (!ours) return;
  if (!slide || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea"))
    return;
  const press = PRESS[event.key];
  const onButton = event.target.matches("button");
  if (!press || (onButton && event.key === "Enter" && !event.target.matches(".item, .cell"))) return;
  if (!bag && "npbohradixkEnter".includes(event.key)) return;
  if (second && "adixkr".includes(event.key)) return; // what is said of patches is said in the page's own viewer
  event.preventDefault();
  press();
});
strip.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const items = [...strip.querySelectorAll("button")];
  const next = by && items[items.indexOf(event.target) + by];
  if (!by) return;
  event.preventDefault();
  event.stopPropagation();
  if (next) next.focus();
});

// A citation anywhere on the page, [#5](#patch-5) or [B](#focus-B-5), goes there without asking the server.
document.addEventListener(
  "click",
  (event) => {
    const link =
      event.target.closest &&
      event.target.closest('a[href*="#patch-"], a[href*="#focus-"], a[href*="#ask-"], a[href*="#without-"]');
    if (!link || !root.isConnected || second !== !!link.closest(".other")) return;
    event.preventDefault();
    event.stopPropagation();
    const [kind, name, rank] = link.getAttribute("href").split("#")[1].split("-");
    if (kind === "ask") return trigger("ask", { number: +name });
    if (kind === "without") return trigger("without", { name });
    if (!bag) return;
    if (kind === "patch") go(indexOfRank(+name));
    else goFocus(name, indexOfRank(+rank));
    if (!event.detail) {
      cited = link; // it was pressed by a key: what is asked next is asked of the patch
      canvas.focus({ preventScroll: true });
    }
    const place = stage.getBoundingClientRect();
    if (place.bottom < 80 || place.top > window.innerHeight - 80) stage.scrollIntoView({ block: "center" });
  },
  true,
);

// A file's name may name a patient: it does not leave the browser. The file itself is not copied.
document.addEventListener(
  "change",
  (event) => {
    const input = event.target;
    if (second || !root.isConnected || !input.matches || !input.matches("input[type=file]") || !input.files.length)
      return;
    const renamed = new DataTransfer();
    for (const file of input.files)
      renamed.items.add(
        new File([file], `slide${(file.name.match(/[.][a-zA-Z0-9]{1,8}$/) || [""])[0]}`, { type: file.type }),
      );
    input.files = renamed.files;
  },
  true,
);
