// What can be said of a tree: who is under whom, what was known after each round, and why a round chose what it chose.

function buildModel(record) {
  const { nodes, leaves } = record;
  const children = nodes.map(() => []);
  const depth = nodes.map(() => 0);
  nodes.forEach((node, step) => {
    if (step === 0) return;
    children[node.parent].push(step);
    depth[step] = depth[node.parent] + 1;
  });
  const leavesAt = new Map();
  leaves.forEach((leaf, number) => leavesAt.set(leaf.node, [...(leavesAt.get(leaf.node) || []), number]));
  const rounds = Math.max(0, ...leaves.map((leaf) => leaf.round), ...record.rounds.map((round) => round.round));
  const model = { record, nodes, leaves, children, depth, leavesAt, rounds, known: new Map() };
  model.branched = new Map(); // step to the rounds that branched after it
  leaves.forEach((leaf) => {
    if (leaf.round > 0 && leaf.branched_after !== null) {
      const there = model.branched.get(leaf.branched_after) || [];
      if (!there.includes(leaf.round)) model.branched.set(leaf.branched_after, [...there, leaf.round].sort((a, b) => a - b));
    }
  });
  model.rewards = [...new Set(leaves.flatMap((leaf) => Object.keys(leaf.rewards)))];
  const sizes = nodes.slice(1).map((node) => Math.abs(advantageOf(node) ?? 0));
  model.largest = sizes.reduce((most, size) => Math.max(most, size), 0) || 1;
  return model;
}

const advantageOf = (node) => (node.advantage_global === null ? null : node.advantage_global + (node.advantage_local ?? 0));
const leafKind = (leaf) => (leaf.success === null ? "unscored" : leaf.success >= 0.5 ? "right" : "wrong");
const MARKS = { right: "\u2713", wrong: "\u2717", unscored: "\u25c7" };
const OUTCOMES = { right: "right", wrong: "wrong", unscored: "not scored" };

/** Leaves under every step after a round, and the mean success of those that have one. */
function knownAfter(model, round) {
  if (model.known.has(round)) return model.known.get(round);
  const size = model.nodes.length;
  const leaves = new Int32Array(size), scored = new Int32Array(size), sums = new Float64Array(size);
  model.leaves.forEach((leaf) => {
    if (leaf.round > round) return;
    leaves[leaf.node] += 1;
    if (leaf.success !== null) { scored[leaf.node] += 1; sums[leaf.node] += leaf.success; }
  });
  for (let step = size - 1; step > 0; step--) {
    const parent = model.nodes[step].parent;
    leaves[parent] += leaves[step]; scored[parent] += scored[step]; sums[parent] += sums[step];
  }
  const known = { leaves, scored, density: Array.from(sums, (sum, step) => (scored[step] ? sum / scored[step] : null)) };
  model.known.set(round, known);
  return known;
}

/** Steps from the first of the completion to `step`. */
function pathTo(model, step) {
  const path = [];
  for (; step > 0; step = model.nodes[step].parent) path.unshift(step);
  return path;
}

/** How the steps of a leaf divide into those it shares with the one it branched from, and its own. */
function sharedSteps(model, number) {
  const leaf = model.leaves[number];
  const path = pathTo(model, leaf.node);
  const at = leaf.branched_after > 0 ? path.indexOf(leaf.branched_after) + 1 : 0;
  return { shared: path.slice(0, at), own: path.slice(at) };
}

/** What the IB-Score of a step was made of before a round; null where it cannot be told from the record. */
function scoreParts(model, step, round, score) {
  const beta = model.record.settings.ib_beta;
  const { density, leaves } = knownAfter(model, round - 1);
  const kids = model.children[step].filter((child) => leaves[child] > 0);
  if (typeof beta !== "number" || !kids.length || kids.some((child) => model.nodes[child].confidence === null)) return null;
  const counted = kids.filter((child) => density[child] !== null);
  const parts = (counted.length ? counted : kids).map((child) => {
    const ratio = density[child] === null || !density[step] ? 1 : density[child] / density[step];
    const gain = ratio - (1 + 1 / beta);
    return { child, success: density[child], ratio, gain, confidence: model.nodes[child].confidence };
  });
  parts.forEach((part) => { part.share = ((1 + beta) / parts.length) * part.gain * part.confidence; });
  const total = parts.reduce((sum, part) => sum + part.share, 0);
  // With rounds that overlap, or rewards scaled since, more was or less was known then: say nothing rather than that.
  if (score !== null && Math.abs(total - score) > 0.01 * Math.max(1, Math.abs(score))) return null;
  return { parts, total, beta, success: density[step] };
}

