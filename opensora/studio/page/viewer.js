// One video: what it looks like so far or what was made, how far it is, and what can be done with it.

import { actionsOf } from "./actions.js";
import { element, replace } from "./dom.js";
import { isMade, isWaiting } from "./jobs.js";
import { text } from "./language.js";
import { get, media, release } from "./server.js";

export const PLAYED = ["mp4", "webm", "mov"];

// Shows videos at a place; `show` is called again whenever one changes, and leaves a clip that plays alone.
export function viewer(place) {
  const prompt = element("p", { class: "prompt" });
  const state = element("p", { class: "state", role: "status" });
  const bar = element("progress", { max: 100, say_aria_label: "viewer.progress" });
  const stage = element("div", { class: "stage" });
  const actions = element("div", { class: "buttons" });
  const record = element("details", { class: "record", ontoggle: () => record.open && drawRecord() });
  let shown = null;
  let pictured = "";
  let address = null;

  async function showPicture(video) {
    const number = video.progress_details.num_previews;
    const what = isMade(video) ? "clip" : isWaiting(video) && number ? number : "nothing";
    const wanted = `${video.id} ${what} ${isMade(video) ? video.version : ""}`;
    if (wanted === pictured) return;
    const isSame = pictured.startsWith(video.id);
    pictured = wanted;
    if (what === "nothing") {
      if (!isSame || !isWaiting(video)) {
        replace(stage, [element("p", { class: "empty", say: isWaiting(video) ? "viewer.soon" : "viewer.nothing" })]);
      }
      return;
    }
    const path = isMade(video) ? `v1/videos/${video.id}/content` : `v1/videos/${video.id}/preview?number=${number}`;
    const loaded = await media(path).catch(() => null);
    const isPlayed = isMade(video) && PLAYED.includes(video.format);
    const node = isPlayed
      ? element("video", { src: loaded, controls: true, loop: true, muted: true, autoplay: true, playsInline: true })
      : element("img", { src: loaded, alt: "", class: isMade(video) ? "" : "preview" });
    // The one before stays until this one can be seen; a preview may be gone already.
    const isThere = loaded !== null && (isPlayed || (await node.decode().then(() => true, () => false)));
    if (wanted !== pictured || !isThere) return release(loaded);
    replace(stage, [node]);
    release(address);
    address = loaded;
  }

  async function drawRecord() {
    const { id } = shown;
    const content = await get(`v1/videos/${id}/content?variant=metadata`).catch(() => null);
    if (shown?.id !== id || !content) return;
    const lines = rows(content).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)));
    replace(record, [record.firstChild, element("table", {}, lines)]);
  }

  function show(video) {
    const isOther = shown?.id !== video?.id;
    const isChanged = isOther || shown?.version !== video?.version;
    shown = video ?? null;
    if (!video) {
      pictured = "";
      replace(place, [element("div", { class: "stage" }, element("p", { class: "empty", say: "viewer.none" }))]);
      return;
    }
    prompt.textContent = video.prompt;
    state.textContent = stateOf(video);
    state.classList.toggle("error", video.state === "failed");
    bar.value = video.progress;
    bar.hidden = !isWaiting(video);
    record.hidden = !isMade(video);
    if (isOther) {
      record.open = false;
      replace(record, [element("summary", { say: "viewer.record" })]);
    }
    if (isChanged) replace(actions, actionsOf(video));
    replace(place, [stage, bar, state, prompt, actions, record]);
    showPicture(video);
  }

  return { show };
}

// What a video is doing, in words.
export function stateOf(video) {
  const { state, progress_details: progress, result } = video;
  if (state === "failed") return video.error?.message ?? text("state.failed");
  if (state === "queued") return text(video.is_held ? "state.held" : "state.queued");
  if (state === "cancelled") return text("state.cancelled");
  if (state === "completed") {
    return text("state.made", { ...result, seconds: video.seconds, took: result.making_s.toFixed(1) });
  }
  if (!progress.num_steps) return text(`stage.${progress.stage}`);
  const loop = { loop: progress.loop + 1, num_loops: progress.num_loops };
  const steps = text("stage.step", { step: progress.step, num_steps: progress.num_steps });
  return progress.num_loops > 1 ? `${steps}${text("stage.loop", loop)}` : steps;
}

// A record as rows of names and values: objects by their parts.
function rows(content, prefix = "") {
  return Object.entries(content).flatMap(([name, value]) => {
    if (value === null || (typeof value === "object" && !Object.keys(value).length)) return [];
    if (typeof value === "object" && !Array.isArray(value)) return rows(value, `${prefix}${name}.`);
    return [[`${prefix}${name}`, Array.isArray(value) ? JSON.stringify(value) : String(value)]];
  });
}
