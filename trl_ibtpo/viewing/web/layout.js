// Where everything of a tree goes: which steps are drawn, in which rows and columns.

const ROWS = { large: 34, medium: 26, small: 19 };

/**
 * Steps to draw, each with the chain it stands for, its row and its place across.
 *
 * A chain of steps without a branch is one element where chains are folded; what is under a collapsed step is none.
 */
function layOut(model, { axis, fold, unfolded, collapsed, width }) {
  const shown = []; // { step: last of the chain, chain, parent: index in `shown`, row, leaves }
  const total = knownAfter(model, model.rounds).leaves;
  let rows = 0;
  const pending = [{ step: 0, parent: -1, row: 0 }];
  while (pending.length) {
    const { step: head, parent, row } = pending.pop();
    const chain = [head];
    if (head > 0 && fold && !unfolded.has(head)) {
      for (let last = head; ; ) {
        const next = model.children[last];
        if (next.length !== 1 || model.leavesAt.has(last) || model.branched.has(last) || collapsed.has(last)) break;
        last = next[0];
        chain.push(last);
      }
    }
    const step = chain[chain.length - 1];
    const element = { step, chain, parent, row: row >= 0 ? row : rows, leaves: total[step], hidden: collapsed.has(step) && model.children[step].length > 0 };
    const self = shown.push(element) - 1;
    const below = element.hidden ? [] : model.children[step];
    if (!below.length) rows = Math.max(rows, element.row + 1);
    for (let each = below.length - 1; each >= 0; each--) pending.push({ step: below[each], parent: self, row: each === 0 ? element.row : -1 });
  }
  const place = shown.map((element) => (axis === "tokens" ? model.nodes[element.step].end : 0));
  if (axis === "steps") shown.forEach((element, each) => { if (element.parent >= 0) place[each] = place[element.parent] + 1; });
  const longest = place.reduce((most, each) => Math.max(most, each), 1);
  const height = rows <= 16 ? ROWS.large : rows <= 32 ? ROWS.medium : ROWS.small;
  const left = 22, right = 84, top = 22;
  const inner = Math.max(width, 300) - left - right;
  shown.forEach((element, each) => {
    element.x = left + (inner * place[each]) / longest;
    element.y = top + height * (element.row + 0.5);
  });
  return { shown, rows, longest, rowHeight: height, left, inner, width: inner + left + right, height: top + height * rows + 26 };
}

/** Steps to collapse so that only one trajectory and its branch points are left. */
function outside(model, number) {
  const path = new Set([0, ...pathTo(model, model.leaves[number].node)]);
  const steps = new Set();
  path.forEach((step) => model.children[step].forEach((child) => {
    if (!path.has(child) && model.children[child].length) steps.add(child);
  }));
  return steps;
}

/** From a step down or up into the row of the next, round the corner; empty where they are in one row. */
function turnPath(x0, y0, x1, y1) {
  if (y0 === y1) return "";
  const bend = bendOf(x0, y0, x1, y1);
  return `M${x0} ${y0}V${y1 - Math.sign(y1 - y0) * bend}Q${x0} ${y1} ${x0 + bend} ${y1}`;
}

/** Straight on from there to the end of the step. */
const straightPath = (x0, y0, x1, y1) => `M${x0 + (y0 === y1 ? 0 : bendOf(x0, y0, x1, y1))} ${y1}H${x1}`;
const bendOf = (x0, y0, x1, y1) => Math.min(16, (x1 - x0) / 2, Math.abs(y1 - y0));

/** Round figures for an axis. */
function ticks(most, count = 6) {
  const rough = Math.max(1, most / count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, power * [1, 2, 5, 10].find((factor) => factor * power >= rough));
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, each) => each * step);
}
