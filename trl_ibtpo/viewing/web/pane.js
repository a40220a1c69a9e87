// A tree with all that belongs to it: question, drawing or list, replay of its growth, its trajectories.

class Pane {
  constructor(entry, model, first) {
    const rounds = model.rounds;
    Object.assign(this, { entry, model, first, hits: new Set() });
    // The most telling place to begin: what the first round chose, seen in the whole tree.
    const round = model.record.rounds.find((each) => each.steps.length);
    const step = round ? round.steps[0] : (model.children[0] || [0])[0] || 0;
    this.view = { round: rounds, step, leaf: null, collapsed: new Set(), unfolded: new Set(), zoom: 1 };
    this.canvas = make("div", { class: "canvas" });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.flat = make("div", { class: "flat" });
    this.slider = make("input", { type: "range", min: 0, max: rounds, value: rounds, "aria-label": "Rounds of growth shown", oninput: () => this.replay(Number(this.slider.value)) });
    this.said = make("output", {});
    this.playing = null;
    this.play = make("button", { type: "button", onclick: () => this.togglePlay(), "aria-label": "Replay the growth" }, "\u25b6 Replay");
    this.legend = make("div", { class: "legend" });
    this.table = make("div", { class: "scroll" });
    this.element = make("section", { class: "pane", "aria-label": `Tree ${entry + 1}` },
      make("h3", {}, placeOf(index.entries[entry])),
      questionBox(model.record.question),
      make("p", { class: "story" }, story(model), rounds ? make("span", { class: "muted" }, " Click a ring to see why that step was chosen; move the slider to see the tree grow.") : null),
      notes(model),
      this.replayBox = make("div", { class: "replay", hidden: rounds === 0 }, this.play, this.slider, this.said),
      this.canvas, this.legend, this.flat);
  }

  draw() {
    const asTree = settings.view === "tree";
    this.canvas.hidden = this.legend.hidden = !asTree;
    this.flat.hidden = asTree;
    if (asTree) {
      this.flat.replaceChildren();
      drawTree(this);
      drawLegend(this);
    } else {
      this.canvas.replaceChildren();
      drawList(this);
    }
    drawTrajectories(this);
    this.slider.value = this.view.round;
    const { round } = this.view;
    const text = round === 0 ? "the first attempts" : `after round ${round} of ${this.model.rounds}`;
    this.said.textContent = text;
    this.slider.setAttribute("aria-valuetext", text);
  }

  /** Show the tree as it was after a round, and why that round chose what it chose. */
  replay(round) {
    this.view.round = Math.max(0, Math.min(this.model.rounds, round));
    const choice = this.model.record.rounds.find((each) => each.round === this.view.round);
    const leaf = this.model.leaves.find((each) => each.round === this.view.round && each.branched_after !== null);
    if (this.view.round === 0) this.view.step = 0;
    else if (choice && choice.steps.length) this.view.step = choice.steps[0];
    else if (leaf) this.view.step = leaf.branched_after;
    this.draw();
    drawInspector(this, this.view.round);
    say(this.said.textContent);
  }

  /** Say why a round chose its step, without changing what is drawn. */
  explain(round) { drawInspector(this, round); }

  togglePlay(stop = false) {
    if (this.playing || stop) {
      clearInterval(this.playing);
      this.playing = null;
    } else {
      if (this.view.round >= this.model.rounds) this.replay(0);
      this.playing = setInterval(() => {
        if (this.view.round >= this.model.rounds || !this.element.isConnected) this.togglePlay(true);
        else this.replay(this.view.round + 1);
      }, 1300);
    }
    this.play.textContent = this.playing ? "\u23f8 Pause" : "\u25b6 Replay";
  }

  choose(step, { leaf = this.view.leaf } = {}) {
    this.view.step = step;
    this.view.leaf = leaf;
    this.reveal(step);
    this.draw();
    drawInspector(this);
  }

  chooseLeaf(number) {
    const same = this.view.leaf === number;
    this.view.leaf = same ? null : number;
    this.view.step = this.model.leaves[number].node;
    if (!same) this.reveal(this.view.step);
    this.draw();
    drawInspector(this);
    say(same ? "No trajectory is chosen" : `Trajectory ${number + 1}, ${OUTCOMES[leafKind(this.model.leaves[number])]}`);
  }

