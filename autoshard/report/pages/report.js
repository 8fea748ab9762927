"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#2a78b5", "#d5752a", "#3a8f4d", "#a34b9b", "#b58a2a", "#6b7785", "#c0504d", "#2f9c95"];
const REGIMES = { compute: "#c23b4f", HBM: "#00798c", "vector unit": "#7a55b0", communication: "#946b00", overhead: "#66707b" };
const byId = (id) => document.getElementById(id);

function make(name, attributes, ...children) {
  const svg = ["svg", "g", "path", "circle", "line", "text", "rect", "polygon", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  for (const child of children) element.append(child);
  return element;
}

const three = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(Number(x.toPrecision(3))));
function time(s) {
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]) if (s >= scale) return three(s / scale) + " " + unit;
  return s ? three(s / 1e-9) + " ns" : "0";
}
function bytes(n) {
  for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) if (n >= scale) return three(n / scale) + " " + unit;
  return three(n) + " B";
}
const percent = (x) => (100 * x).toFixed(1) + " %";

// --- Hints

const tip = byId("tip");
function hint(element, text) {
  const show = (event) => {
    tip.textContent = typeof text === "function" ? text() : text;
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const x = event.clientX !== undefined && event.type !== "focus" ? event.clientX : box.left + box.width / 2;
    const y = event.clientY !== undefined && event.type !== "focus" ? event.clientY : box.top;
    const left = Math.min(Math.max(8, x + 12), document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = y + tip.offsetHeight + 24 > window.innerHeight;
    tip.style.left = Math.max(8, left) + window.scrollX + "px";
    tip.style.top = (above ? y - tip.offsetHeight - 12 : y + 14) + window.scrollY + "px";
  };
  const hide = () => { tip.hidden = true; };
  element.addEventListener("pointerenter", show); element.addEventListener("focus", show);
  element.addEventListener("pointerleave", hide); element.addEventListener("blur", hide);
}

// Paths such as params['layers']['wi_gate'] may break between their keys.
const broken = (text) => text.replaceAll("][", "]\u200b[");

function legend(place, items) {
  for (const [colour, words] of items) place.append(make("span", {}, make("i", { style: `background: ${colour}` }), words));
}

for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", async () => {
  const words = button.textContent;
  try { await navigator.clipboard.writeText(data[button.dataset.copies]); button.textContent = "Copied"; } catch {
    const area = make("textarea", { readonly: "", rows: 12, class: "mono" }); area.value = data[button.dataset.copies]; button.after(area); area.select(); // pages from files may not use the clipboard
  }
  setTimeout(() => { button.textContent = words; }, 1500);
});

// --- Tables: columns are [title, value of a row, how it is shown, class, target of a link]; a click on a title sorts, a second one reverses

function table(place, rows, columns, options) {
  const given = options || {};
  const search = make("input", { type: "search", placeholder: "filter", "aria-label": "Filter" });
  const count = make("span", { class: "count" });
  const head = make("tr"), body = make("tbody");
  let sorted = -1, up = true;
  const text = rows.map((row) => columns.map((c) => show(c, row)).join(" ").toLowerCase());
  function show(column, row) {
    const value = column[1](row);
    return value === null || value === undefined ? "–" : column[2] ? column[2](value) : String(value);
  }
  function fill() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let order = rows.map((_, i) => i).filter((i) => words.every((w) => text[i].includes(w)));
    if (sorted >= 0) {
      const value = (i) => columns[sorted][1](rows[i]);
      order.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : a - b) * (up ? 1 : -1));
    }
    body.replaceChildren(...order.map((i) => {
      const line = make("tr", given.best && given.best(rows[i]) ? { class: "best" } : {});
      for (const c of columns) { const cell = make("td", c[3] ? { class: c[3] } : {}); const text = broken(show(c, rows[i])), target = c[4] && c[4](rows[i]); cell.append(target ? make("a", { href: target }, text) : text); line.append(cell); }
      return line;
    }));
    count.textContent = order.length === rows.length ? rows.length + " rows" : order.length + " of " + rows.length + " rows";
    [...head.children].forEach((cell, i) => cell.setAttribute("aria-sort", i === sorted ? (up ? "ascending" : "descending") : "none"));
  }
  columns.forEach((c, i) => {
    const button = make("button", { type: "button" }); button.textContent = c[0];
    button.addEventListener("click", () => { up = sorted === i ? !up : !(c[3] === "number"); sorted = i; fill(); });
    head.append(make("th", { class: c[3] === "number" ? "number" : "", scope: "col" }, button));
  });
  search.addEventListener("input", fill);
  const controls = rows.length > 4 ? [make("div", { class: "controls" }, search, count)] : [];
  if (!rows.length) { place.textContent = "None."; return; }
  const box = make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), body));
  place.replaceChildren(...controls, box);
  new ResizeObserver(() => box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1)).observe(box);
  fill();
}

