// The tab that tells what the clip of the form would take, before it is made.

import { element, replace } from "./dom.js";
import { onLanguage, text } from "./language.js";
import { onSketch, gigabytes, sketched } from "./sketch.js";

export function show(root) {
  const verdict = element("p", { class: "verdict", role: "status" });
  const facts = element("dl", { class: "facts" });
  const ways = element("div", {});
  const about = element("p", { class: "hint", say: "plan.about" });
  replace(root, [element("div", { class: "plan-tab" }, about, verdict, facts, ways)]);

  function draw() {
    const told = sketched();
    verdict.textContent = told ? told.words() : text("plan.asking");
    verdict.classList.toggle("error", Boolean(told?.isWrong));
    if (!told?.sketch) return;
    const { plan, spans, channels } = told.sketch;
    replace(facts, [
      ["plan.model", plan.model],
      ["plan.clip", plan.clip],
      ["plan.latents", text("plan.latents_are", { frames: spans.length, channels })],
      ["plan.device", `${plan.device}, ${plan.dtype}`],
      ["plan.branches", String(plan.branches)],
    ].flatMap(([key, value]) => [element("dt", { say: key }), element("dd", {}, value)]));
    const head = ["plan.way", "plan.weights", "plan.activations", "plan.needed"];
    const most = Math.max(...plan.ways.map((way) => way.needed_bytes));
    replace(ways, [element("table", { class: "ways" },
      element("thead", {}, element("tr", {}, head.map((key) => element("th", { scope: "col", say: key })))),
      element("tbody", {}, plan.ways.map((way) => row(way, plan, most))))]);
  }

  onSketch(draw);
  onLanguage(draw);
  draw();
}

function row(way, plan, most) {
  const isTooMuch = way.needed_bytes > plan.device_memory_bytes;
  const share = `${(100 * way.needed_bytes) / most}%`;
  return element("tr", { class: isTooMuch ? "too-much" : "" },
    element("th", { scope: "row" }, way.choices || text("plan.as_it_is")),
    element("td", {}, gigabytes(way.weight_bytes)),
    element("td", {}, gigabytes(way.activation_bytes)),
    element("td", {}, element("span", { class: "amount", style: `--share: ${share}` }, gigabytes(way.needed_bytes))));
}
