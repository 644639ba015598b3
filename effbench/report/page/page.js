"use strict";
// What happens when: the table at once, plots when they are seen.

function buildPareto() {
  const some = data.envelopes.filter((each) => each.rows.length || each.invalid.length);
  byId("pareto").append(...some.map((envelope, place) => {
    const box = el("details", { id: envelope.id, class: "card" }, el("summary", {}, el("h3", {}, envelope.title)));
    const open = () => {
      if (!box.open || envelope.body) return;
      envelope.body = el("div", { class: "body" }, ...envelopeBody(envelope));
      box.append(envelope.body);
    };
    box.addEventListener("toggle", open);
    box.open = place === 0;
    open();
    return box;
  }));
  if (!some.length) byId("pareto").append(el("p", {}, "No run yet. Make one: effbench run --method METHOD --task TASK"));
}

function envelopeBody(envelope) {
  const facts = envelope.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const parts = envelope.warnings.map((text) => el("p", { class: "warning" }, text));
  const points = paretoPoints(envelope);
  const missing = envelope.rows.length - points.length;
  if (points.length > 1) parts.push(plot(480, () => pareto(envelope)));
  else if (envelope.rows.length) parts.push(el("p", { class: "soft" }, "No arm has both a speed-up and a lossy-ness: nothing to plot."));
  if (points.length > 1 && missing) {
    parts.push(el("p", { class: "soft" }, `${plural(missing, "arm")} not in the plot: no speed-up, no lossy-ness, or one too large to draw.`));
  }
  parts.push(el("details", {}, el("summary", {}, `Conditions of ${plural(envelope.measured, "run")}`), el("dl", {}, ...facts)));
  if (envelope.invalid_runs) {
    const listed = envelope.invalid.map(([id, why]) => el("li", {}, el("code", {}, id), ": " + why));
    parts.push(el("p", {}, `${plural(envelope.invalid_runs, "invalid run")}, not ranked:`), el("ul", {}, ...listed));
  }
  return parts;
}

// Light, dark, or as the system has it.
function buildTheme() {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const say = () => {
    byId("theme").textContent = dark() ? "Light mode" : "Dark mode";
    redraw();
  };
  try {
    const kept = localStorage.getItem("effbench-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* a page from a file may have no storage */ }
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("effbench-theme", root.dataset.theme); } catch { /* then it is not kept */ }
    say();
  });
  system.addEventListener("change", say);
  window.matchMedia("(max-width: 640px)").addEventListener("change", redraw);
  say();
}

// On paper: light, and with the plots of what is open.
function buildPrint() {
  const root = document.documentElement;
  let before;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    redraw();
    [...waiting.keys()].filter((box) => box.isConnected && box.getClientRects().length).slice(0, 30).forEach(drawWaiting);
  });
  window.addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    redraw();
  });
}

// A link to a part that is folded up opens it.
function openTarget() {
  const target = byId(decodeURIComponent(location.hash.slice(1)));
  if (target?.tagName === "DETAILS") {
    target.open = true;
    target.querySelector("summary").focus({ preventScroll: true });
    target.scrollIntoView();
  }
}

buildTheme();
buildTable();
performance.mark("effbench-table"); // sorting and filtering work from here on
const newest = data.envelopes.flatMap((each) => Object.values(each.runs).map((run) => run.date)).sort().pop();
byId("when").textContent = newest ? `Newest run: ${newest} UTC.` : "";
buildFamilies();
if (data.problems.length) {
  byId("unread").hidden = false;
  const more = data.problems_left_out ? [`and ${data.problems_left_out} more`] : [];
  byId("unread").querySelector("ul").append(...[...data.problems, ...more].map((text) => el("li", {}, text)));
}
buildPrint();
// plotly.js stands behind this script, so plots begin when the whole page is read
document.addEventListener("DOMContentLoaded", () => {
  buildPareto();
  openTarget();
  window.addEventListener("hashchange", openTarget);
});