// --- Charts

function responsive(place, draw) {
  let width = 0;
  const again = () => { const now = place.clientWidth; if (now && now !== width) { width = now; place.replaceChildren(draw(now)); } };
  new ResizeObserver(() => requestAnimationFrame(again)).observe(place);
  again();
  return () => { width = 0; again(); };
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of high / low > 1e3 ? [1] : [1, 2, 5]) { const t = m * 10 ** e; if (t >= low * 0.999 && t <= high * 1.001) found.push(t); }
  return found.length > 2 ? found : linearTicks(low, high).filter((t) => t > 0);
}
function linearTicks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 3 || 1));
  const by = [1, 2, 5, 10].map((m) => m * step).find((s) => (high - low) / s <= 6) || step;
  const found = [];
  for (let t = Math.ceil(low / by) * by; t <= high * 1.0001; t += by) found.push(t);
  return found;
}

// An empty chart with scales: {width, height, x: [low, high], y: [low, high], logX, logY, labels, tick formats}
function chart(o) {
  const left = 78, right = 12, top = 12, bottom = 44;
  const svg = make("svg", { viewBox: `0 0 ${o.width} ${o.height}`, height: o.height, role: "img", "aria-label": o.label });
  const scale = (range, log, a, b) => { const f = log ? Math.log : (v) => v; const [l, h] = range.map(f); return (v) => a + ((f(v) - l) / (h - l || 1)) * (b - a); };
  const X = scale(o.x, o.logX, left, o.width - right), Y = scale(o.y, o.logY, o.height - bottom, top);
  const thin = (ticks, room) => { const skip = Math.ceil(ticks.length / room); return ticks.filter((_, i) => i % skip === 0); };
  for (const t of thin(o.logX ? logTicks(...o.x) : linearTicks(...o.x), Math.max(2, Math.floor(o.width / 80)))) {
    svg.append(make("line", { class: "grid", x1: X(t), x2: X(t), y1: top, y2: o.height - bottom }));
    svg.append(make("text", { class: "axis", x: X(t), y: o.height - bottom + 16, "text-anchor": "middle" }, o.xTick ? o.xTick(t) : three(t)));
  }
  for (const t of thin(o.logY ? logTicks(...o.y) : linearTicks(...o.y), 8)) {
    svg.append(make("line", { class: "grid", x1: left, x2: o.width - right, y1: Y(t), y2: Y(t) }));
    svg.append(make("text", { class: "axis", x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, o.yTick ? o.yTick(t) : three(t)));
  }
  svg.append(make("text", { class: "axis", x: (left + o.width - right) / 2, y: o.height - 8, "text-anchor": "middle" }, o.xLabel));
  const turned = make("text", { class: "axis", transform: `translate(11 ${(top + o.height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, o.yLabel);
  svg.append(turned);
  return { svg, X, Y, left, right, top, bottom };
}
function span(values, log) {
  const low = Math.min(...values), high = Math.max(...values);
  return log ? [low / 1.3, high * 1.3] : [Math.min(0, low), high * 1.06 || 1];
}
