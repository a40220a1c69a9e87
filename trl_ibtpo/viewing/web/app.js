// The page as a whole: which tree is open, what the controls say, keys, and what a server sends while a run trains.

const settings = { view: "tree", colour: "density", axis: "tokens", fold: false };
let panes = []; // one, or two beside each other
let wanted = 0; // of several trees asked for quickly only the last is shown

function say(text) { byId("status").textContent = text; }

/** Open a tree; where two are side by side, the second keeps the question of the first. */
async function openTree(entry, { beside = "same" } = {}) {
  const turn = ++wanted;
  showCurrent(entry);
  const second = beside === "same" && panes.length > 1 ? counterpart(entry) : typeof beside === "number" ? beside : null;
  const entries = second === null || second < 0 ? [entry] : [entry, second];
  let models;
  try {
    models = await Promise.all(entries.map(loadTree));
  } catch (error) {
    if (turn === wanted) byId("panes").replaceChildren(make("p", {}, `This tree cannot be shown: ${visible(String(error.message || error))}`));
    return;
  }
  if (turn !== wanted) return;
  panes.forEach((pane) => pane.togglePlay(true));
  panes = models.map((model, each) => new Pane(entries[each], model, each === 0));
  document.querySelector(".layout").classList.toggle("beside", panes.length > 1);
  byId("panes").replaceChildren(...panes.map((pane) => pane.element));
  byId("tables").replaceChildren(...panes.map((pane) => pane.table));
  if (!settings.foldChosen) settings.fold = byId("fold").checked = models.some((model) => model.nodes.length > 160);
  drawCompare(entry);
  search(); // which draws
  drawInspector(panes[0]);
  say(`Tree ${byId("where").textContent}: ${snippet(index.entries[entry].question, 80)}`);
  if (!index.served) location.hash.slice(1) !== String(entry) && history.replaceState(null, "", `#${entry}`);
  const at = list.order.indexOf(entry); // the next ones are likely to be asked for
  for (const near of [list.order[at + 1], list.order[at - 1]]) if (near !== undefined) loadTree(near).catch(() => {});
}

/** Other trees of the same question: of other runs first, the nearest training step first. */
function sameQuestion(entry) {
  const self = index.entries[entry];
  const distance = (each) => Math.abs((index.entries[each].step ?? 0) - (self.step ?? 0));
  return index.entries.map((_, each) => each)
    .filter((each) => each !== entry && index.entries[each].key === self.key)
    .sort((a, b) => (index.entries[a].run === self.run) - (index.entries[b].run === self.run) || distance(a) - distance(b));
}

function counterpart(entry) {
  const run = index.entries[panes[1].entry].run;
  const same = sameQuestion(entry);
  return same.find((each) => index.entries[each].run === run) ?? same[0] ?? null;
}

function drawCompare(entry) {
  const same = sameQuestion(entry).slice(0, 200);
  const select = byId("compare");
  byId("compare-label").hidden = !same.length;
  select.replaceChildren(make("option", { value: "" }, "nothing"), ...same.map((each) => make("option", { value: each }, placeOf(index.entries[each]))));
  select.value = panes.length > 1 ? String(panes[1].entry) : "";
}

function redraw() { panes.forEach((pane) => pane.draw()); }

function search(forward = false) {
  const words = byId("search").value;
  const found = panes.map((pane) => pane.search(words));
  const count = found.reduce((sum, each) => sum + each.length, 0);
  byId("hits").textContent = words.trim() ? plural(count, "step") : "";
  if (!forward || !count) return redraw();
  const [pane, steps] = panes.map((each, place) => [each, found[place]]).find(([, each]) => each.length);
  pane.choose(steps[(steps.indexOf(pane.view.step) + 1) % steps.length]);
  const item = pane.element.querySelector(`[data-step="${pane.view.step}"]`);
  if (item) item.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function setUpControls() {
  byId("previous").addEventListener("click", () => stepThrough(-1));
  byId("next").addEventListener("click", () => stepThrough(1));
  byId("compare").addEventListener("change", (event) => openTree(panes[0].entry, { beside: event.target.value === "" ? null : Number(event.target.value) }));
  for (const radio of document.querySelectorAll("input[name=view]")) radio.addEventListener("change", () => { settings.view = radio.value; redraw(); drawInspector(panes[0]); });
  for (const name of ["colour", "axis"]) byId(name).addEventListener("change", (event) => { settings[name] = event.target.value; redraw(); });
  byId("fold").addEventListener("change", (event) => { settings.fold = event.target.checked; settings.foldChosen = true; panes.forEach((pane) => pane.view.unfolded.clear()); redraw(); });
  const zoom = (factor) => { panes.forEach((pane) => { pane.view.zoom = Math.min(16, Math.max(1, pane.view.zoom * factor)); }); redraw(); };
  byId("larger").addEventListener("click", () => zoom(1.5));
  byId("smaller").addEventListener("click", () => zoom(1 / 1.5));
  byId("search").addEventListener("input", () => search());
  byId("search").addEventListener("keydown", (event) => { if (event.key === "Enter") search(true); });
  let before = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; redraw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { theme = null; redraw(); });
}

function setUpTheme() {
  const names = { "": ["\u25d0", "as the system"], light: ["\u2600", "light"], dark: ["\u263d", "dark"] };
  const button = byId("theme");
  const show = (chosen) => {
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    button.textContent = names[chosen][0];
    button.setAttribute("aria-label", `Colours: ${names[chosen][1]}`);
    button.title = `Colours: ${names[chosen][1]}`;
    theme = null;
    redraw();
  };
  button.addEventListener("click", () => { const order = Object.keys(names); show(order[(order.indexOf(document.documentElement.dataset.theme || "") + 1) % order.length]); });
  show("");
}

