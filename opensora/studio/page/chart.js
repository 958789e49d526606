// A curve over the steps of a run, drawn as SVG; the values under the pointer are told.

import { element } from "./dom.js";

const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, MARGIN] = [320, 140, 8];

// A figure of [step, value] pairs, in the order of their steps.
export function chart(name, points) {
  const steps = points.map(([step]) => step);
  const values = points.map(([, value]) => value);
  const x = scale(Math.min(...steps), Math.max(...steps), MARGIN, WIDTH - MARGIN);
  const y = scale(Math.min(...values), Math.max(...values), HEIGHT - MARGIN, MARGIN);
  const line = svg("polyline", { points: points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") });
  const dot = svg("circle", { r: 3 });
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": name });
  drawing.append(line, dot);
  const told = element("output", {});
  const tell = ([step, value]) => {
    dot.setAttribute("cx", x(step));
    dot.setAttribute("cy", y(value));
    told.textContent = `${short(value)} @ ${step}`;
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const far = ([step]) => Math.abs(x(step) - at);
    const nearest = points.reduce((best, point) => (far(point) < far(best) ? point : best));
    tell(nearest);
  });
  drawing.addEventListener("pointerleave", () => tell(points.at(-1)));
  tell(points.at(-1));
  return element("figure", { class: "chart" }, element("figcaption", {}, element("b", {}, name), told), drawing,
    element("div", { class: "range" },
      element("span", {}, `min ${short(Math.min(...values))}`),
      element("span", {}, `max ${short(Math.max(...values))}`)));
}

function svg(tag, attributes) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => Number((from + ((value - low) / span) * (to - from)).toFixed(2));
}

function short(value) {
  const isPlain = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5);
  return isPlain ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}
