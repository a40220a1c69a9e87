// What is said in words: trajectories, the flat list, and the chosen step with the reasons why it was branched.

function drawTrajectories(pane) {
  const { model, view } = pane;
  const head = ["", "outcome", "began", "advantage", "tokens", ...model.rewards, "ended"];
  const body = model.leaves.map((leaf, number) => {
    const kind = leafKind(leaf);
    const began = leaf.round ? `round ${leaf.round}` : "question";
    return make("tr", { "data-leaf": number, "aria-selected": view.leaf === number ? "true" : "false", class: leaf.round > view.round ? "dim" : null, onclick: () => pane.chooseLeaf(number) },
      make("td", {}, make("button", { type: "button", class: "link", "aria-pressed": String(view.leaf === number), "aria-label": `Trajectory ${number + 1}` }, `#${number + 1}`)),
      make("td", { class: "left" }, make("span", { class: `mark ${kind}` }, `${MARKS[kind]} `), OUTCOMES[kind]),
      make("td", { class: "left" }, began),
      make("td", {}, leaf.filtered_out ? "left out" : leaf.advantage === null ? "\u2013" : signed(leaf.advantage)),
      make("td", {}, fmt(model.nodes[leaf.node].end)),
      model.rewards.map((name) => make("td", {}, fmt3(leaf.rewards[name]))),
      make("td", {}, { length: "out of tokens", stop: "by itself" }[leaf.finish_reason] || snippet(leaf.finish_reason || "\u2013", 20)));
  });
  const chosen = view.leaf !== null;
  pane.table.replaceChildren(
    make("div", { class: "buttons" },
      make("h3", {}, panes.length > 1 ? `Trajectories, ${placeOf(index.entries[pane.entry])}` : "Trajectories"),
      make("span", { class: "grow" }),
      chosen && settings.view === "tree" ? make("button", { type: "button", onclick: () => pane.focusOn(view.leaf), class: "focus-path" }, view.collapsed.size ? "Unfold all" : `Fold all but #${view.leaf + 1}`) : null,
      chosen ? make("button", { type: "button", onclick: () => pane.chooseLeaf(view.leaf) }, "Show all") : null),
    make("table", {}, make("thead", {}, make("tr", {}, head.map((name, each) => make("th", { scope: "col", class: each < 3 ? "left" : null }, snippet(name, 28))))), make("tbody", {}, body)));
}

const fmt3 = (value) => fmt(value ?? null, 3);

/** Every trajectory with its whole text, what it shares with an earlier one folded. */
function drawList(pane) {
  const { model, view } = pane;
  const known = knownAfter(model, view.round);
  const colour = colourOf(model, known);
  const piece = (step) => {
    const node = model.nodes[step];
    return make("button", { type: "button", class: "piece", "data-step": step, "aria-pressed": String(view.step === step), style: { "border-left-color": colour(step) }, onclick: () => pane.choose(step) },
      node.role === "assistant" ? null : make("span", { class: "role" }, snippet(node.role, 20)),
      node.parts.length
        ? node.parts.map((part) => [make("span", { class: "role" }, snippet(part.role, 20)), make("span", { class: "text" }, highlighted(visible(part.text).replace(/\n+$/, "\n"), pane.hits.has(step)))])
        : make("span", { class: "text" }, highlighted(visible(node.text).replace(/\n+$/, ""), pane.hits.has(step))));
  };
  pane.flat.replaceChildren(...model.leaves.map((leaf, number) => {
    const kind = leafKind(leaf);
    const { shared, own } = sharedSteps(model, number);
    const rewards = model.rewards.map((name) => make("span", { class: "muted" }, `${snippet(name, 28)} ${fmt3(leaf.rewards[name])}`));
    return make("article", { "data-leaf": number, "aria-current": String(view.leaf === number), "aria-label": `Trajectory ${number + 1}`, class: leaf.round > view.round ? "dim" : null },
      make("header", {}, make("b", {}, `#${number + 1}`), make("span", {}, make("span", { class: `mark ${kind}` }, `${MARKS[kind]} `), OUTCOMES[kind]), rewards,
        leaf.filtered_out ? make("span", { class: "muted" }, "left out by the path filter") : null,
        leaf.advantage === null ? null : make("span", { class: "muted" }, `advantage ${signed(leaf.advantage)}`),
        make("span", { class: "muted" }, `${fmt(model.nodes[leaf.node].end)} tokens`)),
      shared.length ? make("details", { class: "shared", open: shared.some((step) => pane.hits.has(step)) }, make("summary", {}, `${plural(shared.length, "step")} shared, then its own from round ${leaf.round}`), shared.map(piece)) : null,
      own.map(piece));
  }));
}

