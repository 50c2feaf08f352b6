// What Python sends, and files to download.

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

// A case of which two slides stood side by side comes back as it was: by its slides, map, words and marks.
const laid = new Map();
const withTokens = (of) =>
  [...shared.marks].map(([index, mark]) => {
    const number = of.parts.findIndex((part) => index < part.first + part.n);
    return [of.tokens[number], index - of.parts[number].first, mark];
  });

function recallMarks(known) {
  if (!known) return;
  for (const [token, row, mark] of known.marks) {
    const index = bag.parts[bag.tokens.indexOf(token)].first + row;
    if (!shared.marks.has(index)) shared.marks.set(index, mark);
  }
  if (shared.marks.size) trigger("marks", { marks: [...shared.marks] });
}

function recall() {
  const known = recent.get(named());
  if (second || !known || known.n !== bag.n) return;
  recent.delete(named());
  shared.marks = new Map(known.marks);
  shared.seen = new Set(known.seen);
  if (known.marks.length) trigger("marks", { marks: known.marks });
  markStrip();
}

function openBag() {
  openSlides(); // which may have come with it
  const given = props.bag;
  const before = bag;
  tissue = null;
  if (!given) {
    bag = null;
    kept = [];
    foci = [];
    return showAll();
  }
  const scores = new Float32Array(bytes(given.scores));
  const n = scores.length;
  const rank = new Int32Array(bytes(given.ranks));
  const order = new Int32Array(n);
  rank.forEach((number, index) => {
    order[number - 1] = index;
  });
  let first = 0;
  const parts = given.parts.map(([count, side]) => {
    first += count;
    return { first: first - count, n: count, side };
  });
  const tokens = slides.slice(0, parts.length).map((one) => one.token);
  bag = { n, parts, tokens, given: given.coords, xy: new Int32Array(bytes(given.coords)), scores, rank, order };
  if (before) {
    laid.set(before.tokens.join(), { points, words, marks: withTokens(before) });
    ({ points, words } = laid.get(tokens.join()) || { points: null, words: null }); // of other patches
    if ($(".features select").value === "word") $(".features select").value = "focus";
    moveIndices(before, bag);
    recallMarks(laid.get(tokens.join()));
  }
  openSelection();
  recall();
  restoreRank();
}

function openSelection() {
  if (!bag) return;
  kept = [...new Int32Array(bytes(props.kept || ""))].sort((a, b) => bag.rank[a] - bag.rank[b]);
  unlike = new Set(props.unlike || []);
  const held = new Set(kept);
  const next = [...bag.order].filter((index) => !held.has(index))[kept.length - 1];
  bag.lastNear = next === undefined ? bag.n : bag.rank[next]; // as many as were kept come next by score
  effects = new Map(); // they belong to an answer from other patches
  if (!kept.includes(shared.current) && kept.length) shared.current = -1;
  openFoci();
}

function openUnlike() {
  unlike = new Set(props.unlike || []);
  showAll();
}

function openFoci() {
  foci = (props.foci || []).filter((focus) => focus.indices.every((index) => kept.includes(index)));
  const choice = $(".film select");
  for (const hint of root.querySelectorAll(".about-foci")) {
    hint.hidden = !foci.length;
    hint.textContent =
      "A focus (A, B …) is kept patches of one slide that look alike, wherever on it they lie; those that touch count as more alike.";
  }
  if (foci.length && choice.dataset.chosen !== "yes") choice.value = "focus";
  focusOf = new Map(foci.flatMap((focus, place) => focus.indices.map((index) => [index, place])));
  showAll();
}

function openEvidence() {
  const given = props.evidence;
  effects = new Map(given ? given.indices.map((index, i) => [index, given.effects[i]]) : []);
  for (const focus of foci) focus.effect = given && given.foci ? given.foci[focus.name] : undefined;
  showAll();
  lookAtCited();
}

function openMap() {
  const given = props.map;
  points = given
    ? { xy: new Float32Array(bytes(given.xy)), rows: new Int32Array(bytes(given.rows)), title: given.title, base: null }
    : null;
  $(".features .title").textContent = $(".features .title").title = points ? points.title : "Map of the features";
  drawMap();
}

