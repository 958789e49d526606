// What is known of a clip before it is made: the model's own choices, its latent frames and channels, the memory it
// needs. The server is asked when the settings have rested for a moment.

import { text } from "./language.js";
import { post, Refused } from "./server.js";
import { asRequest } from "./settings.js";

const RESTS_MS = 500;
// What a sketch depends on; a new prompt or seed asks for none.
const OF_SIZE = ["model", "width", "height", "resolution", "aspect_ratio", "num_frames", "fps", "loop",
  "num_inference_steps", "guidance_scale", "cfg_channels", "channel_scales", "guider", "sampler", "time_shift"];

const listeners = new Set();
let asked = "";
let timer = null;
let knownFrames = false;
let latest = null;

export const sketched = () => latest;

export function onSketch(listener) {
  listeners.add(listener);
  if (latest) listener(latest);
}

export function setKnownFrames(known) {
  knownFrames = known;
  sketch();
}

// Asks for a sketch of the settings, unless it is there.
export function sketch() {
  const request = asRequest();
  const fields = Object.fromEntries(OF_SIZE.filter((name) => name in request).map((name) => [name, request[name]]));
  const question = JSON.stringify({ request: fields, known_frames: knownFrames });
  if (question === asked || !request.model) return;
  asked = question;
  clearTimeout(timer);
  timer = setTimeout(() => ask(question), RESTS_MS);
}

async function ask(question) {
  tell({ sketch: null, words: () => text("plan.asking"), isWrong: false });
  let told;
  try {
    const sketch = await post("studio/sketch", JSON.parse(question));
    told = { sketch, words: () => verdict(sketch.plan), isWrong: sketch.plan.fits === false };
  } catch (error) {
    const message = error instanceof Refused ? error.message.replaceAll("`", "") : text("server.away");
    told = { sketch: null, words: () => message, isWrong: true };
  }
  if (question === asked) tell(told);
}

function tell(told) {
  latest = told;
  listeners.forEach((listener) => listener(told));
}

export const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(bytes < 10 * 2 ** 30 ? 2 : 0)} GB`;

// What it comes to, in a line.
export function verdict(plan) {
  const values = { needed: gigabytes(plan.ways[0].needed_bytes), has: gigabytes(plan.device_memory_bytes) };
  if (plan.fits === false) return text("plan.not", values);
  return text(plan.with?.choices ? "plan.fits_with" : "plan.fits", values);
}
