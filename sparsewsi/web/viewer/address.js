// The view in the page's address, and in the journal that Python writes.

const journal = [];
let restored = false; // whether the page shows what its address says

// What is looked at, for the page that takes the place of this one when it is loaded anew, in this tab alone.
const LEFT = "sparsewsi-left";
const previous = second ? null : takeLeft();

function takeLeft() {
  try {
    const left = JSON.parse(sessionStorage.getItem(LEFT));
    sessionStorage.removeItem(LEFT);
    const [entry] = performance.getEntriesByType("navigation");
    return left && entry && ["reload", "back_forward"].includes(entry.type) ? left : null;
  } catch {
    return null; // a frame without storage
  }
}
if (previous) room.dataset.left = previous.token;

window.addEventListener("pagehide", () => {
  if (second || !root.isConnected || !slide) return;
  const { x, y, scale, turn } = view;
  const [marks, seen] = [[...shared.marks], [...shared.seen]];
  const looked = { x, y, scale, turn, fitted, number: shownNumber(), current: shared.current, heat: layers.heat };
  const left = { token: slides[0].token, names: slides.map((one) => one.name), n: bag && bag.n, looked, marks, seen };
  try {
    sessionStorage.setItem(LEFT, JSON.stringify(left));
  } catch {
    /* some frames forbid it */
  }
});

// Whether the slides that came are those of the page before, which is then shown as it was.
const isBefore = () => previous && !restored && previous.names.join() === slides.map((one) => one.name).join();

function lookAsBefore() {
  const { x, y, scale, turn, number, heat } = previous.looked;
  showSlide(number);
  view.turn = turn;
  if (!previous.looked.fitted) moveTo(x, y, scale);
  layers.heat = heat;
}

let settle = 0;
let sending = 0;
let told = "";

// Once the view is at rest: into the address, and into the journal.
function remember() {
  clearTimeout(settle);
  settle = setTimeout(() => {
    if (!slide || second || !root.isConnected) return;
    const query = new URLSearchParams(location.search);
    const now = { x: Math.round(view.x), y: Math.round(view.y), s: view.scale.toPrecision(4) };
    for (const [key, value] of Object.entries(now)) query.set(key, value);
    if (bag && shared.current >= 0) query.set("patch", bag.rank[shared.current]);
    else if (bag) query.delete("patch");
    if (layers.heat) query.set("scores", 1);
    else query.delete("scores");
    if (slides.length > 1) query.set("on", shownNumber() + 1);
    else query.delete("on");
    const names = slides.map((one) => one.source);
    if (names.every(Boolean)) query.set("slide", names.join());
    else query.delete("slide");
    try {
      history.replaceState(history.state, "", `${location.pathname}?${query}`);
    } catch {
      /* some frames forbid it */
    }
    const entry = {
      x: now.x,
      y: now.y,
      magnification: slide.mpp ? +magnification().toFixed(2) : null,
      rank: bag && shared.current >= 0 ? bag.rank[shared.current] : null,
    };
    if (JSON.stringify(entry) !== told) {
      told = JSON.stringify(entry);
      journal.push(entry);
      tellSoon();
    }
  }, 700);
}

// Many views in one call, never while somebody is looking around.
function tellSoon() {
  if (!sending)
    sending = setTimeout(() => {
      sending = 0;
      if (root.isConnected && journal.length) trigger("journal", { views: journal.splice(0, 200) });
    }, 10000);
}

// The first slide of a page is shown as its address says.
function restore() {
  if (isBefore()) return lookAsBefore();
  const query = new URLSearchParams(location.search);
  if (restored || second || query.get("slide") !== slides.map((one) => one.source).join()) {
    restored = true;
    return;
  }
  const [x, y, s, on] = ["x", "y", "s", "on"].map((key) => parseFloat(query.get(key)));
  if (on > 1) showSlide(on - 1);
  if ([x, y, s].every(Number.isFinite) && s > 0) moveTo(x, y, s);
  layers.heat = query.get("scores") === "1";
}

function restoreRank() {
  if (restored || bag.parts.length < slides.length) return; // the others are on their way
  const again = isBefore();
  restored = true;
  if (again && previous.n === bag.n) {
    shared.marks = new Map(previous.marks);
    shared.seen = new Set(previous.seen);
    if (previous.marks.length) trigger("marks", { marks: previous.marks });
    go(previous.looked.current, false);
    return markStrip();
  }
  const rank = parseInt(new URLSearchParams(location.search).get("patch"), 10);
  if (rank >= 1) go(indexOfRank(rank), false);
}
