"use strict";
// Plots by plotly.js, which is executed when the first plot is seen; they follow the theme of the page.

// Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const CONFIG = {
  displaylogo: false, responsive: true, plotlyServerURL: "", // the page sends nothing anywhere
  modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
};
const LEGEND = { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 };
const drawn = new Map(); // element -> the function that makes its figure

function plotly() {
  if (!window.Plotly) {
    const script = document.createElement("script");
    script.textContent = byId("plotly").textContent;
    document.head.append(script);
  }
  return window.Plotly;
}

// plotly reads a little HTML in its texts: names of records must not be read so.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function short(text, most) {
  return text.length <= most ? text : text.slice(0, most - 1) + "…";
}

function lines(...parts) {
  return parts.filter(Boolean).map((part) => plain(short(part, 90))).join("<br>");
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function axis(title, more = {}) {
  const grid = colour("grid");
  return { title: { text: title }, gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, ...more };
}

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", dragmode: "zoom",
    font: { color: colour("text"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 55, r: 15, t: 36, b: 45 },
    legend: LEGEND,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("text") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("text"), font: { color: colour("text") }, align: "left" },
    ...more,
  };
}

function narrow() {
  return window.matchMedia("(max-width: 640px)").matches;
}

// figure() gives { data, layout, label }; it is asked again when the theme or what is chosen changes.
function draw(box, figure) {
  drawn.set(box, figure);
  const { data: traces, layout: shape, label } = figure();
  const touch = window.matchMedia("(pointer: coarse)").matches;
  box.style.height = shape.height + "px";
  box.setAttribute("aria-label", label + " Arrow keys step through the points.");
  plotly().react(box, traces, layout({ ...shape, dragmode: touch ? false : "zoom" }), CONFIG);
}

function redraw() {
  for (const [box, figure] of drawn) {
    if (box.isConnected) draw(box, figure);
    else drawn.delete(box);
  }
}

// A place for a plot that is drawn when it comes near.
const waiting = new Map();
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) drawWaiting(entry.target);
}, { rootMargin: "100px" });

function drawWaiting(box) {
  const figure = waiting.get(box);
  if (!figure) return;
  near.unobserve(box);
  waiting.delete(box);
  box.replaceChildren();
  draw(box, figure);
}

function plot(height, figure) {
  const box = el("div", { class: "plot soft", role: "img", tabindex: 0 }, "The plot is being drawn.");
  const said = el("p", { class: "hidden", role: "status" });
  box.style.height = height + "px";
  waiting.set(box, figure);
  near.observe(box);
  box.addEventListener("keydown", (event) => step(box, said, event));
  return el("figure", {}, box, said);
}

// Left and right go through the points, escape lets go.
function step(box, said, event) {
  const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape" && window.Plotly) window.Plotly.Fx.unhover(box);
  if (!way || !box.data) return;
  event.preventDefault();
  const points = box.data.flatMap((trace, curveNumber) => (trace.hoverinfo === "skip" || trace.visible === "legendonly"
    ? [] : trace.x.map((_, pointNumber) => ({ curveNumber, pointNumber }))));
  if (!points.length) return;
  box.place = (((box.place ?? (way > 0 ? -1 : 0)) + way) % points.length + points.length) % points.length;
  const { curveNumber, pointNumber } = points[box.place];
  window.Plotly.Fx.hover(box, [points[box.place]]);
  const text = box.data[curveNumber].hovertext[pointNumber];
  said.textContent = text.replace(/<br>/g, "; ").replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
}
