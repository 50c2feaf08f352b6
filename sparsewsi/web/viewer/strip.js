// The film of kept patches under the slide, the sheet of them in the column, and the current one.

const patchAddress = (index, px) =>
  address(`patch/${bag.xy[2 * index]}_${bag.xy[2 * index + 1]}_${sideOf(index)}_${px}.jpg`, slideOf(index));
const focusName = (index) => (focusOf.has(index) ? foci[focusOf.get(index)].name : "");

function showAll() {
  if (bag && props.bag && props.bag.coords !== bag.given) return openBag(); // which has come, but was not told of yet
  $(".film").hidden = $(".sheet").hidden = !bag;
  markSlides();
  $(".patches > .hint").hidden = !!bag;
  showLayers();
  act("region").disabled = !bag;
  for (const name of ["boxes", "foci", "heat"]) act(name).disabled = !bag;
  if (!bag) {
    strip.replaceChildren();
    $(".sheet").replaceChildren();
    $(".members").hidden = $(".inspect").hidden = $(".card").hidden = true;
    linkPictures();
    drawMap();
    return draw();
  }
  const choice = $(".film select");
  choice.querySelector('[value="focus"]').disabled = !foci.length;
  choice.querySelector('[value="evidence"]').disabled = !effects.size;
  if (choice.selectedOptions[0].disabled) choice.value = foci.length ? "focus" : "score";
  fillStrip();
  showInspect();
  setMembers([], "");
  $(".close").textContent = `next ${kept.length} by score`;
  linkPictures();
  points && (points.stamp = "");
  drawMap();
}

// What a patch that is hardly tissue shows instead: it may be kept and cited all the same.
function tellBlank(index) {
  const [x, y] = [bag.xy[2 * index], bag.xy[2 * index + 1]];
  const side = sideOf(index);
  const [width, height] = slideOf(index).size;
  const across = Math.max(0, Math.min(x + side, width) - Math.max(x, 0));
  const down = Math.max(0, Math.min(y + side, height) - Math.max(y, 0));
  if (across * down < (side * side) / 2) return "mostly beyond the scan";
  return blanks.get(patchAddress(index, 168)) > 0.5 ? "mostly white: glass, a gap or fat" : "";
}

// How much of a patch is white, from its picture once that has come.
function lookAt(picture, index) {
  const where = patchAddress(index, 168);
  if (blanks.has(where)) return;
  const px = 32;
  const pen = Object.assign(document.createElement("canvas"), { width: px, height: px }).getContext("2d");
  pen.drawImage(picture, 0, 0, px, px);
  let data;
  try {
    data = pen.getImageData(0, 0, px, px).data;
  } catch {
    return; // a frame whose pictures are another origin's
  }
  let white = 0;
  for (let i = 0; i < data.length; i += 4) if (Math.min(data[i], data[i + 1], data[i + 2]) > 220) white += 1;
  blanks.set(where, white / (px * px));
  if (!tellBlank(index)) return;
  for (const item of element.querySelectorAll(`[data-index="${index}"]`)) nameItem(item, index);
  linkPictures();
  if (index === shared.current) showInspect();
}

function nameItem(item, index) {
  item.title = describe(index);
  item.querySelector("small").textContent = tellBlank(index);
}

// Pictures of what is cited are looked at, too, wherever in the film their patches are.
function lookAtCited() {
  const most = [...effects.keys()].sort((a, b) => effects.get(b) - effects.get(a)).slice(0, 3);
  const weightiest = [...foci].sort((a, b) => (b.effect ?? 0) - (a.effect ?? 0)).slice(0, 2);
  for (const index of effects.size ? [...most, ...weightiest.map(heaviest)] : []) {
    const picture = new Image();
    const where = patchAddress(index, 168);
    picture.onload = () => {
      if (bag && index < bag.n && where === patchAddress(index, 168)) lookAt(picture, index);
    };
    picture.src = where;
  }
}

// A citation of a patch is shown as its picture, wherever on the page it stands: a style, as the chat may redraw itself.
const pictures = document.createElement("style");
document.head.append(pictures);
const pictured = new Set();
function linkPictures() {
  if (!bag) pictured.clear();
  for (const index of kept) pictured.add(index); // also those of the model's own beside a what-if
  const within = second ? ".other " : ""; // of a comparison's other column
  const lines = [...pictured].map((index) => {
    const rank = bag.rank[index];
    const places = [`${within}a[href$="#patch-${rank}"]`, `${within}a[href*="#focus-"][href$="-${rank}"]`];
    const blank = tellBlank(index);
    const told = blank && `${places.map((place) => `${place}::before`)} { content: "${blank}"; }`;
    return `${places} { background-image: url("${patchAddress(index, 168)}"); } ${told}`;
  });
  pictures.textContent = lines.join("\n");
}

function makeItem(index, kind) {
  const item = document.createElement("button");
  const effect = effects.get(index);
  item.type = "button";
  item.className = kind;
  item.dataset.index = index;
  item.innerHTML = `<img alt="" loading="lazy" draggable="false"><small></small><span><b>#${bag.rank[index]}</b> <em></em></span><u></u>`;
  nameItem(item, index);
  const picture = item.querySelector("img");
  picture.onload = () => item.isConnected && lookAt(picture, index);
  picture.src = patchAddress(index, 168);
  if (slides.length > 1) {
    const tag = document.createElement("i");
    tag.textContent = numberOf(index) + 1;
    tag.style.setProperty("--slide", slideInk(numberOf(index)));
    item.querySelector("span").before(tag);
  }
  const long = bag.rank[index] > 999;
  item.classList.toggle("long", long);
  item.querySelector("em").textContent =
    $(".film select").value === "evidence" && effect !== undefined
      ? tellShort(effect)
      : bag.scores[index].toFixed(long ? 1 : 2);
  if (focusOf.has(index)) item.style.setProperty("--focus", inkOf(index));
  item.onclick = () => go(index);
  item.ondblclick = enlarge;
  return item;
}

