// The list of trees, sorted and filtered: only the rows in sight are in the page, so it may be long.

const ROW = 54;

/** How telling a tree is: right and wrong answers, and steps that differ in worth. */
const interest = (entry) => (entry.effective ? 1 : 0) + 1 - Math.abs((entry.success ?? 0) - 0.5) + Math.min(1, entry.advantage_spread ?? 0);

const SORTS = {
  interesting: ["most to see", (entry) => -interest(entry)],
  newest: ["newest step", (entry) => -(entry.step ?? -1)],
  oldest: ["oldest step", (entry) => entry.step ?? Infinity],
  easiest: ["success, highest", (entry) => -(entry.success ?? -1)],
  hardest: ["success, lowest", (entry) => entry.success ?? 2],
  effective: ["right and wrong answers first", (entry) => (entry.effective ? 0 : 1)],
  scores: ["spread of IB-Scores", (entry) => -(entry.score_spread ?? -1)],
  advantages: ["spread of advantages", (entry) => -(entry.advantage_spread ?? -1)],
  tokens: ["tokens generated", (entry) => -(entry.tokens ?? -1)],
};

const list = { order: [], current: -1, prefix: 0 };

/** Characters that all questions begin with, in whole words: they tell none from another. */
function commonPrefix(entries) {
  if (entries.length < 2) return 0;
  let common = entries[0].question;
  for (const { question } of entries) {
    let same = 0;
    while (same < common.length && common[same] === question[same]) same++;
    common = common.slice(0, same);
    if (!common) return 0;
  }
  const words = common.lastIndexOf(" ") + 1;
  return words >= 16 && entries.some(({ question }) => question.length > words) ? words : 0;
}

function setUpList() {
  const sort = byId("sort");
  for (const [key, [name]] of Object.entries(SORTS)) sort.append(make("option", { value: key }, name));
  sort.value = index.served ? "newest" : "interesting";
  for (const [id, event] of [["sort", "change"], ["filter", "input"], ["undecided", "change"]]) byId(id).addEventListener(event, () => { arrange(); byId("trees").scrollTop = 0; });
  byId("trees").addEventListener("scroll", drawRows, { passive: true });
  byId("trees").addEventListener("keydown", (event) => {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const at = Math.max(0, list.order.indexOf(list.current));
    const to = Math.max(0, Math.min(list.order.length - 1, at + moves[event.key]));
    if (list.order.length) openTree(list.order[to]);
  });
  new ResizeObserver(drawRows).observe(byId("trees"));
  arrange();
}

/** Sort and filter, then show the rows in sight. */
function arrange() {
  const words = byId("filter").value.trim().toLowerCase();
  const value = SORTS[byId("sort").value][1];
  const entries = index.entries;
  list.order = entries.map((_, each) => each).filter((each) => {
    const entry = entries[each];
    if (byId("undecided").checked && !entry.effective) return false;
    return !words || entry.question.toLowerCase().includes(words) || String(entry.step) === words.replace(/^step /, "");
  });
  list.prefix = commonPrefix(entries);
  const keys = entries.map(value);
  list.order.sort((a, b) => keys[a] - keys[b] || a - b);
  byId("count").textContent = list.order.length === entries.length ? fmt(entries.length) : `${fmt(list.order.length)} of ${fmt(entries.length)}`;
  drawRows();
  drawPlace();
}

function drawRows() {
  const box = byId("trees");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 2);
  const last = Math.min(list.order.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 2);
  const rows = [];
  for (let each = first; each < last; each++) rows.push(rowOf(list.order[each], each));
  box.replaceChildren(make("div", { role: "presentation", style: { height: `${list.order.length * ROW}px` } }), ...rows);
  if (!list.order.length) box.replaceChildren(make("p", { class: "muted", style: { padding: "10px" } }, "No tree fits."));
  box.setAttribute("aria-activedescendant", list.current >= 0 ? `row-${list.current}` : "");
}

function rowOf(each, place) {
  const entry = index.entries[each];
  const wrong = entry.leaves - entry.right;
  const run = index.runs.length > 1 ? `${visible(index.runs[entry.run].name)} \u00b7 ` : "";
  const step = entry.step === null ? snippet(entry.file, 24) : `step ${entry.step}`;
  const sorted = { scores: entry.score_spread, advantages: entry.advantage_spread, tokens: entry.tokens }[byId("sort").value];
  const spread = sorted === undefined ? "" : ` \u00b7 ${fmt(sorted)}${byId("sort").value === "tokens" ? " tokens" : ""}`;
  return make("div", { class: "row", id: `row-${each}`, role: "option", "aria-selected": String(each === list.current), "aria-setsize": list.order.length, "aria-posinset": place + 1, "data-entry": each, style: { top: `${place * ROW}px` }, onclick: () => openTree(each) },
    make("span", { class: "q" }, (list.prefix ? "\u2026 " : "") + snippet(entry.question.slice(list.prefix), 90) || "(no question)"),
    make("span", { class: "meta" }, `${run}${step} \u00b7 ${entry.success === null ? "not scored" : `${entry.right} of ${entry.leaves} right`}${spread}`),
    entry.success === null ? make("span", { class: "bar" }) : make("span", { class: "bar", "aria-hidden": "true" }, make("i", { style: { flex: entry.right } }), make("b", { style: { flex: wrong } })));
}

/** Mark the tree that is open, and bring its row into sight. */
function showCurrent(entry) {
  list.current = entry;
  const place = list.order.indexOf(entry);
  const box = byId("trees");
  if (place >= 0 && (place * ROW < box.scrollTop || (place + 1) * ROW > box.scrollTop + box.clientHeight)) box.scrollTop = place * ROW - box.clientHeight / 2 + ROW / 2;
  drawRows();
  drawPlace();
}

function drawPlace() {
  const at = list.order.indexOf(list.current);
  byId("where").textContent = at < 0 ? "" : `${fmt(at + 1)} of ${fmt(list.order.length)}`;
  byId("previous").disabled = at <= 0;
  byId("next").disabled = at < 0 ? !list.order.length : at >= list.order.length - 1;
}

function stepThrough(way) {
  const at = list.order.indexOf(list.current);
  const next = list.order[at < 0 ? 0 : at + way];
  if (next !== undefined) openTree(next);
}
