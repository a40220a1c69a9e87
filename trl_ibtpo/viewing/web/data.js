// Elements, texts and trees. Texts of models go into the page as text nodes and attributes of no consequence, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text nodes. */
function make(name, attributes = {}, ...children) {
  const [tag, space] = name.startsWith("svg:") ? [name.slice(4), SVG] : [name, null];
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, each] of Object.entries(value)) element.style.setProperty(name, each);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(2)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

const byId = (id) => document.getElementById(id);

/** `text` as it may be shown: what would steer a screen or reorder a line is written as what it is. */
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (char) => String.fromCharCode(0x2400 + (char.charCodeAt(0) === 127 ? 33 : char.charCodeAt(0))))
    .replace(/[\u0080-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (char) => "\u27e8U+" + char.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9")
    .replace(/[\ud800-\udfff]/gu, "\ufffd");
}

/** One line of at most `length` characters. */
function snippet(text, length = 60) {
  const line = visible(text.slice(0, 6 * length).replace(/\s+/g, " ").trim());
  return line.length > length ? line.slice(0, Math.max(1, length - 1)).trimEnd() + "\u2026" : line;
}

function fmt(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en").replace("-", "\u2212");
  const size = Math.abs(value);
  const shown = size >= 1e5 || (size < 10 ** -digits && size > 0) ? value.toPrecision(2) : value.toFixed(size >= 100 ? Math.min(digits, 1) : digits);
  return shown.replace("-", "\u2212");
}

const percent = (value) => (value === null || value === undefined || Number.isNaN(value) ? "\u2013" : `${Math.round(100 * value)}%`);
const signed = (value) => (value > 0 ? "+" : "") + fmt(value);
const plural = (count, word) => `${fmt(count)} ${word}${count === 1 ? "" : "s"}`;

// ----- the trees that this page holds, or that its server does ------------------------------------------------------

const index = JSON.parse(byId("index").textContent);
const kept = new Map(); // models of the trees looked at last
const KEPT = 40;

/** The tree of an entry, ready to be drawn; only those looked at are unpacked. */
async function loadTree(entry) {
  const key = `${index.version}/${entry}`;
  if (!kept.has(key)) kept.set(key, fetchRecord(entry).then(buildModel));
  const model = kept.get(key);
  kept.delete(key); // looked at last, dropped last
  kept.set(key, model);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  try {
    return await model;
  } catch (error) {
    kept.delete(key);
    throw error;
  }
}

async function fetchRecord(entry) {
  if (index.served) {
    const answer = await fetch(`tree/${index.version}/${entry}`);
    if (!answer.ok) throw new Error(`the tree cannot be read (${answer.status})`);
    return answer.json();
  }
  const packed = Uint8Array.from(atob(byId(`t${entry}`).textContent.trim()), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// ----- colours ------------------------------------------------------------------------------------------------------

let theme = null; // colours as the style says them, asked for once: asking makes the browser lay everything out

function colourNamed(name) {
  if (!theme) {
    const style = getComputedStyle(document.documentElement);
    theme = Object.fromEntries(["wrong", "half", "right", "unsure", "sure", "unknown"].map((each) => [each, style.getPropertyValue(`--${each}`).trim()]));
  }
  return theme[name];
}

/** The three colours of a scale in the theme that is on. */
const stops = (kind) => (kind === "confidence" ? ["unsure", "half", "sure"] : ["wrong", "half", "right"]).map(colourNamed);

/** From 0 to 1 to a colour; null to the colour of what is not known. */
function scale(kind) {
  const rgb = stops(kind).map((hex) => {
    const full = hex.length === 4 ? "#" + [...hex.slice(1)].map((char) => char + char).join("") : hex;
    return [1, 3, 5].map((start) => parseInt(full.slice(start, start + 2), 16));
  });
  const unknown = colourNamed("unknown");
  return (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return unknown;
    const place = 2 * Math.min(1, Math.max(0, value));
    const low = Math.min(1, Math.floor(place));
    const mixed = rgb[low].map((part, each) => Math.round(part + (rgb[low + 1][each] - part) * (place - low)));
    return `rgb(${mixed.join(",")})`;
  };
}
