// The tab where clips stand side by side: the same moment of all of them, and where two of them differ.

import { compared, onCompared, toggleCompared } from "./chosen.js";
import { differenceView } from "./difference.js";
import { button, element, replace } from "./dom.js";
import { isMade, onVideos, started, video as videoOf } from "./jobs.js";
import { onLanguage, text } from "./language.js";
import { players } from "./players.js";
import { get, media, release } from "./server.js";
import { openTab } from "./tabs.js";
import { PLAYED } from "./viewer.js";

export function show(root) {
  const place = element("input", {
    type: "range", min: 0, max: 1, step: "any", value: "0", say_aria_label: "compare.place",
    oninput: () => clock.seek(place.value * length_s),
  });
  const play = button("compare.pause", () => clock.play());
  const time = element("output", { class: "state" });
  const quicken = () => clock.quicken(Number(speed.value));
  const speed = element("select", { say_aria_label: "compare.speed", onchange: quicken },
    [1, 0.5, 0.25].map((factor) => element("option", { value: factor }, `${factor}×`)));
  const bar = element("div", { class: "bar" }, play,
    button("compare.back", () => clock.step(-1), { class: "quiet" }),
    button("compare.on", () => clock.step(1), { class: "quiet" }), place, time, speed);
  const empty = element("p", { class: "empty" },
    element("span", { say: "compare.empty" }), " ", button("compare.choose", () => openTab("gallery")));
  const clips = element("div", { class: "clips" });
  const difference = differenceView();
  const figures = element("table", { class: "figures" });
  replace(root, [element("div", { class: "compare-tab", tabindex: "-1" }, empty, bar, clips, figures)]);

  let length_s = 0;
  let isPlaying = null;
  const shown = new Map(); // id -> {node, player}
  const clock = players((now) => {
    length_s = now.duration_s;
    if (document.activeElement !== place || now.isPlaying) place.value = length_s ? now.place_s / length_s : 0;
    time.textContent = text("compare.time", { at: now.place_s.toFixed(2), of: length_s.toFixed(2) });
    if (isPlaying !== now.isPlaying) {
      isPlaying = now.isPlaying;
      play.textContent = text(isPlaying ? "compare.pause" : "compare.play");
    }
    const [first, second] = [...shown.values()].map(({ player }) => player);
    if (now.isSettled) difference.draw(first, second);
  });

  root.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT", "BUTTON"].includes(event.target.tagName)) return;
    if (event.key === " ") {
      event.preventDefault();
      clock.play();
    }
    if (event.key === "ArrowLeft") clock.step(-1);
    if (event.key === "ArrowRight") clock.step(1);
  });

  function draw() {
    const ids = compared().filter((id) => videoOf(id) && isMade(videoOf(id)) && PLAYED.includes(videoOf(id).format));
    for (const id of ids) if (!shown.has(id)) shown.set(id, cell(videoOf(id), clock));
    for (const [id, one] of shown) {
      if (ids.includes(id)) continue;
      clock.remove(one.player);
      release(one.player.src);
      shown.delete(id);
    }
    replace(clips, [...ids.map((id) => shown.get(id).node), ...(ids.length > 1 ? [difference.node] : [])]);
    empty.hidden = ids.length > 1;
    bar.hidden = !ids.length;
    drawFigures(ids);
  }

  let asked = "";
  // Figures of the first clip against every other one, by the metrics of the lab.
  async function drawFigures(ids) {
    const wanted = ids.join();
    if (wanted === asked) return;
    asked = wanted;
    replace(figures, []);
    figures.hidden = ids.length < 2;
    if (ids.length < 2) return;
    const [reference, ...others] = ids;
    const rows = others.map((made, number) => {
      const cells = element("td", { say: "compare.measuring" });
      get(`studio/fidelity?made=${made}&reference=${reference}`).then(
        ({ psnr_db, ssim }) => {
          cells.removeAttribute("data-said");
          cells.textContent = `PSNR ${psnr_db.toFixed(1)} dB · SSIM ${ssim.toFixed(3)}`;
        },
        (error) => {
          cells.removeAttribute("data-said");
          cells.textContent = error.message;
        });
      const name = element("th", { scope: "row", say: ["compare.against", { number: number + 2 }] });
      return element("tr", {}, name, cells);
    });
    replace(figures, [element("tbody", {}, rows)]);
  }

  onCompared(draw);
  onVideos(draw);
  onLanguage(() => {
    isPlaying = null;
  });
  started.then(draw);
}

function cell(video, clock) {
  const player = element("video", { muted: true, playsInline: true, preload: "auto", "aria-label": video.prompt });
  player.dataset.fps = video.result.fps;
  media(`v1/videos/${video.id}/content`).then((address) => {
    player.src = address;
    clock.add(player);
  });
  const asked = Object.entries(video.request).map(([name, value]) => `${name} ${JSON.stringify(value)}`);
  const facts = element("span", { class: "facts" }, [video.model, ...asked].join(" · "));
  const node = element("figure", {}, player,
    element("figcaption", {}, element("div", {}, element("p", { class: "prompt" }, video.prompt), facts),
      button("remove", () => toggleCompared(video.id), { class: "quiet" })));
  return { node, player };
}
