// One tree as a drawing that can be walked through with a keyboard: a tree of items for a screen reader.

const CHARACTER = 6.65; // width of one of the drawing's letters

/** Draw the pane's tree into its canvas. */
function drawTree(pane) {
  const { model, canvas, view } = pane;
  const width = Math.max(canvas.clientWidth - 2, 340) * view.zoom;
  const layout = layOut(model, { axis: settings.axis, fold: settings.fold, unfolded: view.unfolded, collapsed: view.collapsed, width });
  pane.layout = layout;
  const known = knownAfter(model, view.round);
  const colour = colourOf(model, known);
  const path = view.leaf === null ? null : new Set([0, ...pathTo(model, model.leaves[view.leaf].node)]);
  const most = model.leaves.length;
  const picks = new Set((model.record.rounds.find((round) => round.round === view.round) || { steps: [] }).steps);
  const had = document.activeElement && canvas.contains(document.activeElement);

  const edges = make("svg:g", { "aria-hidden": "true" });
  const items = make("svg:g", { role: "presentation" });
  layout.shown.forEach((element, each) => {
    const { step } = element;
    const node = model.nodes[step];
    const parent = layout.shown[element.parent];
    const ghost = known.leaves[step] === 0;
    const faded = path && !path.has(step) ? " dim" : ghost ? " ghost" : "";
    if (parent) {
      const ends = [parent.x, parent.y, element.x, element.y];
      // The way to the row belongs to the step before: several steps share it.
      if (parent.y !== element.y) edges.prepend(make("svg:path", { class: `edge${faded}`, d: turnPath(...ends), stroke: colour(parent.step), "stroke-width": 2 }));
      edges.append(make("svg:path", {
        class: `edge${faded}`,
        d: straightPath(...ends),
        stroke: colour(step),
        "stroke-width": (2 + 7 * Math.sqrt(Math.max(known.leaves[step], 1) / most)).toFixed(1),
        "stroke-dasharray": node.role === "assistant" ? null : "2 6",
      }));
    }
    items.append(drawItem(pane, element, each, { colour, known, ghost, faded, picks }));
  });
  const svg = make("svg:svg", {
    role: "tree", "aria-label": `Tree of ${most} trajectories`, width: layout.width, height: layout.height,
    viewBox: `0 0 ${layout.width} ${layout.height}`,
  }, drawAxis(layout), edges, items);
  canvas.replaceChildren(svg);
  if (had) focusStep(pane, view.step);
}

function colourOf(model, known) {
  const paint = scale(settings.colour);
  if (settings.colour === "density") return (step) => paint(known.density[step]);
  if (settings.colour === "confidence") return (step) => paint(model.nodes[step].confidence);
  return (step) => {
    const value = advantageOf(model.nodes[step]);
    return paint(value === null ? null : 0.5 + (0.5 * value) / model.largest);
  };
}

function drawAxis(layout) {
  const bottom = layout.height - 18;
  const marks = ticks(layout.longest, Math.max(3, layout.inner / 110)).flatMap((tick) => {
    const x = layout.left + (layout.inner * tick) / layout.longest;
    return [make("svg:line", { x1: x, x2: x, y1: 14, y2: bottom, "stroke-dasharray": "1 5" }),
      make("svg:text", { x, y: bottom + 13, "text-anchor": "middle" }, fmt(tick))];
  });
  const name = settings.axis === "tokens" ? "tokens" : settings.fold ? "steps, chains folded" : "steps";
  return make("svg:g", { class: "axis", "aria-hidden": "true" }, marks, make("svg:text", { x: layout.width - 6, y: bottom + 13, "text-anchor": "end" }, name));
}

