// Start.

new ResizeObserver(() => {
  const before = size[0];
  size = [stage.clientWidth, stage.clientHeight];
  if (slide && size[0] && (!before || fitted)) fit();
  else draw();
  if (second && slide && size[0] && !before) tell("slide-where");
  drawMap();
  placeMenus();
}).observe(stage);
new ResizeObserver(drawMap).observe(map);
new MutationObserver(() => {
  drawMap();
  draw();
}).observe(document.body, { attributes: true, attributeFilter: ["class"] }); // dark and light
size = [stage.clientWidth, stage.clientHeight];

watch("slides", openSlides);
watch("bag", openBag);
watch("kept", openSelection);
watch("unlike", openUnlike);
watch("foci", openFoci);
watch("evidence", openEvidence);
watch("map", openMap);
watch("words", openWords);
watch("members", openMembers);
watch("files", openFiles);
watch("focus", ask);
watch("whatif", openWhatIf);
watch("compared", openWhatIf);
watch("work", openWork);
watch("picks", openPicks);
showTab("ask");
if (!second) showSources(!props.slides);
if (props.slides) openSlides();
if (props.bag) openBag();
if (props.map) openMap();
if (props.words) openWords();
if (props.files) openFiles();
if (props.evidence) openEvidence();
if (props.compared) openWhatIf();