const number_ = (value) => fmt(value);
const highlighted = (text, hit) => (hit ? make("mark", {}, text) : text);

/** The chosen step, and for each round that branched there, why. */
function drawInspector(pane, round = null) {
  const { model, view } = pane;
  const box = byId("inspector");
  const step = view.step;
  const choices = model.record.rounds.filter((choice) => choice.steps.includes(step) && choice.round <= view.round);
  const now = choices.find((choice) => choice.round === (round ?? view.round)) || choices[0];
  const sections = [];
  if (now) sections.push(whyHere(pane, now, step, choices));
  sections.push(aboutStep(pane, step));
  box.replaceChildren(...sections);
  box.scrollTop = 0;
}

function whyHere(pane, choice, step, choices) {
  const { model } = pane;
  const said = reasons(model, choice, step);
  const place = choice.candidates.indexOf(step);
  const made = model.record.method.branching === "ib" ? scoreParts(model, step, choice.round, choice.priorities[place]) : null;
  const grown = model.leaves.map((leaf, number) => ({ ...leaf, number })).filter((leaf) => leaf.round === choice.round && leaf.branched_after === step);
  const outcome = grown.map((leaf) => `#${leaf.number + 1} ended ${OUTCOMES[leafKind(leaf)]}`).join(", ");
  return make("section", { class: "why" },
    make("h3", {}, `Round ${choice.round}: why here?`),
    choices.length > 1 ? make("div", { class: "buttons rounds", role: "group", "aria-label": "Rounds that branched here" }, "Rounds that chose it:", choices.map((each) => make("button", { type: "button", "aria-pressed": String(each === choice), "aria-label": `Round ${each.round}`, onclick: () => pane.explain(each.round) }, String(each.round)))) : null,
    said.map((words, each) => make("p", { class: each === 0 ? "lead" : null }, words)),
    choice.candidates.length > 1 && model.record.method.branching !== "random" ? [scoreStrip(pane, choice), beaten(pane, choice, step)] : null,
    made ? partsTable(pane, made) : null,
    outcome ? make("p", {}, `What it brought: ${outcome}.`) : null);
}

/** All scores of a round on one line, the chosen ones in colour. */
function scoreStrip(pane, choice) {
  const known = choice.priorities.map((value, each) => ({ value, step: choice.candidates[each] })).filter((each) => each.value !== null);
  if (known.length < 2) return null;
  const values = known.map((each) => each.value);
  const low = Math.min(...values), high = Math.max(...values);
  const at = (value) => 8 + (300 * (value - low)) / (high - low || 1);
  return make("svg:svg", { class: "strip", viewBox: "0 0 316 46", role: "img", "aria-label": `Scores of ${known.length} steps, from ${fmt(low)} to ${fmt(high)}` },
    make("svg:line", { x1: 4, x2: 312, y1: 22, y2: 22, stroke: "var(--line)" }),
    known.slice().reverse().map(({ value, step }) => make("svg:circle", { cx: at(value), cy: 22, r: choice.steps.includes(step) ? 7 : 5, class: choice.steps.includes(step) ? "chosen" : "other", onclick: () => pane.choose(step), onpointerenter: (event) => showTip(event, `${fmt(value)}  ${snippet(pane.model.nodes[step].text, 80)}`), onpointerleave: hideTip })),
    make("svg:text", { x: 4, y: 42 }, fmt(low)), make("svg:text", { x: 312, y: 42, "text-anchor": "end" }, `${fmt(high)} ${nameOfScore(pane.model)}`));
}

function beaten(pane, choice, step) {
  const rows = choice.candidates.map((candidate, each) => ({ candidate, score: choice.priorities[each] }));
  const shown = rows.slice(0, 6);
  if (!shown.some((row) => row.candidate === step)) shown.unshift(rows.find((row) => row.candidate === step));
  const rest = choice.eligible - shown.length;
  return make("ol", { class: "beat", "aria-label": "Scores of the steps it was chosen from" },
    shown.map(({ candidate, score }) => make("li", {}, make("button", { type: "button", class: choice.steps.includes(candidate) ? "chosen" : null, onclick: () => pane.choose(candidate) },
      make("span", {}, fmt(score)), make("span", {}, candidate === 0 ? "the question" : snippet(pane.model.nodes[candidate].text, 60) || "(blank)")))),
    rest > 0 ? make("li", { class: "muted" }, `and ${plural(rest, "step")} with a lower score`) : null);
}