function drawItem(pane, element, each, { colour, known, ghost, faded, picks }) {
  const { model, layout, view } = pane;
  const { step, x, y } = element;
  const node = model.nodes[step];
  const parent = layout.shown[element.parent];
  const rounds = (model.branched.get(step) || []).filter((round) => round <= view.round);
  const ends = model.leavesAt.get(step) || [];
  const hit = pane.hits.has(step) || element.chain.some((one) => pane.hits.has(one));
  const item = make("svg:g", {
    class: `node ${node.role}${faded}${hit ? " found" : ""}`,
    role: "treeitem",
    tabindex: step === view.step || (each === 0 && !layout.shown.some((other) => other.step === view.step)) ? 0 : -1,
    "aria-level": model.depth[step] + 1,
    "aria-selected": step === view.step ? "true" : "false",
    "aria-expanded": model.children[step].length ? String(!element.hidden) : null,
    "aria-hidden": ghost ? "true" : null,
    "aria-label": describeItem(pane, element, rounds, ends, known),
    "data-step": step,
    onclick: (event) => { event.stopPropagation(); pane.choose(step); focusStep(pane, step); },
    ondblclick: () => pane.toggle(step),
    onpointerenter: (event) => showTip(event, tipText(model, element, known)),
    onpointerleave: hideTip,
  });
  const startX = parent ? parent.x : x - 14;
  item.append(make("svg:rect", { class: "hit", x: Math.min(startX + 3, x - 10), y: y - layout.rowHeight / 2, width: Math.max(x - startX, 10) + 8, height: layout.rowHeight }));
  if (step === view.step) item.append(make("svg:circle", { class: "halo", cx: x, cy: y, r: 12 }));
  item.append(make("svg:circle", { class: "focus", cx: x, cy: y, r: 15 }));
  if (step === 0) {
    item.append(make("svg:rect", { x: x - 6, y: y - 6, width: 12, height: 12, rx: 3, fill: colour(0), class: "dot" }));
  } else if (element.chain.length > 1) {
    item.append(make("svg:rect", { x: x - 7, y: y - 4.5, width: 14, height: 9, rx: 4.5, fill: colour(step), class: "dot" }));
  } else {
    item.append(make("svg:circle", { cx: x, cy: y, r: 4.5, fill: colour(step), class: "dot" }));
  }
  if (element.chain.some((one) => model.nodes[one].parts.length > 1)) { // what came back from a tool, after the step's own words
    item.append(make("svg:rect", { class: "tooled", x: x - 3, y: y + 6, width: 6, height: 6, rx: 1.5 }));
  }
  if (rounds.length) {
    item.append(make("svg:circle", { class: `ring${picks.has(step) ? " picked" : ""}`, cx: x, cy: y, r: 8 }));
    item.append(make("svg:text", { class: "round", x: x + 7, y: y - 8 }, roundsLabel(rounds)));
  }
  // The words of a step make room for the rounds that are written above the ring before them.
  const lead = parent && parent.y === y ? 6.5 * roundsLabel((model.branched.get(parent.step) || []).filter((round) => round <= view.round)).length : 0;
  const room = Math.floor((x - startX - 22 - lead) / CHARACTER);
  if (step > 0 && layout.rowHeight >= ROWS.medium && room >= 4) {
    const words = element.chain.length > 1 ? `${element.chain.length} steps: ${node.text}` : node.text;
    item.append(make("svg:text", { class: "words", x: startX + 12 + lead, y: y - 6 }, snippet(words, room)));
  }
  if (element.hidden) {
    item.append(make("svg:path", { d: `M${x + 8} ${y}l14 -7v14z`, fill: colour(step) }));
    item.append(make("svg:text", { class: "figure", x: x + 26, y: y + 4 }, `${known.leaves[step]} folded`));
  } else if (ends.length) {
    const leaf = model.leaves[ends[0]];
    item.append(leafMark(leafKind(leaf), x + 16, y));
    const reward = Object.values(leaf.rewards)[0];
    item.append(make("svg:text", { class: "figure", x: x + 27, y: y + 4 }, `#${ends[0] + 1}  ${fmt(reward ?? leaf.success)}`));
  }
  return item;
}

const roundsLabel = (rounds) => (rounds.length > 4 ? `${rounds.slice(0, 3).join(" ")} \u2026` : rounds.join(" "));

