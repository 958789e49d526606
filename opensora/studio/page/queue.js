// The tab of what waits and what is being made: previews, the order, and what stopped without a clip.

import { button, element, replace } from "./dom.js";
import { act, isWaiting, newestFirst, onVideos, pause, queue, waiting } from "./jobs.js";
import { onLanguage, say, text } from "./language.js";
import { media, release } from "./server.js";
import { stateOf } from "./viewer.js";
import { useSettings } from "./actions.js";

const MOST_OVER = 20; // of videos that failed or were cancelled

export function show(root) {
  const paused = button("queue.pause", () => pause(!queue.is_paused));
  const count = element("span", { class: "state", role: "status" });
  const waits = element("ol", { class: "queue" });
  const over = element("ol", { class: "queue over" });
  const overTitle = element("h3", { say: "queue.over" });
  const empty = element("p", { class: "empty", say: "queue.empty" });
  replace(root, [element("div", { class: "queue-tab" },
    element("div", { class: "bar" }, paused, count), empty, waits, overTitle, over)]);

  const cards = new Map(); // id -> card, so that pictures and focus stay
  const cardOf = (video) => {
    if (!cards.has(video.id)) cards.set(video.id, card(video.id));
    return cards.get(video.id);
  };

  function draw() {
    const order = waiting();
    const isOver = ({ state }) => state === "failed" || state === "cancelled";
    const stopped = newestFirst().filter(isOver).slice(0, MOST_OVER);
    const queued = order.filter(({ state }) => state === "queued");
    say(paused, "textContent", queue.is_paused ? "queue.resume" : "queue.pause");
    const values = { running: order.length - queued.length, queued: queued.length };
    count.textContent = `${text("queue.count", values)}${queue.is_paused ? ` · ${text("queue.is_paused")}` : ""}`;
    empty.hidden = order.length > 0;
    overTitle.hidden = !stopped.length;
    for (const video of [...order, ...stopped]) cardOf(video).draw(video, queued);
    replace(waits, order.map((video) => cardOf(video).node));
    replace(over, stopped.map((video) => cardOf(video).node));
    for (const [id, one] of cards) {
      if (![...order, ...stopped].some((video) => video.id === id)) {
        one.end();
        cards.delete(id);
      }
    }
  }

  onVideos(draw);
  onLanguage(draw);
  draw();
}

// A line of the queue; its parts are made once, and changed as the video changes.
function card(id) {
  const picture = element("div", { class: "picture" });
  const prompt = element("p", { class: "prompt" });
  const state = element("p", { class: "state" });
  const facts = element("p", { class: "facts" });
  const bar = element("progress", { max: 100, say_aria_label: "viewer.progress" });
  const buttons = element("div", { class: "buttons" });
  const words = element("div", { class: "words" }, prompt, bar, state, facts);
  const node = element("li", { "data-id": id }, picture, words, buttons);
  let number = 0;
  let address = null;
  let drawn = "";

  async function preview(video) {
    const { num_previews } = video.progress_details;
    if (video.state !== "in_progress" || num_previews === number) return;
    number = num_previews;
    const loaded = await media(`v1/videos/${id}/preview?number=${number}`).catch(() => null);
    const image = element("img", { src: loaded ?? "", alt: "" });
    if (!loaded || !(await image.decode().then(() => true, () => false))) return release(loaded);
    replace(picture, [image]);
    release(address);
    address = loaded;
  }

  function draw(video, queued) {
    prompt.textContent = video.prompt;
    state.textContent = stateOf(video);
    state.classList.toggle("error", video.state === "failed");
    const priority = video.priority ? ` · ${text("queue.priority_is", { priority: video.priority })}` : "";
    facts.textContent = `${video.model} · ${video.size} · ${Number(video.seconds).toFixed(1)} s${priority}`;
    bar.hidden = video.state !== "in_progress";
    bar.value = video.progress;
    node.dataset.state = video.state;
    const place = queued.findIndex((other) => other.id === id);
    const neighbours = [queued[place - 1]?.id, queued[place + 1]?.id, queued[place + 2]?.id];
    const wanted = [video.state, video.is_held, video.priority, place, ...neighbours].join();
    if (wanted !== drawn) replace(buttons, buttonsOf(video, queued, place, buttons));
    drawn = wanted;
    dragged(node, video);
    preview(video);
  }

  return { node, draw, end: () => release(address) };
}

function buttonsOf(video, queued, place, before) {
  const { id, state } = video;
  const quiet = { class: "quiet" };
  if (!isWaiting(video)) {
    return [button("job.retry", () => act(id, "retry"), quiet), button("job.use", () => useSettings(video), quiet),
      button("job.delete", () => act(id, "delete"), { class: "quiet danger" })];
  }
  const cancel = button("job.cancel", () => act(id, "cancel"), { class: "quiet danger" });
  if (state === "in_progress") return [cancel];
  const up = queued[place - 1];
  const down = queued[place + 1];
  const priority = element("input", {
    type: "number", min: -10, max: 10, step: 1, value: String(video.priority), class: "priority",
    say_title: "queue.priority", say_aria_label: "queue.priority",
    onchange: () => act(id, "priority", { priority: Number(priority.value) }),
  });
  const move = (say_title, sign, isPossible, to) => element("button", {
    type: "button", class: "quiet", say_title, say_aria_label: say_title, disabled: !isPossible,
    onclick: () => act(id, "move", { before: to }),
  }, sign);
  const focused = [...before.children].indexOf(document.activeElement);
  const made = [
    move("queue.up", "↑", up, up?.id),
    move("queue.down", "↓", down, queued[place + 2]?.id ?? null),
    priority,
    button(video.is_held ? "queue.release" : "queue.hold", () => act(id, video.is_held ? "release" : "hold"), quiet),
    cancel,
  ];
  if (focused >= 0) requestAnimationFrame(() => made[focused]?.focus());
  return made;
}

// A waiting line is dragged onto another one, before which it is begun then.
function dragged(node, video) {
  node.draggable = video.state === "queued";
  node.ondragstart = (event) => event.dataTransfer.setData("text/plain", video.id);
  node.ondragover = (event) => video.state === "queued" && event.preventDefault();
  node.ondrop = (event) => {
    event.preventDefault();
    const moved = event.dataTransfer.getData("text/plain");
    if (moved && moved !== video.id) act(moved, "move", { before: video.id });
  };
}