// The word nearest to each patch; the commonest word first, which has the first colour.
function openWords() {
  const given = props.words;
  words = null;
  if (given && bag) {
    const nearest = new Int32Array(bytes(given.nearest));
    const counts = given.names.map((_, word) => nearest.filter((one) => one === word).length);
    const order = counts.map((_, word) => word).sort((a, b) => counts[b] - counts[a]);
    words = { names: given.names, nearest, cosine: new Float32Array(bytes(given.cosine)), counts, order };
  }
  const choice = $(".features select");
  choice.querySelector("[value=word]").disabled = !words;
  if (!words && choice.value === "word") choice.value = "focus";
  markStrip();
  showInspect();
  drawMap();
}

// Patches that Python found, such as those in an imported region: {indices, where}.
function openMembers() {
  if (bag && props.members) setMembers(props.members.indices, props.members.where);
}

function openFiles() {
  const names = (slide && props.files) || [];
  act("save").hidden = !names.length;
  $(".files").replaceChildren(
    ...names.map(([name, words]) => {
      const link = document.createElement("a");
      link.href = address(name);
      link.download = `sparsewsi-${name}`;
      link.textContent = words;
      return link;
    }),
  );
}

// What the patches are called where they are another selection's than the model's own, or stand beside others; or "".
function openWhatIf() {
  const [name, compared] = [props.whatif || "", props.compared || ""];
  const told = name ? `What if: ${name}` : compared;
  $(".badge").hidden = !told;
  $(".badge > span").textContent = told;
  $(".aside").hidden = !told;
  $(".aside > span").textContent = compared ? "Side by side: a question goes to both" : told;
  $('.badge [data-do="leave"]').textContent = compared ? "Leave" : "Back to the model's patches";
  act("together").hidden = !compared;
  if (fitted) fit();
  room.toggleAttribute("data-whatif", !!told);
  room.toggleAttribute("data-compared", !!compared);
  if (!told && (shared.pinned.size || shared.dropped.size)) {
    shared.pinned.clear();
    shared.dropped.clear();
    markStrip();
    showInspect();
  }
  draw();
}

// How the analysis goes: {phase, place, done, total, seconds_left, coords, side, kept}, or {error}; null when nothing is on its way.
function openWork() {
  const work = props.work;
  const going = work && !work.error;
  $(".work").hidden = !going;
  $(".failed").hidden = !(work && work.error);
  $(".failed").textContent = (work && work.error) || "";
  room.toggleAttribute("data-busy", !!going);
  if (going) {
    const left = work.seconds_left ? `, about ${tellTime(work.seconds_left)} left` : "";
    const count = work.total
      ? ` ${work.done.toLocaleString("en")} of ${work.total.toLocaleString("en")} patches${left}`
      : "";
    $(".work b").textContent = work.place
      ? `Waiting: ${work.place} before this one`
      : `${work.phase[0].toUpperCase()}${work.phase.slice(1)}${count}`;
    const bar = $(".work progress");
    if (work.total) {
      bar.max = work.total;
      bar.value = work.done;
    } else bar.removeAttribute("value");
  }
  if (work && work.coords)
    tissue = { token: work.token, xy: new Int32Array(bytes(work.coords)), side: work.side, kept: [] };
  if (tissue && work && work.kept) tissue.kept = new Int32Array(bytes(work.kept));
  if (!going) tissue = null;
  const provisional = !!tissue && tissue.kept.length > 0;
  root.toggleAttribute("data-provisional", provisional);
  if (provisional) $(".work b").append(" · kept so far, provisional");
  draw();
}

const tellTime = (seconds) =>
  seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`;

// Another part of the page asks for a patch or a focus: {rank, or name and the rank that weighs most, nonce}.
function ask() {
  const to = props.focus;
  if (!to || !bag) return;
  if (to.name) goFocus(to.name, indexOfRank(to.rank));
  else go(indexOfRank(to.rank));
}
