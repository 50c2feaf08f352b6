// The slide viewer's state. The scripts of this folder are joined in the order that viewer.py names and run as the body
// of one function, to which Gradio gives element, props, trigger and watch: they share one scope, and need no loader.
// Frames: level-0 px of the slide ("x", "y"), CSS px of the stage ("sx", "sy"); view.scale = CSS px per level-0 px,
// view.turn = quarter turns clockwise.
// A patch is known by its index in the bag and shown by its rank by score among all N patches, 1 = highest.
"use strict";

const $ = (name) => element.querySelector(name);
const root = $(".viewer");
const second = !!root.closest("#other"); // beside the page's own viewer, in a comparison
const room = (!second && root.closest("#room")) || root; // the page around, where there is one
const stage = $(".stage");
const canvas = $(".slide");
const nav = $(".nav");
const map = $(".map");
const strip = $(".strip");
const YELLOW = "#ffe119";
const DARK = "#0f0f14";
const GREY = "#8a8f98";
const SKY = "#56c8ff";
const PURPLE = "#cc79a7";
// Of foci A, B, C ...: told from each other and from the stain, also without colour vision by their letter.
const FOCUS_COLOURS = ["#ffe119", "#4dd2ff", "#9ef01a", "#ff9f1c", "#c9a7ff", "#5ff0c0", "#ff9be0", "#ffb3ba"];
const ALONE = "#ffffff"; // of a patch in no focus

let slides = []; // of the case, in order: {token, size: [w, h], tile, mpp, name, source}
let slide = null; // the one that is shown
// {n, parts: [{first, n, side}] of each slide, tokens, xy: Int32Array, each on its own slide, scores: Float32Array, rank: Int32Array, order: Int32Array}
let bag = null;
let kept = []; // indices of the selected patches, best score first
let unlike = new Set(); // of them: kept for being unlike the others, not for their score
let foci = []; // {name, indices, effect}: kept patches that belong together
let focusOf = new Map(); // index -> place in foci
let effects = new Map(); // index -> what the answer loses without the patch, in nats
let words = null; // {names, nearest: Int32Array, cosine: Float32Array}: the word nearest to each patch, -1 for none
let points = null; // {xy: Float32Array, rows: Int32Array, title}
let tissue = null; // {token, xy: Int32Array, side, kept: Int32Array}: while the slide is analysed
const blanks = new Map(); // address of a patch's picture -> share of its px that are white
const view = { x: 0, y: 0, scale: 0, turn: 0 };
const untouched = () => ({
  current: -1,
  members: new Set(),
  seen: new Set(),
  marks: new Map(),
  pinned: new Set(),
  dropped: new Set(),
});
const shared = untouched();
const layers = { boxes: true, foci: true, heat: false, opacity: 0.6 };
let mode = ""; // "region" or "ruler" while one is drawn
let band = null; // the region that is being drawn, CSS px
let ruler = null; // [x0, y0, x1, y1] on the slide
let lasso = null;
let size = [0, 0];

// What the reader did with the patches of cases that this page showed before, by the names of their slides.
const recent = new Map();
const named = () => slides.map((one) => one.name).join();

function forget() {
  laid.clear();
  bag = points = words = tissue = ruler = null;
  kept = [];
  foci = [];
  focusOf = new Map();
  effects = new Map();
  Object.assign(shared, untouched());
}