/** The IB-Score term by term. */
function partsTable(pane, made) {
  return make("details", { class: "formula" },
    make("summary", {}, "How the score was made"),
    make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ["what followed", "right", "\u00f7 here", "confid.", "adds"].map((name, each) => make("th", { class: each ? null : "left" }, name)))),
      make("tbody", {}, made.parts.map((part) => make("tr", {},
        make("td", { class: "clip" }, snippet(pane.model.nodes[part.child].text, 40)),
        make("td", {}, percent(part.success)), make("td", {}, `\u00d7${fmt(part.ratio)}`), make("td", {}, percent(part.confidence)), make("td", {}, signed(part.share))))))),
    make("p", {}, `Score ${fmt(made.total)} = (1 + \u03b2) / n \u00b7 \u03a3 (\u03c1 \u2212 1 \u2212 1/\u03b2) \u00b7 confidence, with \u03b2 = ${fmt(made.beta)}, n = ${made.parts.length}; \u03c1 is how right what followed is, divided by how right this step is (${percent(made.success)}).`));
}

function aboutStep(pane, step) {
  const { model, view } = pane;
  const node = model.nodes[step];
  const known = knownAfter(model, view.round);
  const rows = [
    ["right, of all attempts through here", `${percent(known.density[step])} of ${fmt(known.leaves[step])}`],
    ["tokens", fmt(node.tokens)],
    ["confidence (typical token)", percent(node.confidence)],
    ["mean log-probability", fmt(node.mean_logprob, 3)],
    ["IB-Score in the end", fmt(node.ib_score)],
    ["A_GL, from the answers", node.advantage_global === null ? "\u2013" : signed(node.advantage_global)],
    ["\u03bb A_IB, from the step itself", node.advantage_local === null ? "\u2013" : signed(node.advantage_local)],
    ["advantage", advantageOf(node) === null ? "\u2013" : signed(advantageOf(node))],
  ];
  const ends = model.leavesAt.get(step) || [];
  const name = step === 0 ? "The question" : `Step ${model.depth[step]} of its trajectory`;
  return make("section", {},
    make("h3", {}, name, node.parts.length ? null : make("span", { class: "role" }, snippet(node.role, 24))),
    step === 0 ? make("p", { class: "text" }, visible(model.record.question.text)) : stepText(node),
    ends.map((leaf) => make("p", {}, make("span", { class: `mark ${leafKind(model.leaves[leaf])}` }, MARKS[leafKind(model.leaves[leaf])]), ` Trajectory #${leaf + 1} ends here: ${OUTCOMES[leafKind(model.leaves[leaf])]}.`)),
    make("div", { class: "buttons" },
      model.children[step].length && step > 0 && settings.view === "tree" ? make("button", { type: "button", onclick: () => pane.toggle(step) }, view.collapsed.has(step) ? "Unfold what follows" : "Fold what follows") : null),
    make("dl", { class: "figures" }, rows.filter(([, value]) => value !== "\u2013").map(([term, value]) => [make("dt", {}, term), make("dd", {}, value)])));
}

/** Its text, with the tokens that the model was unsure of shaded; parts of other roles say whose they are. */
function stepText(node) {
  if (!node.parts.length) return shaded(node, node.text);
  return node.parts.map((part, each) => [make("span", { class: "role" }, snippet(part.role, 24)), each === 0 ? shaded(node, part.text) : make("p", { class: "text", tabindex: 0 }, visible(part.text))]);
}

/** The beginning `text` of a node, token by token where it is known where they end. */
function shaded(node, text) {
  const characters = Array.from(text);
  const count = node.token_ends && node.logprobs ? node.token_ends.indexOf(characters.length) + 1 : 0;
  if (!count) return make("p", { class: "text", tabindex: 0 }, visible(text.replace(/\n+$/, "")));
  let start = 0;
  const blank = text.length - text.replace(/\n+$/, "").length; // the line feeds that end a step are not shown
  const tokens = node.token_ends.slice(0, count).map((end, each) => {
    const words = visible(characters.slice(start, Math.min(end, characters.length - blank)).join(""));
    start = end;
    const chance = node.logprobs[each] === null ? null : Math.exp(node.logprobs[each]);
    if (chance === null || chance > 0.9) return words;
    return make("span", { title: `probability ${percent(chance)}`, style: { background: `rgba(var(--doubt),${(0.42 * (1 - chance)).toFixed(2)})` } }, words);
  });
  return [make("p", { class: "text doubt", tabindex: 0 }, tokens), make("p", { class: "muted formula" }, "Shaded: tokens that the model was unsure of.")];
}
