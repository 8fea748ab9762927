// What is hard to see on a page: texts whose contrast against their background is less than 3 (the least that WCAG 2.1 asks of
// large text), and bars and marks of a legend without a colour.
() => {
  const rgb = (words) => { const found = words.match(/[\d.]+/g).map(Number); return found.length < 4 ? [...found, 1] : found; };
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const style = (element) => getComputedStyle(element);
  function behind(element) {
    for (let at = element; at; at = at.parentElement) { const c = rgb(style(at).backgroundColor); if (c[3] > 0.5) return c; }
    return rgb(style(document.body).backgroundColor);
  }
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent).join("").trim();
    if (!words || !element.getClientRects().length || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    const ink = rgb(element.closest("svg") ? style(element).fill : style(element).color);
    const paper = element.matches("svg text.inside") ? rgb(style(element.previousElementSibling).fill) : behind(element);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 3) faint.push(words.slice(0, 40));
  }
  const marks = [...document.querySelectorAll(".bar div, .legend i")];
  const colourless = marks.filter((each) => style(each).backgroundColor === "rgba(0, 0, 0, 0)").length;
  return { faint, colourless };
}