const KEYS = {
  "j k": "next and previous tree", "\u2190 \u2192 \u2191 \u2193": "walk through a tree, once it has the focus", Enter: "fold or unfold what follows a step",
  "[ ]": "one round of growth back and forth", p: "replay the growth", l: "tree or list", c: "next colour", f: "fold chains",
  o: "fold everything outside the chosen trajectory", "/": "search in the steps", t: "move the focus to the tree", Esc: "nothing chosen, nothing searched", "?": "this help",
};

function setUpHelp() {
  const dialog = byId("help");
  dialog.append(
    make("h2", { id: "help-title" }, "How to read this"),
    make("p", {}, "A language model was asked one question several times. Every line from left to right is one attempt; its colour says how often what follows ended right. Attempts share their beginning where their lines are one."),
    make("p", {}, "After the first attempts, each round looked for the step where another attempt would tell most, and tried again from there: a ring marks such a step, the small number is the round. Move the slider to see the tree grow, and click a ring to see why that step was chosen."),
    make("p", {}, "The IB-Score that chooses weighs two things: how unsure the model was of what it wrote next, and whether ways of going on that the model was sure of turned out better than the others."),
    make("p", {}, "Training then rewards each step by what came of it: the advantage of a step is positive where attempts through it did better than all attempts together."),
    make("dl", { class: "keys" }, Object.entries(KEYS).map(([keys, what]) => [make("dt", {}, keys.split(" ").map((key) => [make("kbd", {}, key), " "])), make("dd", {}, what)])),
    make("form", { method: "dialog" }, make("button", {}, "Close")));
  byId("help-button").addEventListener("click", () => dialog.showModal());
}

function setUpKeys() {
  const cycle = (id) => { const select = byId(id); select.selectedIndex = (select.selectedIndex + 1) % select.options.length; select.dispatchEvent(new Event("change")); };
  const actions = {
    j: () => stepThrough(1), k: () => stepThrough(-1),
    "[": () => panes.forEach((pane) => pane.replay(pane.view.round - 1)), "]": () => panes.forEach((pane) => pane.replay(pane.view.round + 1)),
    p: () => panes.forEach((pane) => pane.togglePlay()),
    l: () => document.querySelector(`input[name=view][value=${settings.view === "tree" ? "list" : "tree"}]`).click(),
    c: () => cycle("colour"), f: () => byId("fold").click(),
    o: () => panes[0].focusOn(panes[0].view.leaf ?? (panes[0].model.leavesAt.get(panes[0].view.step) || [0])[0]),
    "/": () => byId("search").focus(), "?": () => byId("help").showModal(),
    t: () => { const item = focusStep(panes[0], panes[0].view.step); if (item) item.scrollIntoView({ block: "nearest" }); },
    Escape: () => { byId("search").value = ""; panes.forEach((pane) => { pane.view.leaf = null; pane.view.collapsed.clear(); }); search(); hideTip(); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || !panes.length) return;
    if (event.target instanceof Element && event.target.matches("input:not([type=radio],[type=checkbox],[type=range]), select, textarea") && event.key !== "Escape") return;
    const action = actions[event.key];
    if (action) { event.preventDefault(); action(); }
  });
}

function drawProblems() {
  const box = byId("problems");
  box.hidden = !index.problems.length;
  box.querySelector("summary").textContent = `${plural(index.problems.length, "record")} could not be read`;
  box.querySelector("ul").replaceChildren(...index.problems.slice(0, 200).map((problem) => make("li", {}, visible(problem))));
}

/** Ask the server for what has come since, every other second. */
async function follow() {
  const live = byId("live");
  live.hidden = false;
  try {
    const answer = await fetch(`index?version=${index.version}&since=${index.entries.length}`);
    if (!answer.ok) throw new Error(String(answer.status));
    const news = await answer.json();
    const again = news.version !== index.version;
    const before = again ? 0 : index.entries.length;
    Object.assign(index, { version: news.version, runs: news.runs, problems: news.problems, entries: [...index.entries.slice(0, before), ...news.entries] });
    bySteps = null;
    live.textContent = "following";
    drawCurves();
    drawProblems();
    if (news.entries.length || again) {
      arrange();
      say(`${plural(news.entries.length, "new tree")}`);
      if (again || !panes.length) openTree(list.order[0] ?? 0);
      else drawCompare(panes[0].entry);
    }
  } catch (error) {
    live.textContent = "the run's page is no longer served";
  }
  setTimeout(follow, 2000);
}

function start() {
  if (innerWidth < 700) byId("list-box").open = false;
  byId("title").textContent = visible(index.runs.map((run) => run.name).join(" and "));
  setUpTheme();
  setUpHelp();
  setUpControls();
  setUpKeys();
  setUpList();
  drawCurves();
  drawProblems();
  const asked = location.hash.length > 1 ? Number(location.hash.slice(1)) : NaN;
  const first = index.entries[asked] ? asked : list.order[0];
  if (first === undefined) byId("panes").append(make("p", { class: "muted" }, index.served ? "No tree has been recorded yet." : "No trees were recorded; the run was made without `log_trees`."));
  else openTree(first, { beside: index.runs.length > 1 ? (sameQuestion(first)[0] ?? null) : null });
  if (index.served) follow();
}

start();