  /** Undo what hides a step. */
  reveal(step) {
    for (const one of pathTo(this.model, step)) if (one !== step) this.view.collapsed.delete(one);
    this.view.collapsed.delete(0);
    if (knownAfter(this.model, this.view.round).leaves[step] === 0) this.view.round = this.model.rounds;
    if (settings.fold && settings.view === "tree") {
      const drawn = layOut(this.model, { axis: settings.axis, fold: true, unfolded: this.view.unfolded, collapsed: this.view.collapsed, width: 800 }).shown;
      const chain = drawn.find((element) => element.chain.includes(step) && element.step !== step);
      if (chain) this.view.unfolded.add(chain.chain[0]);
    }
  }

  /** Fold or unfold what is under a step, or the chain that it stands for. */
  toggle(step) {
    const { collapsed, unfolded } = this.view;
    const element = this.layout && this.layout.shown.find((each) => each.step === step);
    if (element && element.chain.length > 1) unfolded.add(element.chain[0]);
    else if (collapsed.has(step)) collapsed.delete(step);
    else if (this.model.children[step].length) collapsed.add(step);
    this.view.step = step;
    this.draw();
    drawInspector(this);
    say(collapsed.has(step) ? "Folded" : "Unfolded");
  }

  /** Fold everything outside the chosen trajectory, or unfold everything. */
  focusOn(number) {
    this.view.collapsed = this.view.collapsed.size || number === null ? new Set() : outside(this.model, number);
    this.draw();
    drawInspector(this);
  }

  key(event) {
    const { step } = this.view;
    if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home"].includes(event.key)) {
      const next = neighbour(this, step, event.key);
      this.choose(next);
      const item = focusStep(this, next);
      if (item) item.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else if (event.key === "Enter" || event.key === " ") {
      this.toggle(step);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  search(words) {
    this.hits = new Set();
    const wanted = words.trim().toLowerCase();
    if (wanted) this.model.nodes.forEach((node, step) => { if (step && node.text.toLowerCase().includes(wanted)) this.hits.add(step); });
    return [...this.hits];
  }
}

const placeOf = (entry) => {
  const run = index.runs.length > 1 ? `${index.runs[entry.run].name} \u00b7 ` : "";
  return visible(`${run}${entry.step === null ? entry.file : `training step ${entry.step}`}`);
};

function questionBox(question) {
  const box = make("div", { class: "asked", tabindex: 0, role: "region", "aria-label": "Question" });
  const messages = question.messages && question.messages.length > 1 ? question.messages : null;
  if (messages) messages.forEach((message) => box.append(make("b", {}, visible(message.role)), visible(message.content), "\n"));
  else box.append(visible(question.text) || "The question was not recorded.");
  return box;
}

/** What a reader should know about a record that is not of today, or not of a tree trainer. */
function notes(model) {
  const { missing, notes: said } = model.record;
  const lines = [...said];
  if (missing.length) lines.push(`Not recorded: ${missing.join(", ")}.`);
  return lines.length ? make("p", { class: "muted" }, visible(lines.join(" "))) : null;
}

function drawLegend(pane) {
  const titles = { density: ["0% right", "100%"], confidence: ["unsure", "sure"], advantage: [fmt(-pane.model.largest), signed(pane.model.largest)] };
  const [low, high] = titles[settings.colour];
  const bar = make("span", { class: "scale", style: { background: `linear-gradient(90deg, ${stops(settings.colour).join(",")})` } });
  const sign = (...shapes) => make("svg:svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, shapes);
  const key = (name, ...shapes) => make("span", {}, sign(...shapes), name);
  pane.legend.replaceChildren(
    make("span", {}, low, bar, high),
    make("span", {}, "thick: many attempts"),
    key("branched here, in round 1, 2, \u2026", make("svg:circle", { cx: 8, cy: 8, r: 6, fill: "none", stroke: "currentColor", "stroke-width": 1.6 })),
    pane.model.nodes.some((node) => node.parts.length > 1) ? key("tool result", make("svg:rect", { class: "tooled", x: 5, y: 5, width: 6, height: 6, rx: 1.5 })) : "",
    ...["right", "wrong", "unscored"].map((kind) => key(OUTCOMES[kind], leafMark(kind, 8, 8))));
}
