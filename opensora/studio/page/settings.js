// The settings of the form: as they are typed, as they are kept over a reload, as a request, and back from a request.

const STORED = "opensora.settings";

// Fields as the API names them; what is left empty is as the model likes it best.
export const FIELDS = {
  prompt: { kind: "words" },
  negative_prompt: { kind: "words" },
  model: { kind: "choice" },
  width: { kind: "number", min: 8, step: 8 },
  height: { kind: "number", min: 8, step: 8 },
  resolution: { kind: "text", offered: ["144p", "240p", "360p", "480p", "720p"] },
  aspect_ratio: { kind: "text", offered: ["16:9", "9:16", "4:3", "3:4", "1:1"] },
  num_frames: { kind: "text", offered: ["17", "33", "51", "2s", "4s", "8s"] },
  fps: { kind: "number", min: 1, step: "any" },
  num_inference_steps: { kind: "text", offered: ["4", "10", "20", "30", "50"] },
  guidance_scale: { kind: "number", min: 0, step: 0.1 },
  guider: { kind: "text", offered: ["cfg", "cfg:guidance_rescale=0.7", "apg:eta=0", "cfg-zero-star", "tangential"] },
  sampler: { kind: "choice", choices: ["ancestral", "ddim", "dpm-solver++"], empty: "own" },
  time_shift: { kind: "number", min: 0, step: 0.1 },
  fast: { kind: "choice", choices: ["quality", "balanced", "draft"], empty: "off" },
  loop: { kind: "number", min: 1, step: 1 },
  seed: { kind: "number", min: 0, step: 1 },
  format: { kind: "choice", choices: ["mp4", "webm", "gif", "webp"] },
};

const EMPTY = {
  ...Object.fromEntries(Object.keys(FIELDS).map((name) => [name, ""])),
  seed: "42",
  format: "mp4",
  guided: "own", // which channels: the model's "own", "chosen" ones, or a scale for each: "scales"
  channels: [], // numbers of those that are guided
  scales: [], // of each channel, as typed
  source: null, // the video that the clip is made from: {id, kind: "remix" | "extend" | "edit", prompt}
  strength: "0.6", // of an edit
};

const listeners = new Set();
export let settings = read();

function read() {
  try {
    return { ...EMPTY, ...JSON.parse(localStorage.getItem(STORED)) };
  } catch {
    return { ...EMPTY };
  }
}

// Changes some of them, keeps them, and tells everybody; `source` is who did, so that it need not listen to itself.
export function change(changed, source = null) {
  settings = { ...settings, ...changed };
  localStorage.setItem(STORED, JSON.stringify(settings));
  listeners.forEach((listener) => listener(source));
}

export function onSettings(listener) {
  listeners.add(listener);
}

// Everything as the model likes it best.
export function reset() {
  change({ ...EMPTY, model: settings.model });
}

// What the API is sent, without the frames that are given.
export function asRequest() {
  const request = {};
  for (const [name, { kind }] of Object.entries(FIELDS)) {
    const typed = String(settings[name]).trim();
    if (typed !== "") request[name] = kind === "number" || /^\d+$/.test(typed) ? asNumber(typed) : typed;
  }
  request.prompt = settings.prompt.trim();
  // A remix differs from its video in what it says: what is empty here is said to be so.
  if (settings.source?.kind === "remix") {
    for (const name of Object.keys(FIELDS)) if (!(name in request) && name !== "seed") request[name] = null;
    request.channel_scales = null;
    request.cfg_channels = "default";
  }
  if (settings.guided === "chosen") request.cfg_channels = settings.channels;
  if (settings.guided === "scales") {
    request.channel_scales = settings.scales.map(asNumber);
    delete request.guidance_scale;
  }
  return request;
}

// A number where it is one; the server says what is wrong with anything else.
function asNumber(typed) {
  const number = Number(typed);
  return Number.isFinite(number) && String(typed).trim() !== "" ? number : typed;
}

// Takes the settings of a clip: a request as the API tells it, or one that was read from a record.
export function take(request, numChannels) {
  const taken = { ...EMPTY };
  for (const name of Object.keys(FIELDS)) {
    const value = request[name];
    if (value !== undefined && value !== null) taken[name] = String(value);
  }
  const channels = request.cfg_channels;
  if (request.channel_scales) {
    taken.guided = "scales";
    taken.scales = scalesOf(request.channel_scales, numChannels).map(String);
  } else if (channels !== undefined && channels !== "default") {
    taken.guided = "chosen";
    taken.channels = indicesOf(channels, numChannels);
  }
  change(taken);
}

// Channels as the API writes them to their numbers: the first k, a list, "0,2", or all.
export function indicesOf(channels, numChannels) {
  if (channels === null || channels === "all") return [...Array(numChannels).keys()];
  if (Array.isArray(channels)) return channels;
  const parts = String(channels).split(",").map((part) => part.trim());
  return parts.length > 1 ? parts.filter(Boolean).map(Number) : [...Array(Number(parts[0])).keys()];
}

// Scales as the API writes them, a list or "0-2:7,3:1", to one for each channel.
export function scalesOf(scales, numChannels) {
  if (Array.isArray(scales)) return scales;
  const all = Array(numChannels).fill(1);
  for (const [, first, last, scale] of scales.matchAll(/(\d+)(?:-(\d+))?:([\d.]+)/g)) {
    for (let channel = Number(first); channel <= Number(last ?? first); channel++) all[channel] = Number(scale);
  }
  return all;
}
