
// --- Torus

const colour = (i, of) => `hsl(${Math.round((360 * i) / Math.max(of, 1))} 55% 55%)`;
const shardOf = (axes, at) => axes.reduce((index, a) => index * sizes[a] + at[a], 0);
const sizes = Object.fromEntries(data.axes.map((a) => [a.name, a.size]));
const pieces = (axes) => axes.reduce((n, a) => n * sizes[a], 1);

function coordinates() {
  let found = [{}];
  for (const axis of data.axes) found = found.flatMap((at) => Array.from({ length: axis.size }, (_, i) => ({ ...at, [axis.name]: i })));
  return found.slice(0, data.drawn);
}
const places = (at) => data.axes.map((a) => `${a.name}=${at[a.name]}`).join(" ");
function slices(array, at) {
  return array.shape.map((n, d) => { const k = pieces(array.split[d]), i = shardOf(array.split[d], at); return k === 1 ? ":" : `${(i * n) / k}:${((i + 1) * n) / k}`; }).join(", ");
}

// One grid of the first two axes for each place along the others, so that no chip hides another.
function drawTorus(width) {
  const array = data.arrays[byId("array").value];
  const names = data.axes.filter((a) => a.size > 1).map((a) => a.name);
  const [down, across, ...rest] = names.length > 1 ? names : [null, names[0] || null];
  const nx = across ? sizes[across] : 1, ny = down ? sizes[down] : 1, panels = pieces(rest);
  const unit = Math.max(9, Math.min(34, (width - 20) / (nx + 1)));
  const wide = nx * unit + 22, high = ny * unit + 30, columns = Math.max(1, Math.min(panels, Math.floor(width / wide)));
  const h = Math.ceil(panels / columns) * high + 22;
  const svg = make("svg", { viewBox: `0 0 ${width} ${h}`, height: h, role: "group", "aria-label": "Chips of the torus" });
  const all = array.split.flat(), total = pieces(all);
  for (const at of coordinates()) {
    const panel = shardOf(rest, at), left = (panel % columns) * wide, top = Math.floor(panel / columns) * high + 16;
    const x = left + (across ? at[across] : 0) * unit, y = top + (down ? at[down] : 0) * unit;
    if (rest.length && (!across || !at[across]) && (!down || !at[down])) svg.append(make("text", { class: "axis", x: left, y: top - 5 }, rest.map((a) => `${a}=${at[a]}`).join(" ")));
    const box = make("rect", { x, y, width: unit * 0.9, height: unit * 0.9, rx: unit / 7, fill: colour(shardOf(all, at), total), tabindex: 0, "data-chip": places(at) });
    hint(box, () => `chip ${places(at)}\nholds ${array.path}[${slices(array, at)}]\n${bytes(array.bytes)}`);
    box.addEventListener("click", () => held(at)); box.addEventListener("focus", () => held(at));
    svg.append(box);
  }
  const words = data.axes.filter((a) => a.size > 1).map((a) => `${a.name}: ${a.ring ? "ring" : "line"} of ${a.size}`).join(", ");
  svg.append(make("text", { class: "axis", x: 0, y: h - 5 }, `${[across && across + " →", down && down + " ↓"].filter(Boolean).join(", ")}${width < 520 ? "" : `   (${words})`}`));
  return svg;
}
function held(at) {
  const rows = data.arrays.filter((a) => a.role !== "result").slice(0, 12);
  table(byId("held"), rows, [[`chip ${places(at)} holds`, (a) => a.path, null, "name"], ["slice", (a) => `[${slices(a, at)}]`, null, "wide"], ["bytes", (a) => a.bytes, bytes, "number"]]);
}
data.arrays.forEach((array, i) => { const option = make("option", { value: i }); option.textContent = `${array.path}  ${array.type}`; byId("array").append(option); });
if (data.arrays.length) {
  const spec = () => { const a = data.arrays[byId("array").value], n = pieces(a.split.flat()); byId("spec").textContent = `${a.spec}: ${n === 1 ? "replicated" : n + " shards"}, ${bytes(a.bytes)} per chip`; };
  const again = responsive(byId("torus"), drawTorus);
  byId("array").addEventListener("change", () => { again(); spec(); });
  spec(); held(Object.fromEntries(data.axes.map((a) => [a.name, 0])));
}

// --- Tables

