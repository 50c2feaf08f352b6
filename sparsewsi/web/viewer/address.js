// The view in the page's address, and in the journal that Python writes.

const journal = [];
let restored = false; // whether the page shows what its address says

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
    if (slide.source && slides.length === 1) query.set("slide", slide.source);
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
  const query = new URLSearchParams(location.search);
  if (restored || second || !slide.source || query.get("slide") !== slide.source) {
    restored = true;
    return;
  }
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
