"use strict";
// The table: a body per envelope, since rows of two envelopes are never ranked together.

const FIRST = 200; // rows that are shown until more are asked for
const table = { sort: null, down: true, all: false, bodies: new Map(), cells: new Map() };
const used = data.columns.map((_, i) => i).filter((i) => rows.some((row) => row.text[i] !== NONE));

function buildTable() {
  const headings = [["method or control", false, "the arm, with what is set of it"], ...used.map((i) => data.columns[i])];
  const line = el("tr", {}, ...headings.map(([title, , help], place) => {
    const button = el("button", { type: "button", title: help }, title);
    const heading = el("th", { scope: "col", "aria-sort": "none" }, button);
    button.addEventListener("click", () => sortBy(place === 0 ? -1 : used[place - 1]));
    table.cells.set(place === 0 ? -1 : used[place - 1], heading);
    return heading;
  }));
  byId("board").append(el("caption", { class: "hidden" }, "Arms by envelope; headings sort within each envelope"));
  byId("board").append(el("thead", {}, line));
  const form = byId("filters");
  fill(form.verdict, [...new Set(rows.map((row) => row.verdict).filter(Boolean))].sort());
  fill(form.family, [...families.keys()].sort(), [...families.keys()].sort());
  form.envelope.append(option("", "all"));
  for (const task of new Set(data.envelopes.map((each) => each.task))) {
    const group = el("optgroup", {});
    group.label = task;
    const within = data.envelopes.map((each, i) => [each, i]).filter(([each]) => each.task === task && each.rows.length);
    if (within.length > 1) group.append(option("task:" + task, `all of ${task}`));
    group.append(...within.map(([each, i]) => option(`envelope:${i}`, each.title)));
    form.envelope.append(group);
  }
  const changed = () => { table.all = false; fillTable(); };
  form.text.addEventListener("input", changed);
  form.addEventListener("change", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed)); // the fields are empty after this event
  byId("more").addEventListener("click", () => { table.all = true; fillTable(); });
  fillTable();
}

function fill(select, names) {
  select.append(option("", "all"), ...names.map((name) => option(name, name)));
}

// Numbers begin with the largest, names with the first; a third press goes back to the ranking.
function sortBy(column) {
  const number = column >= 0 && data.columns[column][1];
  if (table.sort !== column) Object.assign(table, { sort: column, down: number });
  else if (table.down === number) table.down = !number;
  else table.sort = null;
  for (const [each, heading] of table.cells) {
    heading.setAttribute("aria-sort", each !== table.sort ? "none" : table.down ? "descending" : "ascending");
  }
  fillTable();
}

function compare(a, b) {
  const column = table.sort;
  if (column >= 0 && data.columns[column][1]) {
    const [x, y] = [a.sort[column], b.sort[column]];
    if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order; // what is missing comes last
    return (table.down ? y - x : x - y) || a.order - b.order;
  }
  const [x, y] = column < 0 ? [a.name, b.name] : [a.text[column], b.text[column]];
  return (table.down ? -1 : 1) * (x < y ? -1 : x > y ? 1 : 0) || a.order - b.order;
}

function matches() {
  const form = byId("filters");
  const words = form.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const [what, which] = form.envelope.value.split(/:(.*)/s);
  return (row) =>
    (what !== "task" || row.envelope.task === which)
    && (what !== "envelope" || row.envelope === data.envelopes[which])
    && (!form.family.value || row.family === form.family.value)
    && (!form.kind.value || row.kind === form.kind.value)
    && (!form.verdict.value || row.verdict === form.verdict.value)
    && (!form.front.checked || row.front)
    && words.every((word) => row.search.includes(word));
}

function fillTable() {
  const board = byId("board");
  const wanted = rows.filter(matches());
  let room = table.all ? Infinity : FIRST;
  for (const body of table.bodies.values()) body.remove();
  for (const envelope of data.envelopes) {
    const some = wanted.filter((row) => row.envelope === envelope);
    if (!some.length || room <= 0) continue;
    if (table.sort !== null) some.sort(compare);
    const shown = some.slice(0, room);
    room -= shown.length;
    if (!table.bodies.has(envelope)) table.bodies.set(envelope, el("tbody"));
    const body = table.bodies.get(envelope);
    body.replaceChildren(heading(envelope), ...shown.map(line));
    board.append(body);
  }
  const left = table.all ? 0 : Math.max(0, wanted.length - FIRST);
  byId("more").hidden = !left;
  byId("more").textContent = `Show ${left.toLocaleString("en")} more`;
  const beyond = data.left_out ? ` ${plural(data.left_out, "row")} more are in leaderboard.csv only.` : "";
  byId("count").textContent = `${wanted.length.toLocaleString("en")} of ${plural(rows.length, "row")}`
    + (left ? `, the first ${FIRST} shown.` : ".") + beyond;
}

function heading(envelope) {
  if (!envelope.head) {
    const metric = envelope.metric ? ` Quality: ${envelope.metric}.` : "";
    const link = el("a", { href: "#" + envelope.id }, envelope.title);
    const cell = el("th", { scope: "rowgroup", colspan: used.length + 1 }, el("span", {}, link, metric));
    envelope.head = el("tr", { class: "envelope" }, cell);
  }
  return envelope.head;
}

function line(row) {
  if (!row.line) {
    const name = row.kind === "baseline" ? el("strong", {}, ...breakable(row.name))
      : el("a", { href: "#" + families.get(row.family).id }, ...breakable(row.name));
    if (row.kind !== "baseline") name.addEventListener("click", () => chooseArm(row));
    const cells = used.map((i) => {
      const cell = el("td", { class: data.columns[i][1] ? "number" : false }, row.text[i]);
      if (row.text[i].length > 48) cell.classList.add("long");
      return cell;
    });
    row.line = el("tr", { class: `${row.kind}${row.front ? " front" : ""}${row.below ? " below" : ""}` },
      el("th", { scope: "row" }, name), ...cells);
  }
  return row.line;
}
