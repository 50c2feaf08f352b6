// The slide viewer's state. The scripts of this folder are joined in the order that viewer.py names and run as the body
// of one function, to which Gradio gives element, props, trigger and watch: they share one scope, and need no loader.
// Frames: level-0 px of the slide ("x", "y"), CSS px of the stage ("sx", "sy"); view.scale = CSS px per level-0 px.
// A patch is known by its index in the bag and shown by its rank by score among all N patches, 1 = highest.
"use strict";

const $ = (name) => element.querySelector(name);
const root = $(".viewer");
const stage = $(".stage");
const canvas = $(".slide");
const nav = $(".nav");
const map = $(".map");
const strip = $(".strip");
const YELLOW = "#ffe119";
const DARK = "#0f0f14";
const BLUE = "#0072b2";
const ORANGE = "#e69f00";
const PURPLE = "#cc79a7";
const GREY = "#8a8f98";
const SKY = "#56b4e9";

let slide = null; // {token, size: [w, h], tile, mpp, name, source}
let bag = null; // {n, side, xy: Int32Array, scores: Float32Array, rank: Int32Array, order: Int32Array, share: Float32Array}
let kept = []; // indices of the selected patches, best score first
let effects = new Map(); // index -> what the answer loses without the patch, in nats
let points = null; // {xy: Float32Array, rows: Int32Array, title}
const view = { x: 0, y: 0, scale: 0 };
const shared = {
  current: -1,
  members: new Set(),
  seen: new Set(),
  marks: new Map(),
  pinned: new Set(),
  dropped: new Set(),
};
const layers = { boxes: true, heat: false, opacity: 0.55 };
let mode = "";
let band = null;
let lasso = null;
let size = [0, 0];
