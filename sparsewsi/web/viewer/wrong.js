// The sentence about a slide that could not be opened: the panel that it stands in opens for it.
"use strict";

watch("value", () => {
  if (!props.value) return;
  document.dispatchEvent(new Event("slide-refused"));
  element.scrollIntoView({ block: "nearest" });
});