const tellShort = (effect) => (effect >= WORTH ? times(effect) : effect > -WORTH ? "–" : "against");

function fillStrip() {
  const list = ordered();
  const by = $(".film select").value;
  const grouped = (by === "focus" && foci.length) || by === "slide";
  const film = [];
  const sheet = [];
  let before = "";
  for (const index of list) {
    const name = by === "slide" ? sayWhich(numberOf(index)) : focusName(index);
    if (grouped && name !== before) {
      for (const [place, kind] of [
        [film, "button"],
        [sheet, "h3"],
      ]) {
        const head = document.createElement(kind);
        head.className = "head";
        const told = by === "slide" ? tellSlide(numberOf(index)) : tellFocus(name);
        head.textContent = kind === "h3" ? told : by === "slide" ? numberOf(index) + 1 : name || "–";
        head.title = told;
        if (name) head.style.setProperty("--focus", by === "slide" ? slideInk(numberOf(index)) : inkOf(index));
        if (kind === "button") {
          head.type = "button";
          head.setAttribute("aria-label", told);
          head.onclick = () => (by === "slide" ? showSlide(numberOf(index)) : goFocus(name));
        }
        place.push(head);
      }
      before = name;
    }
    film.push(makeItem(index, "item"));
    sheet.push(makeItem(index, "cell"));
  }
  strip.replaceChildren(...film);
  $(".sheet").replaceChildren(...sheet);
  markStrip();
}

function tellSlide(number) {
  const held = kept.filter((index) => numberOf(index) === number).length;
  return `Slide ${number + 1} (${slides[number].name}): ${held} of ${partAt(number).n.toLocaleString("en")} patches`;
}

function tellFocus(name) {
  const focus = foci.find((one) => one.name === name);
  if (!focus) return "On its own";
  const many = `${focus.indices.length} patch${focus.indices.length === 1 ? "" : "es"}`;
  const weight =
    focus.effect === undefined || focus.effect === null ? "" : `: without it the answer ${tellEffect(focus.effect)}`;
  const on = sayWhich(numberOf(focus.indices[0])).toLowerCase();
  return `Focus ${name}${on && ` on ${on}`}, ${many}${weight}`;
}

function markStrip(scroll = false) {
  for (const item of [...strip.querySelectorAll(".item"), ...$(".sheet").querySelectorAll(".cell")]) {
    const index = +item.dataset.index;
    const now = index === shared.current;
    item.title = describe(index);
    item.setAttribute("aria-current", now);
    item.classList.toggle("dropped", shared.dropped.has(index));
    item.querySelector("u").textContent =
      (shared.seen.has(index) ? "✓" : "") +
      ({ agree: " +", disagree: " −" }[shared.marks.get(index)] || "") +
      (shared.pinned.has(index) ? " ◆" : "") +
      (shared.dropped.has(index) ? " ✕" : "");
    item.setAttribute("aria-label", `${item.textContent.trim().replace(/\s+/g, " ")} · ${describe(index)}`);
    if (now && scroll && item.className.includes("item"))
      strip.scrollTo({ left: item.offsetLeft - strip.offsetLeft - strip.clientWidth / 2 + item.offsetWidth / 2 });
  }
  if (!bag) return;
  const [first] = ordered();
  const stop = kept.includes(shared.current) ? shared.current : first; // one stop of Tab; arrows go on from there
  for (const item of strip.querySelectorAll(".item")) item.tabIndex = +item.dataset.index === stop ? 0 : -1;
  const other = kept.filter((index) => unlike.has(index)).length;
  const why = other ? `${other} as unlike the others\n` : "";
  const these = kept.filter((index) => shared.seen.has(index)).length;
  const seen = shared.seen.size > these ? `${these} seen, ${shared.seen.size} in all` : `${these} seen`; // of others, too
  $(".count").textContent = `${kept.length} of ${bag.n.toLocaleString("en")} patches\n${why}${seen}`;
  $(".count").title = tellUnlike(other);
  $(".unlike").hidden = !other;
  $(".unlike").textContent = tellUnlike(other);
}

const tellUnlike = (many) =>
  many
    ? `${many} of these ${kept.length} patches ${many === 1 ? "was" : "were"} kept for being unlike the others, not for ${many === 1 ? "its" : "their"} score (maximal marginal relevance).`
    : "";

function showInspect() {
  const index = shared.current;
  const on = bag && index >= 0;
  $(".inspect").hidden = !on;
  if (!on) return ($(".card").hidden = true);
  $(".inspect .what").textContent = describe(index);
  $(".inspect img").src = patchAddress(index, 448);
  for (const word of ["agree", "disagree"]) act(word).setAttribute("aria-pressed", shared.marks.get(index) === word);
  act("pin").setAttribute("aria-pressed", shared.pinned.has(index));
  act("drop").setAttribute("aria-pressed", shared.dropped.has(index));
  if (!$(".card").hidden) enlarge();
}

function enlarge() {
  if (!bag || shared.current < 0) return;
  $(".card img").src = patchAddress(shared.current, 448);
  $(".card > span").textContent = describe(shared.current);
  $(".card").hidden = false;
}
