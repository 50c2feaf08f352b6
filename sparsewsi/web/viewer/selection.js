// One selection shared by slide, strip, map and citations.

const indexOfRank = (rank) => (bag && rank >= 1 && rank <= bag.n ? bag.order[rank - 1] : -1);
const centre = (index) => [bag.xy[2 * index] + sideOf(index) / 2, bag.xy[2 * index + 1] + sideOf(index) / 2];

function go(index, move = true) {
  if (!bag || !(index >= 0 && index < bag.n)) return;
  shared.current = index;
  if (kept.includes(index)) shared.seen.add(index);
  showSlide(numberOf(index));
  if (move) {
    const side = sideOf(index);
    const onScreen = side * view.scale;
    const room = Math.min(...size);
    const scale = onScreen > 0.15 * room && onScreen < 0.9 * room ? view.scale : (0.42 * room) / side;
    moveTo(...centre(index), scale, true);
  }
  tell("slide-patch", { index, token: slide.token });
  markStrip(true);
  showInspect();
  draw();
  drawMap();
  remember();
  say(describe(index));
}

function step(by) {
  const list = ordered();
  if (!list.length) return;
  const at = list.indexOf(shared.current);
  go(list[at < 0 ? (by > 0 ? 0 : list.length - 1) : (at + by + list.length) % list.length]);
}

const LOOKED_AT = 64; // px of the screen: a patch that is smaller was not seen

// Of a focus the patch that the answer rests on most; before there is one, that of the best score.
const heaviest = (focus) =>
  [...focus.indices].sort(
    (a, b) =>
      (effects.get(b) ?? Number.MIN_SAFE_INTEGER) - (effects.get(a) ?? Number.MIN_SAFE_INTEGER) ||
      bag.rank[a] - bag.rank[b],
  )[0];

// index: of its patch that is meant, as the answer in which it is cited rests on that most
function goFocus(name, index = -1) {
  const focus = foci.find((one) => one.name === name);
  if (!focus) return;
  showSlide(numberOf(focus.indices[0])); // a focus lies on one slide
  const side = sideOf(focus.indices[0]);
  const middles = focus.indices.map(centre);
  const [xs, ys] = [middles.map((m) => m[0]), middles.map((m) => m[1])];
  const [left, right] = [Math.min(...xs) - side, Math.max(...xs) + side];
  const [upper, lower] = [Math.min(...ys) - side, Math.max(...ys) + side];
  shared.current = focus.indices.includes(index) ? index : heaviest(focus);
  const [w, h] = view.turn % 2 ? [size[1], size[0]] : size;
  const scale = 0.8 * Math.min(w / (right - left), h / (lower - upper));
  for (const index of side * scale >= LOOKED_AT ? focus.indices : []) shared.seen.add(index);
  moveTo((left + right) / 2, (upper + lower) / 2, scale, true);
  markStrip(true);
  showInspect();
  drawMap();
  say(tellFocus(name));
}

const ordered = () => {
  const by = $(".film select").value;
  const last = foci.length;
  if (by === "evidence" && effects.size) return [...kept].sort((a, b) => (effects.get(b) ?? 0) - (effects.get(a) ?? 0));
  if (by === "slide") return [...kept].sort((a, b) => numberOf(a) - numberOf(b));
  if (by === "focus" && last) return [...kept].sort((a, b) => (focusOf.get(a) ?? last) - (focusOf.get(b) ?? last));
  return kept;
};

function describe(index) {
  const effect = effects.get(index);
  const mpp = slideOf(index).mpp;
  const um = mpp ? centre(index).map((v) => Math.round(v * mpp).toLocaleString("en")) : null;
  return [
    `#${bag.rank[index]}`,
    sayWhich(numberOf(index)).toLowerCase(),
    focusName(index) ? `focus ${focusName(index)}` : "",
    `score ${bag.scores[index].toFixed(2)} (${bag.rank[index].toLocaleString("en")} of ${bag.n.toLocaleString("en")})`,
    unlike.has(index) && kept.includes(index) ? "kept for being unlike the others, not for its score" : "",
    tellBlank(index),
    words ? tellWord(index) : "",
    effect === undefined ? "" : `without it the answer ${tellEffect(effect)}`,
    um ? `at ${um[0]}, ${um[1]} µm` : "",
    kept.includes(index) ? "" : "left out",
  ]
    .filter(Boolean)
    .join(" · ");
}

const tellWord = (index) =>
  words.nearest[index] < 0
    ? "near no word"
    : `nearest word ${words.names[words.nearest[index]]} (${words.cosine[index].toFixed(2)}; a guess, often wrong)`;
const WORTH = Math.log(1.05); // nats, from which an effect is worth a number: chat.py has the same
const tellEffect = (effect) =>
  effect >= WORTH ? `is ${times(effect)} less likely` : effect > -WORTH ? "hardly changes" : "is likelier";
const times = (effect) => (effect > Math.log(1000) ? "> 1000×" : `${+Math.exp(effect).toPrecision(3)}×`); // less likely without it
function say(text) {
  $(".said").textContent = text;
}

function toggle(set, other, index) {
  if (set.has(index)) set.delete(index);
  else {
    set.add(index);
    other.delete(index);
  }
}

function tellPicks() {
  act("unpick").hidden = !before;
  trigger("picks", { pinned: [...shared.pinned], dropped: [...shared.dropped] });
  markStrip();
  showInspect();
  draw();
}

let before = null; // picks as they were before all patches of a list were pinned or dropped

const keepPicks = () => {
  const any = shared.pinned.size || shared.dropped.size;
  before = any ? { pinned: new Set(shared.pinned), dropped: new Set(shared.dropped) } : null;
};

function pickAll(set, other) {
  before = { pinned: new Set(shared.pinned), dropped: new Set(shared.dropped) };
  for (const index of shared.members) {
    set.add(index);
    other.delete(index);
  }
  tellPicks();
}

function unpick() {
  if (!before) return;
  Object.assign(shared, before);
  before = null;
  tellPicks();
}

// As Python says: none any more, or those of before where there were too many.
function openPicks() {
  const { pinned, dropped, refused } = props.picks || { pinned: [], dropped: [] };
  if (refused) before = null;
  else keepPicks();
  shared.pinned = new Set(pinned);
  shared.dropped = new Set(dropped);
  tellPicks();
}

let telling = 0;

function mark(word) {
  const index = shared.current;
  if (index < 0) return;
  if (shared.marks.get(index) === word) shared.marks.delete(index);
  else shared.marks.set(index, word);
  clearTimeout(telling);
  telling = setTimeout(() => trigger("marks", { marks: [...shared.marks] }), 200); // all at once, in their order
  journal.push({ mark: shared.marks.get(index) || "none", rank: bag.rank[index] });
  markStrip();
  showInspect();
  tellSoon();
}
