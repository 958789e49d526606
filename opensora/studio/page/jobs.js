// The videos of the server as it told of them last. Everything here comes from the server, so that a reload, another
// tab and a server that starts again show the same.

import { notify } from "./dom.js";
import { text } from "./language.js";
import { events, get, post, remove } from "./server.js";

const PAGE = 100;

const videos = new Map(); // id -> Video, see the API
const listeners = new Set();
export const queue = { is_paused: false, order: [], is_connected: false };
let oldest = null; // of the pages that were read: where the next one begins
let isAll = false;
let reading = null;
let told = false;

export const video = (id) => videos.get(id);
export const isWaiting = ({ state }) => state === "queued" || state === "in_progress";
export const isMade = ({ state }) => state === "completed";

// All that are known, the newest first.
export function newestFirst() {
  return [...videos.values()].sort((one, other) => other.created_at - one.created_at || (other.id < one.id ? -1 : 1));
}

// Those that wait or are being made, in the order in which they are begun.
export function waiting() {
  const place = new Map(queue.order.map((id, number) => [id, number]));
  const placeOf = ({ id }) => place.get(id) ?? Infinity;
  return newestFirst().filter(isWaiting).reverse().sort((one, other) => placeOf(one) - placeOf(other));
}

// Calls `listener` whenever videos changed, at most once a frame; returns what ends that.
export function onVideos(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function changed() {
  if (told) return;
  told = true;
  // A tab in the background draws no frames.
  const later = document.hidden ? setTimeout : requestAnimationFrame;
  later(() => {
    told = false;
    listeners.forEach((listener) => listener());
  });
}

// Keeps what the server told, unless something newer came before.
export function remember(told) {
  const known = videos.get(told.id);
  if (!known || known.version <= told.version) videos.set(told.id, told);
  changed();
  return videos.get(told.id);
}

function forget(id) {
  videos.delete(id);
  changed();
}

// Reads the next page of older videos; false if there is none.
export async function readMore() {
  if (isAll) return false;
  reading ??= (async () => {
    const page = await get(`v1/videos?limit=${PAGE}${oldest ? `&after=${oldest}` : ""}`);
    page.data.forEach(remember);
    oldest = page.last_id ?? oldest;
    isAll = !page.has_more;
  })().finally(() => {
    reading = null;
  });
  await reading;
  return !isAll;
}

async function readQueue() {
  const { data, is_paused, version } = await get("v1/queue");
  data.forEach(({ video }) => remember(video));
  Object.assign(queue, { is_paused, order: data.map(({ video }) => video.id) });
  changed();
  return version;
}

let queueAsked = false;
// Events name one video each; the order of all is asked for once for many of them.
async function orderChanged() {
  if (queueAsked) return;
  queueAsked = true;
  await new Promise((resolve) => setTimeout(resolve, 100));
  queueAsked = false;
  await readQueue().catch(() => {});
}

// Does something to a video: "cancel", "retry", "delete", or a change of its place in the queue.
export async function act(id, what, fields = {}) {
  try {
    if (what === "delete") {
      await remove(`v1/videos/${id}`);
      forget(id);
    } else remember(await post(`v1/videos/${id}/${what}`, fields));
    await orderChanged();
  } catch (error) {
    notify(error.message, "error");
  }
}

// Nothing is begun until the queue goes on.
export async function pause(is_paused) {
  try {
    await post(`v1/queue/${is_paused ? "pause" : "resume"}`);
    await readQueue();
  } catch (error) {
    notify(error.message, "error");
  }
}

function onEvent(name, content) {
  if (name === "video") {
    const before = videos.get(content.id);
    remember(content);
    if (before?.state !== content.state || content.state === "queued") orderChanged();
    if (before && isWaiting(before) && isMade(content)) notify(text("made", { prompt: content.prompt.slice(0, 60) }));
  }
  if (name === "video.deleted") forget(content.id);
  if (name === "queue") orderChanged();
}

// Reads what there is, and keeps listening.
export const started = (async () => {
  const version = await readQueue(); // what changes from here on is told by events
  await readMore();
  events(`v1/events?after=${version}`, onEvent, (isConnected) => {
    queue.is_connected = isConnected;
    changed();
  });
})();