table(byId("operations"), data.operations, [
  ["operation", (o) => o.name, null, "name"], ["strategy", (o) => o.strategy, null, "wide"], ["bound by", (o) => o.regime], ["runs", (o) => o.runs, three, "number"],
  ["time", (o) => o.seconds, time, "number"], ["collectives", (o) => o.collectives, time, "number"], ["of the step", (o) => o.share, percent, "number"],
  ["next", (o) => o.next || null, null, "wide"], ["einsum", (o) => o.einsum], ["source", (o) => o.source]]);
if (data.plain.length) table(byId("plain"), data.plain, [["layout", (b) => b.name], ["step", (b) => b.step, null, "number"], ["against this plan", (b) => b.margin, null, "wide"]]);
table(byId("collectives"), data.collectives, [
  ["kind", (c) => c.kind], ["axes", (c) => c.axes], ["payload", (c) => c.bytes, bytes, "number"], ["runs", (c) => c.runs, three, "number"],
  ["time", (c) => c.seconds, time, "number"], ["array, for operation", (c) => c.where, null, "wide"]]);
table(byId("arrays"), data.arrays, [
  ["path", (a) => a.path, null, "name"], ["role", (a) => a.role], ["array", (a) => a.type, null, "wide"], ["PartitionSpec", (a) => a.spec, null, "wide"], ...(data.arrays.some((a) => a.order) ? [["major to minor", (a) => a.order]] : []), ["per chip", (a) => a.bytes, bytes, "number"]]);
table(byId("constants"), data.constants, [
  ["constant", (c) => c.name], ["value", (c) => c.value, null, "number"], ["status", (c) => c.status], ["source", (c) => c.source, null, "wide"]]);

const waits = Object.entries(data.regimes), whole = waits.reduce((s, [, t]) => s + t, 0);
for (const [name, seconds] of waits) {
  const part = make("div", { style: `flex: ${seconds / whole}; background: ${REGIMES[name]}` }); part.textContent = `${name} ${time(seconds)}`;
  hint(part, `${name}: ${time(seconds)}, ${percent(seconds / whole)} of the step`); byId("regimes").append(part);
  if (seconds / whole < 0.2) part.textContent = ""; // there is no room for words
}
legend(byId("waits"), waits.map(([name, seconds]) => [REGIMES[name], `${name} ${time(seconds)}, ${percent(seconds / whole)}`]));

// --- One layer

const fitting = (words, wide) => (words.length * 6.5 <= wide ? words : "…" + words.slice(1 - Math.floor(wide / 6.5))); // the end of a name tells it from others

if (data.timeline.steps.length) responsive(byId("timeline"), (width) => {
  const steps = data.timeline.steps, total = steps.reduce((s, t) => s + t.seconds, 0), left = 4;
  const svg = make("svg", { viewBox: `0 0 ${width} 96`, height: 96, role: "group", "aria-label": "Timeline of one layer" });
  let at = 0;
  for (const step of steps) {
    const x = left + (at / total) * (width - 2 * left), wide = (step.seconds / total) * (width - 2 * left), wire = step.regime === "communication";
    const bar = make("rect", { x, y: wire ? 48 : 12, width: Math.max(wide, 0.75), height: 32, fill: REGIMES[step.regime] || "#888", tabindex: 0 });
    hint(bar, `${step.name}\n${step.strategy}\n${time(step.seconds)}, ${percent(step.seconds / total)} of ${time(total)}`); svg.append(bar);
    if (wide > 60) svg.append(make("text", { x: x + 4, y: (wire ? 48 : 12) + 20, class: "inside", "pointer-events": "none" }, fitting(step.name, wide - 8)));
    at += step.seconds;
  }
  svg.append(make("text", { class: "axis", x: left, y: 94 }, "0"), make("text", { class: "axis", x: width - left, y: 94, "text-anchor": "end" }, time(total)));
  return svg;
});
if (data.timeline.steps.length) legend(byId("timed"), Object.keys(REGIMES).filter((r) => data.timeline.steps.some((s) => s.regime === r)).map((r) => [REGIMES[r], r === "communication" ? "collectives, in the lower row" : `on the chip, bound by ${r}`]));

// --- Memory

