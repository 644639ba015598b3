"use strict";
// Elements from data. Data become text nodes only; attributes are set from this page's own words and numbers.

const data = JSON.parse(document.getElementById("data").textContent);
const NONE = "—";

function byId(id) {
  return document.getElementById(id);
}

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function option(value, text) {
  return el("option", { value }, text);
}

// A spec may break after its own punctuation, rather than within a word.
function breakable(text) {
  return text.split(/(?<=[+,:])/).flatMap((part) => [part, el("wbr")]);
}

// A source with its arXiv ids as links; nothing else of it becomes an address.
function sourced(text) {
  const parts = text.split(/\b(\d{4}\.\d{4,5})\b/);
  return el("span", {}, ...parts.map((part, i) => (i % 2 === 0 ? part
    : el("a", { href: "https://arxiv.org/abs/" + part, rel: "noopener noreferrer" }, part))));
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

// A part of an address from a name: unique, of harmless characters.
const taken = new Set();
function anchor(prefix, name) {
  const plain = prefix + name.replace(/[^A-Za-z0-9_.-]+/g, "-").slice(0, 80);
  let id = plain;
  for (let n = 2; taken.has(id); n++) id = `${plain}-${n}`;
  taken.add(id);
  return id;
}

// Rows know their envelope and their place; methods gather the rows of all envelopes.
const rows = [];
const families = new Map();
for (const envelope of data.envelopes) {
  envelope.id = anchor("envelope-", envelope.digest);
  for (const row of envelope.rows) {
    Object.assign(row, { envelope, order: rows.length });
    row.search = [row.name, row.source, row.family, envelope.title, ...row.text].join(" ").toLowerCase();
    rows.push(row);
    if (row.kind === "baseline") continue;
    if (!families.has(row.family)) families.set(row.family, { name: row.family, rows: [] });
    families.get(row.family).rows.push(row);
  }
}
for (const family of families.values()) family.id = anchor("method-", family.name);
