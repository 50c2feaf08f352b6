// The cards of the empty page, files that are dropped on the page, and the tour.
"use strict";

const STEPS = [
  ["#view .stage", "The slide. Drag to move, wheel to zoom; the boxes are the 32 patches that were kept."],
  ["#view .film", "The same patches as a film, those that belong together side by side. Click one to go there."],
  ["#ask", "Ask here. The answer shows the patches it rests on; click one to see it on the slide."],
  ["#view .tabs", "Patches to read one by one, the map of all patches, and what if other patches had been kept."],
];

element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-choose]");
  if (card) trigger("choose", { name: card.dataset.choose });
  if (event.target.closest("[data-tour]")) {
    const card = !document.querySelector("#view .item") && element.querySelector("[data-choose]");
    if (card) trigger("choose", { name: card.dataset.choose }); // what the tour shows
    tour();
  }
});

function tour() {
  const note = document.createElement("dialog");
  note.className = "tour";
  note.setAttribute("aria-label", "A short tour");
  let at = 0;
  const show = () => {
    document.querySelectorAll(".toured").forEach((part) => part.classList.remove("toured"));
    if (at >= STEPS.length) return note.close();
    const [place, words] = STEPS[at];
    document.querySelector(place)?.classList.add("toured");
    note.innerHTML = `<p>${words}</p><span>${at + 1} of ${STEPS.length}</span>
      <button type="button" class="skip">Skip</button><button type="button" class="next">${at + 1 < STEPS.length ? "Next" : "Done"}</button>`;
    note.querySelector(".skip").onclick = () => note.close();
    note.querySelector(".next").onclick = () => {
      at += 1;
      show();
    };
    note.querySelector(".next").focus();
  };
  note.addEventListener("close", () => {
    document.querySelectorAll(".toured").forEach((part) => part.classList.remove("toured"));
    note.remove();
  });
  document.body.append(note);
  note.show();
  show();
}

// A slide that is dropped anywhere on the page goes the way of one that was chosen: its name does not leave the browser.
const inPage = () => element.isConnected;
const held = (event) => inPage() && event.dataTransfer && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!held(event)) return;
  event.preventDefault();
  document.querySelector("#room")?.setAttribute("data-dropping", "");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.querySelector("#room")?.removeAttribute("data-dropping");
});
document.addEventListener(
  "drop",
  (event) => {
    if (!held(event)) return;
    event.preventDefault();
    event.stopPropagation();
    document.querySelector("#room")?.removeAttribute("data-dropping");
    const input = [...document.querySelectorAll("input[type=file]")].find((one) => !/geojson/.test(one.accept));
    if (!input || !event.dataTransfer.files.length) return;
    const dropped = new DataTransfer();
    for (const file of event.dataTransfer.files) dropped.items.add(file);
    input.files = dropped.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  },
  true,
);
