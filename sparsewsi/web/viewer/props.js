// What Python sends, and files to download.

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

function openSlide() {
  const fresh = props.slide && (!slide || slide.token !== props.slide.token);
  slide = props.slide || null;
  $(".empty").hidden = !!slide;
  nav.hidden = !slide;
  if (!fresh) return draw();
  tiles.clear();
  wanted = [];
  bag = points = null;
  kept = [];
  effects = new Map();
  Object.assign(shared, {
    current: -1,
    members: new Set(),
    seen: new Set(),
    marks: new Map(),
    pinned: new Set(),
    dropped: new Set(),
  });
  layers.heat = false;
  buildMagnifications();
  fit();
  showAll();
  restore();
}

function openBag() {
  const given = props.bag;
  if (!given) {
    bag = null;
    kept = [];
    return showAll();
  }
  const scores = new Float32Array(bytes(given.scores));
  const n = scores.length;
  const rank = new Int32Array(bytes(given.ranks));
  const order = new Int32Array(n);
  const share = new Float32Array(n);
  rank.forEach((number, index) => {
    order[number - 1] = index;
    share[index] = n > 1 ? 1 - (number - 1) / (n - 1) : 1;
  });
  bag = { n, side: given.side, xy: new Int32Array(bytes(given.coords)), scores, rank, order, share, picture: null };
  openSelection();
  restoreRank();
}

function openSelection() {
  if (!bag) return;
  kept = [...new Int32Array(bytes(props.kept || ""))].sort((a, b) => bag.rank[a] - bag.rank[b]);
  effects = new Map(); // they belong to an answer from other patches
  if (!kept.includes(shared.current) && kept.length) shared.current = -1;
  showAll();
}

function openEvidence() {
  const given = props.evidence;
  effects = new Map(given ? given.indices.map((index, i) => [index, given.effects[i]]) : []);
  showAll();
}

function openMap() {
  const given = props.map;
  points = given
    ? { xy: new Float32Array(bytes(given.xy)), rows: new Int32Array(bytes(given.rows)), title: given.title, base: null }
    : null;
  drawMap();
}

// Patches that Python found, such as those in an imported region: {indices, where}.
function openMembers() {
  if (bag && props.members) setMembers(props.members.indices, props.members.where);
}

function openFiles() {
  const names = (slide && props.files) || [];
  $(".files").hidden = !names.length;
  $(".files").replaceChildren(
    ...names.flatMap(([name, words], i) => {
      const link = document.createElement("a");
      link.href = address(name);
      link.download = `sparsewsi-${name}`;
      link.textContent = words;
      return [document.createTextNode(i ? " · " : "Download: "), link];
    }),
  );
}

// Another part of the page asks for a patch: {rank, nonce}.
function ask() {
  if (props.focus) go(indexOfRank(props.focus.rank));
}
