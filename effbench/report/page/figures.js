"use strict";
// The figures of the page: Pareto plot, history, tokens by layer, time split. Each returns { data, layout, label }.

const FAR = 1e4; // a figure further out than this is left out of a plot, which it would flatten
const KINDS = [
  ["baseline", "star", null],
  ["methods", "circle", 0],
  ["random, grid or norm control", "x", 1],
  ["resize control", "triangle-up", 2],
  ["noop and identity", "square", 7],
  ["a stack's part alone", "diamond", 3],
];

function kindOf(row) {
  if (row.kind === "baseline") return 0;
  if (row.kind === "method") return 1;
  return { resize: 3, noop: 4, identity: 4, part: 5 }[row.control] ?? 2;
}

// The baseline is what both figures are relative to.
function placed(row) {
  const [loss, speed] = row.kind === "baseline" ? [[0, null, null], [1, null, null]] : [row.loss, row.speedup];
  const fits = loss[0] !== null && speed[0] !== null && Math.abs(100 * loss[0]) <= FAR && speed[0] > 0 && speed[0] <= FAR;
  return fits ? { row, x: 100 * loss[0], y: speed[0], loss, speed } : null;
}

function bars(points, of, value, scale) {
  const side = (end) => points.map((point) => {
    const far = point[of][end];
    const length = far === null ? 0 : Math.abs(scale * far - point[value]);
    return length <= FAR ? length : 0;
  });
  return { type: "data", symmetric: false, array: side(2), arrayminus: side(1), thickness: 1, width: 3 };
}

function column(row, title) {
  return row.text[data.columns.findIndex((each) => each[0] === title)];
}

function about(row) {
  const peak = column(row, "peak MiB");
  return lines(row.name, "speed-up " + column(row, "test speed-up") + ", " + column(row, "verdict"),
    "lossy-ness " + column(row, "lossy-ness"), "quality " + column(row, "quality"),
    peak === NONE ? "peak memory not measured" : `peak ${peak} MiB`,
    row.front ? "on the Pareto front: " + column(row, "front") : "", row.below ? column(row, "against controls") : "");
}

function paretoPoints(envelope) {
  return envelope.rows.map(placed).filter(Boolean);
}

function pareto(envelope) {
  const points = paretoPoints(envelope);
  const peaks = points.map((point) => point.row.peak).filter((peak) => peak > 0).sort((a, b) => a - b);
  const usual = peaks[peaks.length >> 1];
  // area grows with memory, within what can still be seen and pointed at
  const size = (peak) => (peak > 0 ? Math.min(34, Math.max(7, 13 * Math.sqrt(peak / usual))) : 9);
  const front = points.filter((point) => point.row.front).sort((a, b) => a.x - b.x || a.y - b.y);
  const traces = [];
  const line = {
    type: "scatter", mode: "lines", name: "Pareto front", x: front.map((p) => p.x), y: front.map((p) => p.y),
    line: { color: colour("text"), width: 1.5, shape: "hv" }, hoverinfo: "skip", legendrank: 2000,
  };
  KINDS.forEach(([name, symbol, place], kind) => {
    const some = points.filter((point) => kindOf(point.row) === kind);
    const paint = place === null ? colour("text") : COLOURS[place];
    if (some.length) {
      traces.push({
        type: "scatter", mode: "markers", name, legendrank: 1000 + kind, x: some.map((p) => p.x), y: some.map((p) => p.y),
        hoverinfo: "text", hovertext: some.map((p) => about(p.row)),
        error_x: { ...bars(some, "loss", "x", 100), color: paint + "88" },
        error_y: { ...bars(some, "speed", "y", 1), color: paint + "88" },
        marker: {
          symbol, color: paint, opacity: 0.85, size: some.map((p) => size(p.row.peak)),
          line: { color: colour("page"), width: 1 },
        },
      });
    }
  });
  traces.reverse().unshift(line); // methods and the baseline above the controls
  const what = envelope.metric ? `lossy-ness of ${envelope.metric.split(" ")[0]}, %` : "lossy-ness, %";
  return {
    data: traces,
    layout: {
      height: narrow() ? 460 : 480, margin: { l: 55, r: 15, t: 36, b: narrow() ? 150 : 95 },
      xaxis: axis(plain(what)), yaxis: axis("test speed-up"),
    },
    label: `Speed-up against lossy-ness of ${points.length} arms, ${front.length} of them on the Pareto front.`,
  };
}

function lineOf(place) {
  return { color: COLOURS[place % 6], dash: DASHES[Math.floor(place / 6) % DASHES.length], width: 2 };
}

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star"];

