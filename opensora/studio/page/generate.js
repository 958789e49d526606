// The tab where a clip is asked for: the form at the left, what became of the last one at the right.

import { channelPicker } from "./channels.js";
import { button, element, notify, replace } from "./dom.js";
import { clearErrors, field, offerModels, showError, showOwn } from "./form.js";
import { givenFrames } from "./frames.js";
import { isMade, newestFirst, onVideos, remember, video } from "./jobs.js";
import { onLanguage, text } from "./language.js";
import { get, post, Refused } from "./server.js";
import { asRequest, change, onSettings, reset, settings } from "./settings.js";
import { sketch, onSketch, setKnownFrames } from "./sketch.js";
import { viewer } from "./viewer.js";

const SHOWN = "opensora.shown";
const ROWS = {
  "group.size": ["width", "height", "num_frames", "fps", "resolution", "aspect_ratio"],
  "group.sampling": ["num_inference_steps", "guidance_scale", "seed", "fast"],
  "group.more": ["guider", "sampler", "time_shift", "loop", "format"],
};

export async function show(root) {
  const fields = Object.fromEntries(
    ["prompt", "negative_prompt", "model", ...Object.values(ROWS).flat()].map((name) => [name, field(name)]),
  );
  const channels = channelPicker();
  const frames = givenFrames(setKnownFrames);
  const needs = element("span", { class: "needs", role: "status" });
  const submit = button("generate", null, { type: "submit", class: "primary", title: "Ctrl+Enter" });
  const rows = Object.entries(ROWS).map(([title, names]) =>
    element("fieldset", { class: "group" }, element("legend", { say: title }),
      element("div", { class: "fields" }, names.map((name) => fields[name].node))));
  const form = element("form", { class: "settings", novalidate: true },
    fields.prompt.node, fields.negative_prompt.node, fields.model.node,
    ...rows.slice(0, 2), channels.node, frames.node, rows[2],
    element("div", { class: "submit", "data-field": "form" },
      element("p", { class: "error", role: "alert" }), submit, needs,
      button("form.reset", () => { frames.clear(); reset(); }, { class: "quiet" })));
  const place = element("div", { class: "shown-clip" });
  replace(root, [element("div", { class: "generate" }, form, place)]);

  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearErrors(form);
    submit.disabled = true;
    try {
      await send(frames);
      const isBelow = place.getBoundingClientRect().left < form.getBoundingClientRect().right;
      if (isBelow) place.scrollIntoView(); // on a phone
    } catch (error) {
      showError(form, error instanceof Refused ? error : { message: text("server.away") });
    } finally {
      submit.disabled = false;
    }
  });

  const view = viewer(place);
  const draw = () => {
    const shown = video(sessionStorage.getItem(SHOWN)) ?? newestFirst()[0];
    view.show(shown);
    const pictured = [shown, ...newestFirst()].find((one) => one && isMade(one) && one.model === settings.model);
    channels.pictured(pictured?.id ?? null);
  };
  onVideos(draw);
  onLanguage(draw);
  onSettings(draw);
  draw();

  const source = element("div", { class: "source" });
  const range = element("input", {
    type: "range", min: 0, max: 1, step: 0.05, value: settings.strength,
    oninput: () => change({ strength: range.value }),
  });
  const strength = element("label", { class: "strength" }, element("span", { say: "frames.strength" }), range);
  form.prepend(source);
  const drawSource = () => {
    const from = settings.source;
    source.hidden = !from;
    if (!from) return;
    range.value = settings.strength;
    replace(source, [
      element("span", { say: [`source.${from.kind}`, { prompt: from.prompt.slice(0, 80) }] }),
      from.kind === "edit" && strength,
      button("remove", () => change({ source: null }), { class: "quiet" })].filter(Boolean));
  };
  onSettings(drawSource);
  drawSource();

  onSketch((told) => {
    needs.textContent = told.words();
    needs.classList.toggle("error", told.isWrong);
    if (!told.sketch) return;
    showOwn(fields, told.sketch.own);
    channels.sketched(told.sketch);
    frames.sketched(told.sketch);
  });
  const models = new Map((await get("v1/models")).data.map(({ id, defaults }) => [id, defaults]));
  let own = null; // defaults of the model that was chosen last: what is known until there is a sketch
  const drawOwn = () => {
    const defaults = models.get(settings.model);
    if (!defaults || defaults === own) return;
    own = defaults;
    showOwn(fields, defaults);
    channels.sketched({ own });
  };
  offerModels([...models.keys()], fields.model);
  onSettings(drawOwn);
  onSettings(sketch);
  drawOwn();
  sketch();
}

// Sends the request; frames make a form of it, since only a form holds files.
async function send(frames) {
  const { source } = settings;
  const { files, fields } = frames.asked();
  let body = { ...asRequest(), ...fields, ...(source?.kind === "edit" && { strength: Number(settings.strength) }) };
  if (files.length) {
    const form = new FormData();
    for (const [name, value] of Object.entries(body)) {
      form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    }
    for (const [name, file] of files) form.append(name, file, file.name);
    body = form;
  }
  const made = remember(await post(source ? `v1/videos/${source.id}/${source.kind}` : "v1/videos", body));
  sessionStorage.setItem(SHOWN, made.id);
  notify(text("sent"));
}