if (data.memory.points.length) responsive(byId("memory"), (width) => {
  const points = data.memory.points, peak = Math.max(...points.map((p) => p.bytes)), budget = data.memory.budget;
  const most = peak > budget / 4 ? Math.max(peak, budget) : peak * 1.1; // else the curve would lie on the axis
  const unit = [2 ** 30, 2 ** 20, 2 ** 10].find((u) => most >= u) || 1, name = bytes(unit).split(" ")[1];
  const c = chart({ width, height: 240, x: [0, points.length], y: [0, (most * 1.06) / unit], label: "Bytes of one chip by program point", xLabel: "operation of the program, in order", yLabel: `a chip holds, ${name}` });
  const Y = c.Y; c.Y = (b) => Y(b / unit);
  const path = points.map((p, i) => `${i ? "L" : "M"}${c.X(i)} ${c.Y(p.bytes)}L${c.X(i + 1)} ${c.Y(p.bytes)}`).join("");
  c.svg.append(make("path", { d: `${path}L${c.X(points.length)} ${c.Y(0)}L${c.X(0)} ${c.Y(0)}Z`, fill: COLORS[0], "fill-opacity": 0.35, stroke: COLORS[0] }));
  const given = Math.min(data.memory.given, ...points.map((p) => p.bytes)); // arguments and constants, which stay
  if (given > 0) {
    c.svg.append(make("rect", { x: c.left, y: c.Y(given), width: width - c.left - c.right, height: c.Y(0) - c.Y(given), fill: COLORS[0], "fill-opacity": 0.3 }));
    c.svg.append(make("text", { x: c.left + 8, y: c.Y(given / 2) + 4 }, `arguments and constants: ${bytes(given)}`));
  }
  if (budget <= most) c.svg.append(make("line", { x1: c.left, x2: width - c.right, y1: c.Y(data.memory.budget), y2: c.Y(data.memory.budget), stroke: "#c0392b", "stroke-dasharray": "5 4" }));
  c.svg.append(make("text", { x: width - c.right - 4, y: budget <= most ? c.Y(budget) - 5 : c.top + 12, "text-anchor": "end" }, `what a plan may fill: ${bytes(data.memory.budget)}`));
  points.forEach((p, i) => { const r = make("rect", { x: c.X(i), y: c.top, width: Math.max(1, c.X(i + 1) - c.X(i)), height: 240 - c.top - c.bottom, fill: "transparent" }); hint(r, `${p.name}\n${bytes(p.bytes)}`); c.svg.append(r); });
  return c.svg;
});

// --- Roofline

const roof = data.roofline;
if (roof.dots.length) responsive(byId("roofline"), (width) => {
  const xs = roof.dots.map((d) => d.intensity), ys = roof.dots.map((d) => d.rate), ridge = roof.flops / roof.bytes;
  const x = span([...xs, ridge, ridge * 4], true), y = span([...ys, roof.flops], true);
  const c = chart({ width, height: 360, x, y, logX: true, logY: true, label: "Roofline", xLabel: "FLOPs per byte through HBM", yLabel: "TFLOP/s of one chip", yTick: (t) => three(t / 1e12) });
  const line = (flops, dash) => { // clipped to the axes: a unit whose ridge lies left of them is a level line, and one below them is not drawn
    if (flops < y[0]) return;
    const turn = Math.max(flops / roof.bytes, x[0]), start = Math.min(Math.max(x[0], y[0] / roof.bytes), turn), end = Math.max(turn, x[1]);
    const at = (i) => `${c.X(Math.min(i, x[1]))} ${c.Y(Math.min(flops, i * roof.bytes))}`;
    c.svg.append(make("path", { class: "roof", d: `M${at(start)}L${at(turn)}L${at(end)}`, fill: "none", stroke: "var(--soft)", "stroke-width": 1.5, "stroke-dasharray": dash }));
  };
  line(roof.flops, ""); line(roof.vector, "4 4");
  const said = (flops, words) => c.svg.append(make("text", { class: "axis", x: width - c.right - 2, y: c.Y(flops) - 6, "text-anchor": "end" }, words));
  said(roof.flops, `matrix unit, ${three(roof.flops / 1e12)} TFLOP/s`); if (roof.vector > y[0]) said(roof.vector, `vector unit, ${three(roof.vector / 1e12)}`);
  const low = Math.max(x[0], y[0] / roof.bytes) * 1.5; if (width > 500 && low < ridge) c.svg.append(make("text", { class: "axis", x: c.X(low) + 14, y: c.Y(low * roof.bytes) + 16 }, `HBM, ${three(roof.bytes / 1e9)} GB/s`));
  const most = Math.max(...roof.dots.map((d) => d.seconds));
  for (const d of roof.dots) { const dot = make("circle", { cx: c.X(d.intensity), cy: c.Y(d.rate), r: 3 + 9 * Math.sqrt(d.seconds / most), fill: REGIMES[d.regime] || "#888", "fill-opacity": 0.75, tabindex: 0 }); hint(dot, `${d.name}\n${time(d.seconds)} per step, bound by ${d.regime}\n${three(d.intensity)} FLOPs per byte, ${three(d.rate / 1e12)} TFLOP/s`); c.svg.append(dot); }
  return c.svg;
});

