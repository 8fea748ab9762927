
const LATENCY = { decode: "latency per token", prefill: "time to first token", request: "latency of a request" };
const MEASURES = {
  cost: { name: "chip-ms per token", value: (p) => 1e3 * p.cost, best: (p) => p.best, log: true, tick: three },
  price: { name: `${data.currency} per million tokens`, value: (p) => p.price, best: (p) => p.best, log: true, tick: three },
  mfu: { name: "MFU", value: (p) => p.mfu, best: (p) => p.best_mfu, log: false, tick: (t) => Math.round(100 * t) + " %" },
};

// A layout in a few lines: the products that share a strategy together, the largest first.
const keys = (op) => { const found = [...op.matchAll(/\['([^']+)'\]/g)].map((m) => m[1]); return (found.length > 1 ? found.slice(1) : found).join(".") || op; };
function grouped(layout) {
  const by = new Map();
  for (const [op, strategy] of Object.entries(layout)) by.set(strategy, [...(by.get(strategy) || []), keys(op)]);
  const some = (names) => names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
  return [...by].slice(0, 5).map(([strategy, names]) => `${some(names)}: ${strategy}`);
}

data.phases.forEach((phase, index) => {
  const section = byId(`phase${index}`), find = (name) => section.querySelector(name);
  const measure = find(".measure"), every = find(".every");
  const priced = new Set(phase.points.map((p) => p.chip)).size > 1 ? ["price", "cost", "mfu"] : ["cost", "price", "mfu"]; // chips of two kinds have one cost in money alone
  for (const key of phase.priced ? priced : ["cost", "mfu"]) { const o = make("option", { value: key }); o.textContent = MEASURES[key].name; measure.append(o); }
  const group = (p) => phase.series.map((key) => (typeof p.knobs[key] === "string" ? p.knobs[key] : `${key} ${p.knobs[key]}`)).join(", ");
  const groups = [...new Set(phase.points.map(group))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true })); // of one colour in all phases
  const colour = (p) => COLORS[groups.indexOf(group(p)) % COLORS.length];
  const words = (p) => [p.name, `${time(p.latency)}, ${three(1e3 * p.cost)} chip-ms per token${p.price === null ? "" : `, ${three(p.price)} ${data.currency} per million tokens`}`,
    `${percent(p.mfu)} MFU, memory ${percent(p.memory)}, collectives ${percent(p.collectives)} of the time`,
    ...(Object.keys(p.phases).length > 1 ? Object.entries(p.phases).map(([n, s]) => `${n}: ${time(s)} per step`) : []),
    ...Object.entries(p.layout).flatMap(([n, l]) => grouped(l).map((line) => (Object.keys(p.layout).length > 1 ? `${n}: ` : "") + line)),
    p.proof === "OPTIMAL" ? "proven optimal" : `gap ${percent(p.gap)}`].join("\n");

  // The best points of one colour, as the curve of that colour.
  function curve(points, m) {
    const found = [];
    for (const p of [...points].sort((a, b) => a.latency - b.latency || m.sign * (m.value(a) - m.value(b))))
      if (!found.length || m.sign * m.value(p) < m.sign * m.value(found[found.length - 1])) found.push(p);
    return found;
  }
  const again = responsive(find(".chart"), (width) => {
    const m = { ...MEASURES[measure.value], sign: measure.value === "mfu" ? -1 : 1 };
    const usable = phase.points.filter((p) => m.value(p) !== null);
    const curves = groups.map((g) => curve(usable.filter((p) => group(p) === g), m));
    const shown = every.checked ? usable : curves.flat();
    const c = chart({ width, height: Math.max(300, Math.min(460, width * 0.6)), x: span(shown.map((p) => p.latency), true), y: span(shown.map(m.value), m.log), logX: true, logY: m.log,
      label: `${phase.name}: ${m.name} against latency`, xLabel: LATENCY[phase.kind] || "latency", yLabel: m.name, xTick: time, yTick: m.tick });
    curves.forEach((each, i) => each.length > 1 && c.svg.append(make("path", { d: each.map((p, k) => `${k ? "L" : "M"}${c.X(p.latency)} ${c.Y(m.value(p))}`).join(""), fill: "none", stroke: COLORS[i % COLORS.length], "stroke-width": 1.6 })));
    const on = new Set(curves.flat());
    for (const p of [...shown].sort((a, b) => on.has(a) - on.has(b))) {
      const dot = make("circle", { cx: c.X(p.latency), cy: c.Y(m.value(p)), r: on.has(p) ? 5.5 : 3.5, fill: colour(p), "fill-opacity": on.has(p) ? 1 : 0.35, class: "point", ...(on.has(p) ? { tabindex: 0 } : {}) });
      hint(dot, () => words(p)); c.svg.append(dot);
    }
    return c.svg;
  });
  measure.addEventListener("change", again); every.addEventListener("change", again);
  if (groups.length > 1) legend(find(".legend"), groups.map((g, i) => [COLORS[i % COLORS.length], g]));

  const knobs = [...new Set(phase.points.flatMap((p) => Object.keys(p.knobs)))].filter((key) => new Set(phase.points.map((p) => p.knobs[key])).size > 1);
  const split = Object.keys(phase.points[0].phases);
  table(find(".points"), phase.points, [
    ["topology", (p) => p.topology], ...knobs.map((key) => [key, (p) => p.knobs[key], null, typeof phase.points[0].knobs[key] === "number" ? "number" : ""]),
    [LATENCY[phase.kind] || "latency", (p) => p.latency, time, "number"], ...(split.length > 1 ? split.map((name) => [`${name}, per step`, (p) => p.phases[name], time, "number"]) : []),
    ["tokens per second per chip", (p) => p.rate, three, "number"], ["chip-ms per token", (p) => 1e3 * p.cost, three, "number"], ...(phase.priced ? [[`${data.currency} per million tokens`, (p) => p.price, three, "number"]] : []),
    ...(phase.points.some((p) => p.slowdown !== null) ? [["compiled / planned", (p) => p.slowdown, three, "number"]] : []), ["MFU", (p) => p.mfu, percent, "number"], ["memory", (p) => p.memory, percent, "number"], ["frontier", (p) => (p.best ? "yes" : ""), null, ""],
    ...split.filter((name) => phase.points.some((p) => p.pages[name])).map((name) => [split.length > 1 ? `plan of ${name}` : "plan", (p) => (p.pages[name] ? "open" : null), null, "", (p) => p.pages[name]]),
    ["layout", (p) => p.headline, null, "wide"]], { best: (p) => p.best });
});
const ends = data.phases.flatMap((phase) => phase.ends);
if (ends.length) table(byId("ends"), ends, [["phase", (e) => e.part], ["", (e) => e.which], ["point", (e) => e.name, null, "name"], ["latency", (e) => e.latency, time, "number"], ["chip-ms per token", (e) => 1e3 * e.cost, three, "number"],
  ...(ends.some((e) => e.price !== null) ? [[`${data.currency} per million tokens`, (e) => e.price, three, "number"]] : []), ["MFU", (e) => e.mfu, percent, "number"], ["layout", (e) => e.headline, null, "wide"]]);
if (data.without.length) table(byId("without"), data.without, [["phase", (w) => w.phase], ["point", (w) => w.name, null, "name"], ["outcome", (w) => w.outcome], ["why", (w) => w.why, null, "wide"]]);
