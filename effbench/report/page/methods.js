"use strict";
// A part of the page per method or stack of methods, built when it is opened.

const LINES = 8; // arms that plots show until others are chosen

// What tells an arm from others of its method: the parameters that are set.
function setting(row) {
  const found = row.stack.map(([name, pairs]) => {
    const set = pairs.map(([key, value]) => (key ? `${key}=${value}` : value)).join(", ");
    return row.stack.length > 1 ? name + (set ? `(${set})` : "") : set || "default";
  });
  const role = row.kind === "control" && !["noop", "identity"].includes(row.control) ? `${row.control} control: ` : "";
  const phase = row.kind === "method" && column(row, "phase") !== "test" ? `, phase ${column(row, "phase")}` : "";
  return role + found.join(" + ") + phase;
}

function buildFamilies() {
  const order = [...families.values()].sort((a, b) => isControl(a) - isControl(b) || (a.name < b.name ? -1 : 1));
  byId("families").append(...order.map((family) => {
    const title = el("h3", {}, family.name);
    const count = `${plural(family.rows.length, "arm")}${isControl(family) ? ", control" : ""}`;
    family.box = el("details", { id: family.id, class: "card" }, el("summary", {}, title, " ", el("span", { class: "soft" }, count)));
    family.box.addEventListener("toggle", () => { if (family.box.open) openFamily(family); });
    return family.box;
  }));
}

function isControl(family) {
  return family.rows.every((row) => row.kind === "control");
}

// Called by a link of the table, before the browser goes there.
function chooseArm(row) {
  const family = families.get(row.family);
  openFamily(family, row);
  family.box.open = true;
}

function openFamily(family, row = null) {
  if (!family.body) {
    family.where = [...new Set(family.rows.map((each) => each.envelope))];
    family.body = el("div", { class: "body" });
    family.rest = el("div");
    family.choice = el("select", {}, ...family.where.map((each, i) => option(i, each.title)));
    family.choice.addEventListener("change", () => showFamily(family));
    const sources = [...new Set(family.rows.map((each) => each.source).filter(Boolean))].slice(0, 3);
    family.body.append(...sources.map((text) => el("p", {}, "Source: ", sourced(text))));
    const choice = el("p", { class: "choice" }, el("label", {}, "Envelope ", family.choice));
    if (family.where.length > 1) family.body.append(choice);
    else family.body.append(el("p", { class: "soft" }, family.where[0].title));
    family.body.append(family.rest);
    family.box.append(family.body);
    if (!row) showFamily(family);
  }
  if (row) {
    family.choice.value = String(family.where.indexOf(row.envelope));
    showFamily(family, row);
  }
}

function showFamily(family, row = null) {
  const envelope = family.where[Number(family.choice.value) || 0];
  const arms = family.rows.filter((each) => each.envelope === envelope);
  const chosen = new Set([...(row ? [row] : []), ...arms].slice(0, LINES));
  const plots = el("div");
  const refresh = () => showPlots(plots, arms.filter((each) => chosen.has(each)));
  family.rest.replaceChildren(armTable(arms, chosen, row, refresh), plots, ...commands(envelope, arms));
  refresh();
}

function armTable(arms, chosen, marked, refresh) {
  const some = ["test speed-up", "verdict", "lossy-ness", "quality", "GFLOPs", "status"];
  const titles = some.filter((title) => arms.some((row) => column(row, title) !== NONE));
  const body = arms.map((row) => {
    const tick = el("input", { type: "checkbox", checked: chosen.has(row) });
    tick.setAttribute("aria-label", "in the plots: " + setting(row));
    tick.addEventListener("change", () => { if (tick.checked) chosen.add(row); else chosen.delete(row); refresh(); });
    const cells = titles.map((title) => el("td", { class: column(row, title).length > 48 ? "long" : false }, column(row, title)));
    return el("tr", { class: row === marked ? "marked" : false },
      el("td", {}, tick), el("th", { scope: "row" }, setting(row)), ...cells);
  });
  const head = el("tr", {}, ...["plot", "parameters", ...titles].map((title) => el("th", { scope: "col" }, title)));
  const whole = el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
  return el("div", { class: "scroll", role: "region", "aria-label": "Arms", tabindex: 0 }, whole);
}

function showPlots(box, some) {
  if (!some.length) return box.replaceChildren(el("p", { class: "soft" }, "No arm is chosen."));
  const titled = (title, inside) => el("div", {}, el("h4", {}, title), inside);
  const said = (text) => el("p", { class: "soft" }, text);
  const parts = [];
  const layers = some.filter((row) => row.tokens.length);
  const same = layers.every((row) => String(row.tokens) === String(row.envelope.runs[row.run].tokens));
  if (some.some((row) => row.masked)) parts.push(said("Some tokens are masked, not removed."));
  if (layers.length && same) parts.push(titled("Tokens by layer", said(`${layers[0].tokens[0].toLocaleString("en")} in the first layer, as in the baseline: no token is removed in the image tower.`)));
  else if (layers.length) parts.push(titled("Tokens by layer", plot(380, () => tokensByLayer(layers))));
  if (some.some((row) => row.step)) parts.push(titled("Where a test step's time goes", plot(300, () => timeSplit(some, "step", "ms"))));
  if (some.some((row) => row.train)) parts.push(titled("Where training time goes", plot(300, () => timeSplit(some, "train", "s"))));
  const past = some.filter((row) => row.history.some(([, , value]) => value !== null));
  const runs = new Set(past.flatMap((row) => row.history.map(([, run]) => run)));
  if (runs.size > 1) parts.push(titled("History", plot(380, () => historyOf(past))));
  else if (runs.size) parts.push(titled("History", said(`One run so far, of ${past[0].history[0][0]} UTC.`)));
  return box.replaceChildren(...parts);
}

function commands(envelope, arms) {
  const runs = [...new Set(arms.map((row) => row.run))].slice(0, 10).map((place) => envelope.runs[place]);
  return [el("h4", {}, "Measured by"), ...runs.map((run) => el("div", {},
    el("p", {}, el("code", {}, run.id), ` (${run.date} UTC)`),
    run.command ? el("pre", { tabindex: 0 }, el("code", {}, run.command)) : "",
    el("details", {}, el("summary", {}, "Noise floor and machine"), el("ul", {}, ...run.about.map((text) => el("li", {}, text))))))];
}
