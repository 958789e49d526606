// Where two clips differ at the moment that both show: the difference of their pixels, made brighter.

import { element } from "./dom.js";

const MOST_PX = 640; // of a side; larger clips are scaled down

export function differenceView() {
  const canvas = element("canvas", { width: 64, height: 64, role: "img", say_aria_label: "compare.difference" });
  const gain = element("input", { type: "range", min: 1, max: 16, step: 1, value: "4", id: "difference-gain" });
  const node = element("figure", { class: "difference" }, canvas, element("figcaption", {},
    element("span", { say: "compare.difference" }),
    element("label", { for: "difference-gain" }, element("span", { say: "compare.gain" }), gain)));
  const screen = canvas.getContext("2d");
  const hidden = () => document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const [one, other] = [hidden(), hidden()];
  let drawn = "";

  // Draws two <video>, unless nothing has changed since.
  function draw(first, second) {
    if (!first?.videoWidth || !second?.videoWidth) return;
    const state = [first.src, first.currentTime, second.src, second.currentTime, gain.value].join();
    if (state === drawn) return;
    drawn = state;
    const scale = Math.min(1, MOST_PX / Math.max(first.videoWidth, first.videoHeight));
    const [width, height] = [first.videoWidth, first.videoHeight].map((side) => Math.round(side * scale));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const [made, before] = [[one, first], [other, second]].map(([context, video]) => {
      Object.assign(context.canvas, { width, height });
      context.drawImage(video, 0, 0, width, height);
      return context.getImageData(0, 0, width, height);
    });
    for (let place = 0; place < made.data.length; place++) {
      const isAlpha = place % 4 === 3;
      made.data[place] = isAlpha ? 255 : Math.abs(made.data[place] - before.data[place]) * gain.value;
    }
    screen.putImageData(made, 0, 0);
  }

  return { node, draw };
}
