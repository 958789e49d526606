// The tab of training runs in the server's folder: curves of what they measure, and their previews; nothing is changed.

import { chart } from "./chart.js";
import { element, replace } from "./dom.js";
import { get, media } from "./server.js";

const AGAIN_MS = 5_000;
const FIRST = /^(loss|loss\/.*|val.*|.*psnr.*|grad_norm|lr|learning_rate|samples_per_s)$/;

export function show(root) {
  const runs = element("select", { id: "runs", onchange: () => read(true).catch(tell) });
  const label = element("label", { for: "runs", say: "train.run" });
  const empty = element("p", { class: "empty", say: "train.empty", hidden: true });
  const curves = element("div", { class: "curves" });
  const previews = element("div", { class: "previews" });
  const bar = element("div", { class: "bar" }, label, runs);
  replace(root, [element("div", { class: "train-tab" }, bar, empty, curves, previews)]);
  let drawn = "";

  async function readRuns() {
    const { data } = await get("studio/runs");
    const chosen = runs.value;
    runs.replaceChildren(...data.map((name) => element("option", { value: name, selected: name === chosen }, name)));
    empty.hidden = data.length > 0;
    bar.hidden = !data.length;
    if (data.length) await read(false);
  }

  async function read(isOther) {
    const run = await get(`studio/runs/${encodeURIComponent(runs.value)}`);
    const state = JSON.stringify(run);
    if (state === drawn) return;
    drawn = state;
    const order = (one, other) => FIRST.test(other) - FIRST.test(one) || (one < other ? -1 : 1);
    const names = Object.keys(run.curves).sort(order);
    replace(curves, names.map((name) => chart(name, run.curves[name])));
    if (isOther) replace(previews, []);
    const shown = new Map([...previews.children].map((node) => [node.dataset.name, node]));
    replace(previews, run.previews.map((name) => shown.get(name) ?? preview(runs.value, name)));
  }

  const tell = (error) => replace(curves, [element("p", { class: "error" }, error.message)]);
  const again = async () => {
    const isSeen = root.offsetParent && !document.hidden;
    if (isSeen) await readRuns().catch(tell);
    setTimeout(again, AGAIN_MS);
  };
  readRuns().catch(tell).then(() => setTimeout(again, AGAIN_MS));
}

function preview(run, name) {
  const isClip = /\.(mp4|webm)$/.test(name);
  const playing = { muted: true, loop: true, autoplay: true, controls: true };
  const node = element(isClip ? "video" : "img", isClip ? playing : { alt: name });
  media(`studio/runs/${encodeURIComponent(run)}/previews/${encodeURIComponent(name)}`).then((address) => {
    node.src = address;
  }, () => {});
  return element("figure", { "data-name": name }, node, element("figcaption", {}, name));
}