if (roof.dots.length) legend(byId("dots"), Object.keys(REGIMES).filter((r) => roof.dots.some((d) => d.regime === r)).map((r) => [REGIMES[r], `bound by ${r}`]));

// --- Audit

if (data.audit) {
  const a = data.audit, v = byId("verdict");
  const slow = a.slow ? `, and a step takes ${(a.seconds.replayed / a.seconds.planned).toFixed(2)} times the planned time` : "";
  v.textContent = `Compiled for ${a.target}: ${a.ok ? "as planned" : "not as planned"}${slow}.`; v.className = a.ok && !a.slow ? "ok" : "bad";
  const rows = (a.wire_bytes || []).map((w) => ({ what: `bytes sent over ${w.axes.join("")}`, planned: w.planned, compiled: w.compiled, unit: bytes }));
  rows.push({ what: "peak memory", planned: a.peak_bytes.planned, compiled: a.peak_bytes.compiled, unit: bytes });
  const t = a.seconds, known = t.compiled_compute !== null;
  if (known) rows.push({ what: "time on the chip, by the compiler's cycles", planned: t.planned - t.planned_collectives, compiled: t.compiled_compute, unit: time });
  rows.push({ what: "time of collectives, by the plan's model", planned: t.planned_collectives, compiled: t.compiled_collectives, unit: time });
  if (known) rows.push({ what: "step", planned: t.planned, compiled: t.compiled_compute + t.compiled_collectives, unit: time });
  if (t.replayed) {
    rows.push({ what: "step, schedule replayed", planned: t.planned, compiled: t.replayed, unit: time });
    rows.push({ what: "of it waiting for communication", planned: null, compiled: t.exposed_communication, unit: time });
    rows.push({ what: "floor: bytes to move once", planned: null, compiled: t.floor, unit: time });
  }
  const shown = (r, side) => (r[side] === null ? null : r.unit(r[side]));
  table(byId("audit"), rows, [["one chip, one step", (r) => r.what], ["planned", (r) => shown(r, "planned"), null, "number"], ["compiled", (r) => shown(r, "compiled"), null, "number"],
    ["ratio", (r) => (r.compiled && r.planned ? r.compiled / r.planned : null), (x) => x.toFixed(4), "number"]]);
  const found = {};
  const named = (axes) => [...data.axes.map((each) => each.name).filter((name) => axes.includes(name)), ...axes.filter((name) => !(name in sizes))].join(""); // a group of chips, in whatever order
  for (const side of ["planned", "compiled"]) for (const c of a[side] || []) {
    const axes = named(c.axes || []), key = `${c.kind} ${axes}`;
    found[key] = found[key] || { kind: c.kind, axes, planned: 0, compiled: 0, planned_bytes: 0, compiled_bytes: 0 };
    found[key][side] += c.count; found[key][`${side}_bytes`] += c.count * c.bytes;
  }
  table(byId("compared"), Object.values(found), [["kind", (r) => r.kind], ["axes", (r) => r.axes], ["planned", (r) => r.planned, three, "number"], ["compiled", (r) => r.compiled, three, "number"],
    ["payload planned", (r) => r.planned_bytes, bytes, "number"], ["compiled", (r) => r.compiled_bytes, bytes, "number"]]);
  if ((a.costliest || []).length) table(byId("costliest"), a.costliest, [["costliest instruction", (c) => c.name], ["at", (c) => c.source], ["operation", (c) => c.scope || c.opcode, null, "wide"], ["runs", (c) => c.runs, three, "number"],
    ["time", (c) => c.seconds, time, "number"], ["not planned", (c) => c.unplanned_seconds || null, time, "number"]]);
  if (a.differences.length) table(byId("differences"), a.differences, [["difference", (d) => d.text, null, "wide"], ["counts", (d) => (d.counts ? "yes" : "no")]]);
}