/** Why a round chose a step, in plain words: a list of paragraphs. */
function reasons(model, choice, step) {
  const method = model.record.method.branching;
  const others = choice.eligible - 1;
  const place = choice.candidates.indexOf(step);
  const score = place >= 0 ? choice.priorities[place] : null;
  if (others < 1) return ["It was the only step that could be branched."];
  if (method === "entropy_fork") {
    return [`It was drawn at random from the 5% of ${choice.eligible} tokens at which the model was most uncertain.`];
  }
  if (method === "random") return [`It was drawn at random from ${choice.eligible} steps.`];
  const better = choice.priorities.filter((value, each) => each !== place && value > score);
  const lead = better.length
    ? `Its ${nameOfScore(model)} was number ${better.length + 1} of ${choice.eligible}: those above it ${choice.deferred.length ? "had a branch under way, or " : ""}were chosen in the same round.`
    : `Its ${nameOfScore(model)} was the highest of ${choice.eligible} steps.`;
  if (method === "confidence") {
    return [lead, `What the model wrote next, it wrote with a mean probability of ${percent(-score)} a token: the least sure of all. Rewards were not looked at.`];
  }
  if (method !== "ib") return model.record.method.uses_rewards === false ? [lead, "Rewards were not looked at."] : [lead];
  const made = scoreParts(model, step, choice.round, score);
  if (!made) return [lead];
  const { parts } = made;
  const best = parts.reduce((most, part) => (part.share > most.share ? part : most));
  const doubt = parts.reduce((sum, part) => sum + part.confidence, 0) / parts.length;
  const least = `The model was in doubt here: the tokens it wrote next had a typical probability of ${percent(doubt)}. The more doubt, the more another attempt can find out.`;
  if (parts.length === 1) return [lead, `Only one attempt had gone on from here, so its answer could not yet tell this step from others. ${least}`];
  if (made.success === 0) return [lead, `All attempts through here had been wrong, so answers could not tell its continuations apart. ${least}`];
  if (parts.every((part) => Math.abs(part.ratio - 1) < 1e-9)) return [lead, `All ways to go on from here had ended equally well so far, so answers could not tell them apart. ${least}`];
  return [lead,
    `The ways to go on from here had ended differently. After \u201c${snippet(model.nodes[best.child].text, 40)}\u201d ${percent(best.success)} of the attempts were right, against ${percent(made.success)} of all that came through here, and the model writes that continuation with a typical probability of ${percent(best.confidence)} a token.`,
    "Where a continuation that the model is sure of pays off, the tree looks closer."];
}

function nameOfScore(model) {
  return { ib: "IB-Score", confidence: "doubt" }[model.record.method.branching] || "priority";
}

const CHOICES = {
  ib: "chose the most informative step so far",
  confidence: "chose the step after which the model was least sure",
  random: "drew a step at random",
  surprisal: "chose the token that surprised the model most",
  entropy_fork: "drew a token from the 5% where the model was most uncertain",
  pivot: "drew a step of an attempt that had failed",
  contrast: "chose the step where another outcome was likeliest for its cost",
};

/** One sentence about the whole tree. */
function story(model) {
  const kinds = model.leaves.map(leafKind);
  const count = (kind) => kinds.filter((each) => each === kind).length;
  const first = model.leaves.filter((leaf) => leaf.round === 0).length;
  const unscored = count("unscored") ? `, ${count("unscored")} not scored` : "";
  const ends = `${plural(model.leaves.length, "attempt")} at one question: ${count("right")} ended right, ${count("wrong")} wrong${unscored}.`;
  if (!model.rounds) return `${ends} All started at the question; none shares its beginning with another.`;
  const chosen = CHOICES[model.record.method.branching] || "chose where to branch";
  return `${ends} ${first} started at the question. Then ${plural(model.rounds, "round")}, one after the other, ${chosen} and tried again from there.`;
}
