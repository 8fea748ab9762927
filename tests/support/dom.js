// A document without a browser: runs the scripts of a page at a width, and prints what they drew, as JSON.
// node dom.js PAGE.html WIDTH
"use strict";
const fs = require("fs");
const [html, width] = [fs.readFileSync(process.argv[2], "utf8"), Number(process.argv[3])];
const elements = new Map();

class Element {
  constructor(name) { Object.assign(this, { name, attributes: {}, children: [], style: {}, dataset: {}, hidden: false, textContent: "", value: "", listeners: {} }); this.classList = { toggle() {}, add() {} }; }
  setAttribute(key, value) { this.attributes[key] = String(value); if (key === "value") this.value = String(value); if (key.startsWith("data-")) this.dataset[key.slice(5)] = String(value); }
  append(...found) { this.children.push(...found); if (this.name === "select" && !this.value && found[0] instanceof Element) this.value = found[0].value; }
  after(...found) { this.children.push(...found); }
  replaceChildren(...found) { this.children = found; }
  addEventListener(kind, run) { this.listeners[kind] = run; }
  querySelector(what) { return child(this, what); }
  querySelectorAll() { return []; }
  select() {}
  get clientWidth() { return width; }
  get scrollWidth() { return width; }
  get checked() { return true; }
  getBoundingClientRect() { return { left: 0, top: 0, width: 10, height: 10 }; }
}
const child = (owner, what) => { owner.found = owner.found || {}; return (owner.found[what] = owner.found[what] || new Element(what.includes("measure") ? "select" : "div")); };
const all = () => [...html.matchAll(/<(\w+)[^>]*\sid="([^"]+)"/g)].map((m) => [m[2], m[1]]);
for (const [id, name] of all()) elements.set(id, new Element(name));
elements.get("data").textContent = html.match(/<script type="application\/json" id="data">([\s\S]*?)<\/script>/)[1];
globalThis.document = { getElementById: (id) => elements.get(id), createElement: (name) => new Element(name), createElementNS: (_, name) => new Element(name), querySelectorAll: () => [], documentElement: { clientWidth: width } };
globalThis.window = { innerHeight: 900, scrollX: 0, scrollY: 0 };
globalThis.ResizeObserver = class { observe() {} };
globalThis.requestAnimationFrame = (run) => run();
const script = html.match(/<script>([\s\S]*)<\/script>/)[1];
new Function(script)();
const plain = (e) => (e instanceof Element ? { name: e.name, attributes: e.attributes, text: e.textContent, children: e.children.map(plain), inside: Object.values(e.found || {}).map(plain) } : { text: String(e) });
process.stdout.write(JSON.stringify(Object.fromEntries([...elements].map(([id, e]) => [id, plain(e)]))));