function historyOf(some) {
  const traces = some.map((row, place) => {
    const past = row.history.filter(([, , value]) => value !== null && value > 0 && value <= FAR)
      .map(([when, run, value, low, high]) => ({ when, run, y: value, speed: [value, low, high] }));
    return {
      type: "scatter", mode: "lines+markers", name: plain(short(setting(row), 40)),
      x: past.map((p) => p.when), y: past.map((p) => p.y), line: lineOf(place),
      marker: { size: 9, symbol: SYMBOLS[place % SYMBOLS.length] },
      error_y: { ...bars(past, "speed", "y", 1), color: COLOURS[place % 6] + "88" },
      hoverinfo: "text",
      hovertext: past.map((p) => lines(setting(row), p.when + " UTC", `speed-up ${p.y.toPrecision(3)}x`
        + (p.speed[1] === null ? "" : ` [${p.speed[1].toPrecision(3)}, ${p.speed[2]?.toPrecision(3)}]`), p.run)),
    };
  });
  return {
    data: traces, layout: { ...legendBelow(some.length, 300), xaxis: axis("run", { type: "date" }), yaxis: axis("test speed-up"), showlegend: true },
    label: "Test speed-up of each run over time.",
  };
}

function tokensByLayer(some) {
  const first = some[0].envelope.runs[some[0].run];
  const named = [["baseline", first.tokens, null], ...some.map((row, place) => [setting(row), row.tokens, place])];
  const traces = named.filter(([, tokens]) => tokens.length).map(([name, tokens, place]) => ({
    type: "scatter", mode: "lines+markers", name: plain(short(name, 40)), x: tokens.map((_, i) => i), y: tokens,
    line: { ...(place === null ? { color: colour("text"), dash: "dot", width: 3 } : lineOf(place)), shape: "hvh" },
    marker: { size: 6, symbol: place === null ? "circle-open" : SYMBOLS[place % SYMBOLS.length] },
    hoverinfo: "text", hovertext: tokens.map((n, i) => lines(name, `block ${i}: ${n.toLocaleString("en")} tokens`)),
  }));
  return {
    data: traces,
    layout: {
      ...legendBelow(traces.length, 280), showlegend: true, xaxis: axis("block of the image tower, from 0", { tickformat: "d" }),
      yaxis: axis("tokens", { rangemode: "tozero" }),
    },
    label: "Tokens that enter each layer of the image tower.",
  };
}

function legendBelow(count, height) {
  const below = 75 + 21 * Math.ceil(count / (narrow() ? 1 : 3));
  return { height: height + below, margin: { l: 55, r: 15, t: 36, b: below } };
}

const PAINT = {
  image: [0, ""], text: [4, "/"], connector: [3, "x"], prefill: [2, ""], decode: [6, "\\"], overhead: [5, "x"],
  head: [1, "/"], backward: [7, ""], optimiser: [7, "x"], data_wait: [7, "."], transfer: [7, "-"],
};
const SAID = { overhead: "method's own", image: "image tower", text: "text tower", data_wait: "data wait" };

// Bars of one run stand together, its baseline first: of two runs only ratios compare, not seconds.
function timeSplit(some, which, unit) {
  const runs = [...new Set(some.map((row) => row.run))];
  const found = runs.flatMap((run) => {
    const of = some[0].envelope.runs[run];
    const tag = runs.length > 1 ? ` (${of.date.slice(0, 10)})` : "";
    const arms = some.filter((row) => row.run === run && row[which]).map((row) => [setting(row) + tag, row[which]]);
    return arms.length ? [["baseline" + tag, of[which]], ...arms] : [];
  }).filter(([, split]) => split && split.every((value) => value === null || value <= 1e9));
  const traces = data.parts.map((part, i) => ({ part, values: found.map(([, split]) => split[i] ?? 0) }))
    .filter(({ values }) => values.some((value) => value > 0))
    .map(({ part, values }) => ({
      type: "bar", orientation: "h", name: SAID[part] ?? part, x: values, y: found.map((_, i) => i),
      marker: {
        color: COLOURS[PAINT[part][0]], line: { color: colour("page"), width: 1 },
        pattern: { shape: PAINT[part][1], bgcolor: COLOURS[PAINT[part][0]], fgcolor: colour("page"), size: 7, solidity: 0.2 },
      },
      hoverinfo: "text",
      hovertext: values.map((value, i) => lines(found[i][0], `${SAID[part] ?? part} ${value.toPrecision(3)} ${unit}`)),
    }));
  const below = narrow() ? 60 + 20 * traces.length : 100;
  return {
    data: traces,
    layout: {
      barmode: "stack", legend: { ...LEGEND, traceorder: "normal" }, height: 34 * found.length + below + 50, margin: { l: 60, r: 15, t: 36, b: below }, showlegend: true,
      xaxis: axis(unit),
      yaxis: axis("", {
        tickvals: found.map((_, i) => i), autorange: "reversed", zeroline: false,
        ticktext: found.map(([name]) => plain(short(name, narrow() ? 18 : 44))),
      }),
    },
    label: `Time of ${found.length} arms by what it is spent on, in ${unit}.`,
  };
}