function leafMark(kind, x, y) {
  const shapes = { right: `M${x - 5} ${y}l3.5 4 6.5 -8`, wrong: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`, unscored: `M${x} ${y - 5}l5 5 -5 5 -5 -5z` };
  return make("svg:path", { class: `leaf ${kind}`, d: shapes[kind] });
}

function describeItem(pane, element, rounds, ends, known) {
  const { model } = pane;
  const { step } = element;
  const node = model.nodes[step];
  const words = [step === 0 ? "Question" : element.chain.length > 1 ? `${element.chain.length} steps up to ${step}` : `Step ${step}`];
  if (!["assistant", "question"].includes(node.role)) words.push(snippet(node.role, 20));
  if (node.parts.length > 1) words.push(`with ${node.parts.slice(1).map((part) => snippet(part.role, 20)).join(", ")}`);
  if (step > 0) words.push(snippet(node.text, 80));
  if (known.density[step] !== null) words.push(`${percent(known.density[step])} right`);
  words.push(plural(known.leaves[step], "trajectory").replace("trajectorys", "trajectories"));
  if (rounds.length) words.push(`branched in round ${rounds.join(", ")}`);
  ends.forEach((leaf) => words.push(`trajectory ${leaf + 1} ends ${OUTCOMES[leafKind(model.leaves[leaf])]}`));
  return words.join(", ");
}

function tipText(model, element, known) {
  const { step, chain } = element;
  const node = model.nodes[step];
  const lines = [step === 0 ? snippet(model.record.question.text, 220) : chain.map((one) => snippet(model.nodes[one].text, 160)).slice(-4).join("\n")];
  const figures = [`${percent(known.density[step])} right of ${known.leaves[step]}`];
  if (node.confidence !== null) figures.push(`confidence ${percent(node.confidence)}`);
  if (node.ib_score !== null) figures.push(`IB-Score ${fmt(node.ib_score)}`);
  if (advantageOf(node) !== null) figures.push(`advantage ${signed(advantageOf(node))}`);
  return `${lines[0]}\n${figures.join(" \u00b7 ")}`;
}

function showTip(event, text) {
  if (event.pointerType === "touch") return;
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = event.currentTarget.getBoundingClientRect();
  const left = Math.min(Math.max(8, event.clientX + 14), innerWidth - tip.offsetWidth - 8);
  const below = Math.min(box.bottom, event.clientY + 20) + 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : Math.max(4, event.clientY - tip.offsetHeight - 14)}px`;
}

function hideTip() { byId("tip").hidden = true; }

function focusStep(pane, step) {
  const item = pane.canvas.querySelector(`[data-step="${Number(step)}"]`);
  if (item) item.focus({ preventScroll: true });
  return item;
}

/** The step that an arrow key leads to. */
function neighbour(pane, step, key) {
  const { shown } = pane.layout;
  const self = shown.findIndex((element) => element.step === step);
  if (self < 0) return 0;
  const seen = shown.map((element, each) => ({ ...element, each })).filter((element) => knownAfter(pane.model, pane.view.round).leaves[element.step] > 0);
  if (key === "Home") return 0;
  if (key === "ArrowLeft") return shown[self].parent >= 0 ? shown[shown[self].parent].step : step;
  if (key === "ArrowRight") return (seen.find((element) => element.parent === self) || shown[self]).step;
  // Up and down: the nearest step of the next row that has one about here.
  const way = key === "ArrowDown" ? 1 : -1;
  const there = seen.filter((element) => (element.row - shown[self].row) * way > 0);
  if (!there.length) return step;
  const row = there.reduce((best, element) => (Math.abs(element.row - shown[self].row) < Math.abs(best - shown[self].row) ? element.row : best), there[0].row);
  return there.filter((element) => element.row === row).reduce((best, element) => (Math.abs(element.x - shown[self].x) < Math.abs(best.x - shown[self].x) ? element : best)).step;
}
