// Curves of the runs: small, side by side, every point a way to the trees grown there.

const WIDE = 200, HIGH = 64;

function drawCurves() {
  const names = [...new Set(index.runs.flatMap((run) => run.curves.map((curve) => curve.name)))];
  const box = byId("run");
  box.hidden = !names.length;
  const scrolled = box.scrollLeft;
  box.replaceChildren(...(index.runs.length > 1 ? [legendOfRuns()] : []), ...names.map(drawCurve));
  box.scrollLeft = scrolled;
}

function legendOfRuns() {
  return make("div", { class: "legend-runs" }, index.runs.map((run, each) => make("span", {},
    make("svg:svg", { width: 26, height: 10, "aria-hidden": "true" }, make("svg:line", { class: `line-${each % 3}`, x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2 })), ` ${visible(run.name)}`)));
}

function drawCurve(name) {
  const curves = index.runs.map((run) => run.curves.find((curve) => curve.name === name));
  const points = curves.flatMap((curve) => (curve ? curve.points : []));
  const last = points.reduce((most, [step]) => Math.max(most, step), 1);
  const first = points.reduce((least, [step]) => Math.min(least, step), last);
  let low = points.reduce((least, [, value]) => Math.min(least, value), Infinity);
  let high = points.reduce((most, [, value]) => Math.max(most, value), -Infinity);
  if (low === high) { low -= 0.5; high += 0.5; }
  const x = (step) => 4 + ((WIDE - 8) * (step - first)) / (last - first || 1);
  const y = (value) => 6 + (HIGH - 20) * (1 - (value - low) / (high - low));
  const lines = curves.map((curve, each) => curve && make("svg:path", { class: `line-${each % 3}`, fill: "none", "stroke-width": 1.6, "vector-effect": "non-scaling-stroke", d: `M${smooth(curve.points).map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}` }));
  // Dots are lines of no length with round ends: the drawing is stretched, they are not.
  const dots = curves.map((curve, each) => curve && make("svg:path", { class: `dots line-${each % 3}`, "vector-effect": "non-scaling-stroke", d: thin(curve.points.filter(([step]) => treesAt(each, step).length)).map(([step, value]) => `M${x(step).toFixed(1)} ${y(value).toFixed(1)}h0`).join("") || null }));
  const marker = make("svg:line", { y1: 2, y2: HIGH - 12, stroke: "var(--muted)", "stroke-dasharray": "2 2", visibility: "hidden" });
  const values = curves.map((curve) => curve && curve.points[curve.points.length - 1][1]).filter((value) => value !== undefined && value !== null);
  let at = null; // [run, step] under the pointer or chosen by keys
  const steps = curves.flatMap((curve, each) => (curve ? curve.points.map(([step]) => [each, step]) : [])).filter(([each, step]) => treesAt(each, step).length);
  const point = (found) => {
    at = found;
    if (!found) return marker.setAttribute("visibility", "hidden");
    marker.setAttribute("x1", x(found[1])); marker.setAttribute("x2", x(found[1])); marker.setAttribute("visibility", "visible");
  };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const step = first + ((last - first) * (((event.clientX - box.left) / box.width) * WIDE - 4)) / (WIDE - 8);
    return steps.reduce((best, each) => (!best || Math.abs(each[1] - step) < Math.abs(best[1] - step) ? each : best), null);
  };
  const words = ([run, step]) => {
    const curve = curves[run];
    const value = curve.points.find((each) => each[0] === step)[1];
    return `${index.runs.length > 1 ? `${visible(index.runs[run].name)}, ` : ""}step ${step}: ${fmt(value, 3)}\n${plural(treesAt(run, step).length, "tree")} recorded`;
  };
  const svg = make("svg:svg", {
    viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "slider", tabindex: 0, "aria-label": `${name}: choose a training step to see its trees`,
    "aria-valuemin": first, "aria-valuemax": last, "aria-valuenow": first, "aria-valuetext": steps.length ? words(steps[0]) : "no trees recorded",
    onpointermove: (event) => { const found = nearest(event); point(found); if (found) showTip(event, words(found)); },
    onpointerleave: () => { point(null); hideTip(); },
    onclick: (event) => { const found = nearest(event); if (found) openStep(...found); },
    onkeydown: (event) => {
      const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (way && steps.length) {
        const place = at ? steps.findIndex((each) => each[0] === at[0] && each[1] === at[1]) + way : 0;
        point(steps[Math.max(0, Math.min(steps.length - 1, place))]);
        svg.setAttribute("aria-valuenow", at[1]); svg.setAttribute("aria-valuetext", words(at));
      } else if (event.key === "Enter" && at) openStep(...at);
      else return;
      event.preventDefault(); event.stopPropagation();
    },
  }, make("svg:line", { x1: 4, x2: WIDE - 4, y1: HIGH - 12, y2: HIGH - 12, stroke: "var(--line)" }), lines, dots, marker);
  const figure = make("figure", { class: "curve", "data-curve": name },
    make("figcaption", {}, make("b", { title: visible(curves.find(Boolean).metric) }, name), make("span", { class: "value" }, values.map((value) => fmt(value, 3)).join(" / "))), svg,
    make("div", { class: "muted", style: { "font-size": "10px", display: "flex", "justify-content": "space-between" } }, make("span", {}, `step ${first}`), make("span", {}, `${fmt(last)}`)));
  return figure;
}

/** A moving mean over a twentieth of the run to each side, so that the way it goes can be seen. */
function smooth(points) {
  const half = Math.floor(points.length / 20);
  const sums = [0];
  points.forEach(([, value]) => sums.push(sums[sums.length - 1] + value));
  const spaced = Math.max(1, Math.floor(points.length / 400));
  return points.map(([step], each) => {
    const from = Math.max(0, each - half), to = Math.min(points.length, each + half + 1);
    return [step, (sums[to] - sums[from]) / (to - from)];
  }).filter((_, each) => each % spaced === 0 || each === points.length - 1);
}

const thin = (points) => points.filter((_, each) => each % Math.max(1, Math.ceil(points.length / 60)) === 0);

let bySteps = null; // "run/step" to entries
function treesAt(run, step) {
  if (!bySteps) {
    bySteps = new Map();
    index.entries.forEach((entry, each) => {
      const key = `${entry.run}/${entry.step}`;
      if (!bySteps.has(key)) bySteps.set(key, []);
      bySteps.get(key).push(each);
    });
  }
  return bySteps.get(`${run}/${step}`) || [];
}

/** Open the tree of a training step with most to see. */
function openStep(run, step) {
  const there = treesAt(run, step);
  openTree(there.reduce((best, each) => (interest(index.entries[each]) > interest(index.entries[best]) ? each : best), there[0]));
}
