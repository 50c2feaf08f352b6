// The strip of kept patches, and the line about the current one.

const patchAddress = (index, px) =>
  address(`patch/${bag.xy[2 * index]}_${bag.xy[2 * index + 1]}_${bag.side}_${px}.jpg`);

function showAll() {
  $(".below").hidden = !bag;
  $(".colours").hidden = !(bag && layers.heat);
  $(".opacity").hidden = !(bag && layers.heat);
  for (const name of ["boxes", "heat", "region"]) {
    const b = act(name);
    b.disabled = !bag;
  }
  act("boxes").setAttribute("aria-pressed", layers.boxes);
  act("heat").setAttribute("aria-pressed", layers.heat);
  if (!bag) {
    $(".members").hidden = true;
    $(".inspect").hidden = true;
    $(".card").hidden = true;
    return draw();
  }
  const choice = $(".patches select");
  choice.options[1].disabled = !effects.size;
  if (!effects.size) choice.value = "score";
  fillStrip();
  showInspect();
  setMembers([], "");
  showColours();
}

function fillStrip() {
  strip.replaceChildren(
    ...ordered().map((index) => {
      const item = document.createElement("button");
      const effect = effects.get(index);
      item.type = "button";
      item.className = "item";
      item.dataset.index = index;
      item.title = describe(index);
      item.innerHTML = `<img alt="" loading="lazy" draggable="false"><span><b>#${bag.rank[index]}</b> <em></em></span><u></u>`;
      item.querySelector("img").src = patchAddress(index, 168);
      item.querySelector("em").textContent =
        $(".patches select").value === "evidence" && effect !== undefined
          ? times(effect)
          : bag.scores[index].toFixed(2);
      item.onclick = () => go(index);
      item.ondblclick = enlarge;
      return item;
    }),
  );
  markStrip();
}

function markStrip(scroll = false) {
  for (const item of strip.children) {
    const index = +item.dataset.index;
    const now = index === shared.current;
    item.setAttribute("aria-current", now);
    item.setAttribute("aria-label", `${describe(index)}${shared.seen.has(index) ? ", seen" : ""}`);
    item.classList.toggle("dropped", shared.dropped.has(index));
    item.querySelector("u").textContent =
      (shared.seen.has(index) ? "✓" : "") +
      ({ agree: " +", disagree: " −" }[shared.marks.get(index)] || "") +
      (shared.pinned.has(index) ? " ◆" : "") +
      (shared.dropped.has(index) ? " ✕" : "");
    if (now && scroll)
      strip.scrollTo({ top: item.offsetTop - strip.offsetTop - strip.clientHeight / 2 + item.offsetHeight / 2 });
  }
  const seen = kept.filter((index) => shared.seen.has(index)).length;
  if (bag) $(".count").textContent = `${kept.length} of ${bag.n.toLocaleString("en")} patches · ${seen} seen`;
}

function showInspect() {
  const index = shared.current;
  const on = bag && index >= 0;
  $(".inspect").hidden = !on;
  if (!on) return ($(".card").hidden = true);
  $(".inspect .what").textContent = describe(index);
  for (const word of ["agree", "disagree"]) act(word).setAttribute("aria-pressed", shared.marks.get(index) === word);
  act("pin").setAttribute("aria-pressed", shared.pinned.has(index));
  act("drop").setAttribute("aria-pressed", shared.dropped.has(index));
  if (!$(".card").hidden) enlarge();
}

function enlarge() {
  if (!bag || shared.current < 0) return;
  $(".card img").src = patchAddress(shared.current, 448);
  $(".card span").textContent = describe(shared.current);
  $(".card").hidden = false;
}

function showColours() {
  if (!bag || !bag.n) return;
  const lowest = bag.scores[bag.order[bag.n - 1]];
  const highest = bag.scores[bag.order[0]];
  $(".low").textContent = `0 % (${lowest.toFixed(2)})`;
  $(".high").textContent = `100 % (${highest.toFixed(2)})`;
}
