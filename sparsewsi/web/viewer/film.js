// The slides of a case: which patch is of which, the film of them at the side of the stage, from one to another.

const SLIDE_COLOURS = ["#2a9fb0", "#e15a6b", "#9b72cf", "#e0912f", "#4caf50", "#5b8def", "#c45fa8", "#8a9aa3"];

const partAt = (number) => (bag && bag.parts[number]) || { first: 0, n: 0, side: 1 };
const shownNumber = () => slides.indexOf(slide);
const numberOf = (index) =>
  Math.max(
    0,
    bag.parts.findIndex((part) => index < part.first + part.n),
  );
const slideOf = (index) => slides[numberOf(index)] || slide;
const sideOf = (index) => partAt(numberOf(index)).side;
const isHere = (index) => numberOf(index) === shownNumber();
const sayWhich = (number) => (slides.length > 1 ? `Slide ${number + 1}` : "");

// Patches [from, to) are those of the slide that is shown.
function shownRows() {
  const part = partAt(shownNumber());
  return [part.first, part.first + part.n];
}

function showSlide(number) {
  const next = slides[number];
  if (!next || next === slide) return;
  if (slide) slide.view = { ...view, fitted };
  slide = next;
  tiles.clear();
  wanted = [];
  ruler = band = null;
  setMode("");
  buildMagnifications();
  view.turn = slide.view ? slide.view.turn : 0;
  tell("slide-shown", { token: slide.token });
  if (slide.view && !slide.view.fitted) moveTo(slide.view.x, slide.view.y, slide.view.scale, true);
  else fit();
  markSlides();
  if (!second) trigger("shown", { number });
  say(`${sayWhich(number)}, ${slide.name}`);
}

// The prop "slides". Those that the viewer has already stay as they are; of ones that were added the first is shown.
function openSlides() {
  const given = props.slides || [];
  const before = slides;
  slides = given.map((one) => before.find((other) => other.token === one.token) || one);
  nav.hidden = $(".tools").hidden = $(".corner").hidden = !slides.length;
  room.toggleAttribute("data-slide", !!slides.length);
  room.toggleAttribute("data-slides", slides.length > 1);
  const added = slides.findIndex((one) => !before.includes(one));
  const same = slides.some((one) => before.includes(one));
  if (!same && bag && before.length)
    recent.set(before.map((one) => one.name).join(), { n: bag.n, marks: [...shared.marks], seen: [...shared.seen] });
  if (same || !slides.length) {
    fillSlides();
    if (!slides.length) slide = null;
    else if (added >= 0) {
      showSources(false);
      showSlide(added);
    } else if (!slides.includes(slide)) showSlide(0);
    return draw();
  }
  slide = slides[0];
  tiles.clear();
  wanted = [];
  forget();
  layers.heat = false;
  view.turn = 0;
  if (!second) showSources(false);
  buildMagnifications();
  fit();
  fillSlides();
  showAll();
  restore();
  if (second) tell("slide-where");
}

// Side by side, both viewers show the same slide.
hear("slide-shown", (told) => showSlide(slides.findIndex((one) => one.token === told.token)));

// A patch keeps what the reader did with it when its case gets another slide, or loses one: its index moves.
function moveIndices(from, to) {
  const starts = new Map(to.tokens.map((token, number) => [token, to.parts[number].first]));
  const move = (index) => {
    const number = from.parts.findIndex((part) => index < part.first + part.n);
    const start = number < 0 ? undefined : starts.get(from.tokens[number]);
    return start === undefined ? -1 : start + index - from.parts[number].first;
  };
  const known = (pairs) => pairs.filter(([index]) => index >= 0);
  shared.seen = new Set([...shared.seen].map(move).filter((index) => index >= 0));
  shared.marks = new Map(known([...shared.marks].map(([index, mark]) => [move(index), mark])));
  shared.pinned = new Set();
  shared.dropped = new Set();
  shared.members = new Set();
  shared.current = shared.current < 0 ? -1 : move(shared.current);
}

function fillSlides() {
  const film = $(".slides");
  film.hidden = slides.length < 2;
  film.replaceChildren(
    ...slides.map((one, number) => {
      const cell = document.createElement("div");
      cell.className = "one";
      cell.innerHTML = `<button type="button" class="look"><img alt="" draggable="false"><b></b><em></em></button><button type="button" class="out" title="Take it out of the case">×</button>`;
      const level = Math.max(0, Math.ceil(Math.log2(Math.max(...one.size) / one.tile)));
      cell.querySelector("img").src = address(`${level}/0_0.jpg`, one);
      cell.querySelector("b").textContent = `Slide ${number + 1}`;
      cell.querySelector(".look").onclick = () => showSlide(number);
      const out = cell.querySelector(".out");
      out.setAttribute("aria-label", `Take slide ${number + 1} out of the case`);
      out.onclick = () => trigger("remove", { number });
      return cell;
    }),
    compareButton(),
  );
  markSlides();
}

// Two slides side by side: the one that is shown and the next.
function compareButton() {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "compare";
  button.textContent = "Side by side";
  button.title = "This slide and the next beside each other, one question to both";
  button.onclick = () => trigger("compare", { number: shownNumber() });
  return button;
}

// Which slide is shown, and how many patches are kept of each.
function markSlides() {
  const several = slides.length > 1;
  for (const choice of [$(".film select"), $(".features select")])
    choice.querySelector('[value="slide"]').disabled = choice.querySelector('[value="slide"]').hidden = !several;
  $(".slides .compare").hidden = !bag || bag.parts.length < 2;
  $(".slides")
    .querySelectorAll(".one")
    .forEach((cell, number) => {
      const part = bag && bag.parts[number];
      const held = part ? kept.filter((index) => numberOf(index) === number).length : 0;
      const told = part ? `${held} of ${part.n.toLocaleString("en")}` : "not yet";
      const look = cell.querySelector(".look");
      look.setAttribute("aria-current", slides[number] === slide);
      look.querySelector("em").textContent = told;
      look.title = `${slides[number].name}: ${part ? `${told} patches kept` : "not analysed yet"}`;
      look.setAttribute("aria-label", `Slide ${number + 1}, ${look.title}`);
      cell.querySelector(".out").hidden = !part || bag.parts.length < 2;
      cell.style.setProperty("--slide", slideInk(number));
    });
  root.dataset.slide = slides.length ? shownNumber() + 1 : "";
}

const slideInk = (number) => SLIDE_COLOURS[number % SLIDE_COLOURS.length];

// What is opened next is added to this case, or takes its place: the box in the panel of slides to open.
function addToCase(add) {
  const box = document.querySelector("#beside input");
  if (box && box.checked !== add) box.click();
}
