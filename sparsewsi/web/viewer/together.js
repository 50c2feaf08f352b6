// Two viewers of one page side by side: where the reader looks in one, the other follows.
// Of one slide both show the same place; of two slides both move and zoom alike, and a jump takes the magnification only.

let together = true; // else each is moved on its own
let following = false;

const hear = (name, does) =>
  document.addEventListener(name, (event) => {
    if (root.isConnected && slide && view.scale && event.detail.from !== root) does(event.detail);
  });
const tell = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail: { ...detail, from: root } }));

// before: {x, y, scale} of the view until now; jump: to a place of this slide; whole: all of it
function tellLook(before, jump = false, whole = false) {
  if (following || !together) return;
  tell("slide-look", { ...view, before, jump, whole, token: slide.token, times: slide.mpp ? magnification() : 0 });
}

hear("slide-look", (told) => {
  if (!together) return;
  following = true;
  view.turn = told.turn;
  if (told.token === slide.token) moveTo(told.x, told.y, told.scale);
  else if (told.whole) fit();
  else if (!told.jump) {
    const per = told.before.scale / view.scale; // as far on the screen
    moveTo(
      view.x + (told.x - told.before.x) * per,
      view.y + (told.y - told.before.y) * per,
      view.scale * (told.scale / told.before.scale),
    );
  } else if (told.times && slide.mpp) magnify(told.times);
  following = false;
});

// A viewer that comes up asks where the other one is.
hear("slide-where", () => {
  tell("slide-shown", { token: slide.token });
  tellLook(view, true, fitted);
});

hear("slide-layers", (told) => {
  Object.assign(layers, told.layers);
  together = told.together;
  showLayers();
  if (bag) fillStrip();
  draw();
});

// The current patch is one for both where both show the same slide.
hear("slide-patch", (told) => {
  if (!bag || told.token !== slide.token || told.index >= bag.n) return;
  shared.current = told.index;
  if (kept.includes(told.index)) shared.seen.add(told.index);
  markStrip(true);
  showInspect();
  draw();
  drawMap();
});
