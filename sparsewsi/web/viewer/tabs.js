// The column beside the slide: which of its tabs is shown; and the menus that open and close.

const TABS = [...root.querySelectorAll('[role="tab"]')];
const PANELS = { patches: ".panel.patches", map: ".panel.features" };

function showTab(name, focus = false) {
  room.dataset.tab = root.dataset.tab = name;
  for (const tab of TABS) {
    const now = tab.dataset.tab === name;
    tab.setAttribute("aria-selected", now);
    tab.tabIndex = now ? 0 : -1;
    if (now && focus) tab.focus();
  }
  for (const [panel, place] of Object.entries(PANELS)) $(place).hidden = panel !== name;
  showMembers();
  if (name === "map") drawMap();
}

for (const tab of TABS) {
  tab.addEventListener("click", () => showTab(tab.dataset.tab));
  tab.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    showTab(TABS[(TABS.indexOf(tab) + by + TABS.length) % TABS.length].dataset.tab, true);
  });
}

const MENUS = { layers: ".menu.layers", save: ".menu.files", keys: ".menu.help" };

function openMenu(name) {
  if (name === "save") askForName();
  for (const [other, place] of Object.entries(MENUS)) {
    const open = other === name && $(place).hidden;
    $(place).hidden = !open;
    act(other).setAttribute("aria-expanded", open);
  }
  placeMenus();
}

// A report says which case it is of only if that has a name: it is asked for where files are saved.
const nameBox = () => document.querySelector("#called input, #called textarea");
function askForName() {
  const box = nameBox();
  const before = $(".files .unnamed");
  if (before) before.remove();
  if (!box || box.value.trim()) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "unnamed";
  button.textContent = "Name this case first: its report says only a number";
  button.onclick = () => {
    openMenu("");
    box.focus();
  };
  $(".files").prepend(button);
}

// Gradio names a message by the source of its blocks: who hears it read is told its words.
function nameMessages() {
  for (const one of document.querySelectorAll('#chat [aria-label*="\'s message: "]')) {
    const label = one.getAttribute("aria-label");
    const words = one.textContent.replace(/\s+/g, " ").trim();
    if (/[<>]|&#\d/.test(label) && !label.endsWith(words))
      one.setAttribute("aria-label", `${label.split("'s message: ")[0]}'s message: ${words}`);
  }
}
if (!second && room !== root)
  new MutationObserver(() => requestAnimationFrame(nameMessages)).observe(room, {
    subtree: true,
    childList: true,
    attributes: true,
    attributeFilter: ["aria-label"],
  });

// The last question and what its answer begins with stay in sight while the answer grows, until the reader scrolls.
let lastAsked = "";
let atQuestion = false;
function followChat() {
  const pane = document.querySelector("#chat .bubble-wrap");
  const last = pane && [...pane.querySelectorAll(".user-row")].pop();
  if (!last) return;
  const asked = `${pane.querySelectorAll(".user-row").length} ${last.textContent}`;
  if (!pane.dataset.watched)
    for (const by of ["wheel", "touchmove", "pointerdown", "keydown"])
      pane.addEventListener(by, () => (atQuestion = false), { passive: true });
  pane.dataset.watched = "yes";
  if (asked !== lastAsked) atQuestion = true;
  lastAsked = asked;
  if (atQuestion) pane.scrollTop += last.getBoundingClientRect().top - pane.getBoundingClientRect().top - 8;
}
if (!second && room !== root)
  new MutationObserver(() => requestAnimationFrame(followChat)).observe(room, { subtree: true, childList: true });

// A question that is tapped by a key may be scrolled out of sight with the button: the next one is typed.
document.addEventListener("click", (event) => {
  if (second || !root.isConnected || event.detail || !event.target.closest) return;
  const box = document.querySelector("#question textarea");
  if (box && slide && event.target.closest("#examples button")) box.focus({ preventScroll: true });
});

// An open menu stands under its button, also when the window changes.
function placeMenus() {
  for (const [name, place] of Object.entries(MENUS)) {
    const left = Math.min(act(name).offsetLeft + $(".tools").offsetLeft, size[0] - $(place).offsetWidth - 8);
    if (!$(place).hidden) $(place).style.left = `${Math.max(8, left)}px`;
  }
}

// The panel of slides to open, which is a part of the page around the viewer.
const opener = () => document.querySelector("#open-menu");
function showSources(open = !room.hasAttribute("data-sources")) {
  room.toggleAttribute("data-sources", open);
  const button = opener();
  if (button) button.setAttribute("aria-expanded", open);
}
// What could not be opened is told in that panel, which opens for it.
document.addEventListener("slide-refused", () => {
  if (!second && root.isConnected) showSources(true);
});
document.addEventListener("click", (event) => {
  if (second || !root.isConnected || !event.target.closest) return;
  const button = event.target.closest("#open-menu, #add-slide");
  if (button) {
    const add = button.id === "add-slide";
    addToCase(add);
    return showSources(add || undefined);
  }
  if (slide && room.hasAttribute("data-sources") && !event.target.closest("#sources")) showSources(false);
  if (!event.target.closest(".tools, .menu")) openMenu("");
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && slide && !second && root.isConnected) showSources(false);
});
