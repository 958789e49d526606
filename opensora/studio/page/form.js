// The fields of the form, by the table of settings: a label, an input, what the model would choose, and what is wrong.

import { button, element } from "./dom.js";
import { text } from "./language.js";
import { change, FIELDS, onSettings, settings } from "./settings.js";

// A field by its name in the API: {node, input}.
export function field(name) {
  const { kind, offered, choices, min, step, empty } = FIELDS[name];
  const id = `field-${name}`;
  const common = { id, name, "aria-describedby": `${id}-error`, oninput: () => change({ [name]: input.value }, input) };
  let input;
  if (kind === "words") {
    const isPrompt = name === "prompt";
    const example = isPrompt && "prompt.example";
    input = element("textarea", { ...common, rows: isPrompt ? 3 : 1, say_placeholder: example });
  } else if (kind === "choice") input = element("select", common, choices && options(choices, empty));
  else {
    const ofNumbers = { type: "number", min, step, inputmode: "decimal" };
    const typed = kind === "number" ? ofNumbers : { type: "text", list: offered && `${id}-list` };
    input = element("input", { ...common, ...typed, autocomplete: "off" });
  }
  const list = offered && element("datalist", { id: `${id}-list` });
  list?.append(...offered.map((value) => element("option", { value })));
  const isSeed = name === "seed";
  const node = element("div", { class: `field ${name}`, "data-field": name },
    element("label", { for: id, say: `field.${name}`, say_title: `about.${name}` }),
    isSeed ? element("div", { class: "with-button" }, input, button("seed.new", newSeed, { class: "quiet" })) : input,
    list,
    element("p", { class: "error", id: `${id}-error`, role: "alert" }));
  const draw = (source) => {
    if (source !== input) input.value = settings[name];
  };
  onSettings(draw);
  draw();
  return { node, input, draw };
}

// What may be chosen; `empty` says what it means to choose nothing, where that may be.
function options(choices, empty) {
  const nothing = empty ? [element("option", { value: "", say: empty })] : [];
  return [...nothing, ...choices.map((value) => element("option", { value }, value))];
}

function newSeed() {
  change({ seed: String(Math.floor(Math.random() * 2 ** 31)) });
}

// The models of the server as the choices of a field; the first where none, or one that is gone, was chosen.
export function offerModels(models, { input, draw }) {
  input.replaceChildren(...options(models));
  if (!models.includes(settings.model)) change({ model: models[0] ?? "" });
  draw();
}

// What the model chooses where a field is left empty.
export function showOwn(fields, own) {
  for (const [name, { input }] of Object.entries(fields)) {
    if (name in own && "placeholder" in input) input.placeholder = String(own[name] ?? "");
  }
}

// Fields that the API calls otherwise, or that stand in a group.
const SHOWN_AT = {
  size: "width",
  image_size: "width",
  seconds: "num_frames",
  channel_scales: "cfg_channels",
  ...Object.fromEntries(
    ["image", "last_image", "extend", "edit", "strength", "reference_path", "mask_strategy", "input_reference"].map(
      (name) => [name, "frames"],
    ),
  ),
};

// Shows an error at its field, or at the end of the form, and goes there.
export function showError(form, error) {
  clearErrors(form);
  const name = SHOWN_AT[error.param] ?? error.param;
  const own = form.querySelector(`[data-field="${CSS.escape(name ?? "")}"]`);
  const place = own ?? form.querySelector("[data-field=form]");
  place.classList.add("wrong");
  place.closest("details")?.setAttribute("open", "");
  // Errors name fields in backticks, as the API calls them; here they have their names of the form.
  const words = error.message.replace(/`(\w+)`/g, (whole, key) => (key in FIELDS ? text(`field.${key}`) : key));
  place.querySelector(":scope > .error").textContent = words;
  place.scrollIntoView({ block: "nearest" });
  place.querySelector("input, textarea, select")?.focus({ preventScroll: true });
}

export function clearErrors(form) {
  for (const wrong of form.querySelectorAll(".wrong")) {
    wrong.classList.remove("wrong");
    wrong.querySelector(":scope > .error").textContent = "";
  }
}
