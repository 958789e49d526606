// Frames that a clip is made from: files that are dropped here, and where in the clip they stand.

import { button, element, replace } from "./dom.js";
import { keep, kept } from "./files.js";

// How a file may be used: as fields of the API of the same name, or placed by the timeline.
const OF_PICTURES = ["image", "last_image", "place"];
const OF_CLIPS = ["extend", "edit", "place"];

// The group of the form; `onChange` is called when files come or go.
export function givenFrames(onChange) {
  const picker = element("input", {
    type: "file", accept: "image/*,video/*", multiple: true, class: "visually-hidden", id: "frames-files",
    onchange: () => {
      take(picker.files);
      picker.value = "";
    },
  });
  const drop = element("label", { class: "drop", for: "frames-files", tabindex: "0" },
    element("span", { say: "frames.drop" }), picker);
  drop.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") picker.click();
  });
  const list = element("ul", { class: "given" });
  const timeline = element("div", { class: "timeline", role: "group", say_aria_label: "frames.timeline" });
  const hint = element("p", { class: "hint", say: "frames.hint" });
  const node = element("fieldset", { class: "group", "data-field": "frames" },
    element("legend", { say: "frames.title" }), drop, list, timeline, hint,
    element("p", { class: "error", role: "alert" }));

  let given = [];
  let chosen = null; // the file whose place is marked on the timeline
  let spans = [];

  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    node.addEventListener(kind, (event) => {
      event.preventDefault();
      node.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files);
    });
  }

  function take(files) {
    for (const file of files) {
      const isClip = file.type.startsWith("video/") || file.type === "image/gif";
      const address = URL.createObjectURL(file);
      chosen = { file, address, isClip, use: freeUse(isClip), strength: 0, cells: new Set([0]) };
      given.push(chosen);
    }
    changed();
  }

  // Beside files on the timeline, one more of them; otherwise the first use that no other file has.
  function freeUse(isClip) {
    const used = given.map((one) => one.use);
    if (used.includes("place")) return "place";
    return (isClip ? ["extend"] : ["image", "last_image"]).find((use) => !used.includes(use)) ?? "place";
  }

  function removeFile(one) {
    URL.revokeObjectURL(one.address);
    given = given.filter((other) => other !== one);
    if (chosen === one) chosen = given[0] ?? null;
    changed();
  }

  function row(one) {
    const isVideo = one.file.type.startsWith("video/");
    const shown = element(isVideo ? "video" : "img", { src: one.address, muted: true, alt: one.file.name });
    const use = element("select", {
      say_aria_label: "frames.use",
      onchange: () => {
        one.use = use.value;
        if (one.use === "edit") one.strength = one.strength || 0.6;
        chosen = one;
        changed();
      },
    }, (one.isClip ? OF_CLIPS : OF_PICTURES).map((name) =>
      element("option", { value: name, selected: name === one.use, say: `frames.${name}` })));
    const hasStrength = one.use === "edit" || one.use === "place";
    const strength = element("input", {
      type: "range", min: 0, max: 1, step: 0.05, value: String(one.strength), say_aria_label: "frames.strength",
      oninput: () => {
        one.strength = Number(strength.value);
        told.textContent = strength.value;
      },
      onchange: changed,
    });
    const told = element("output", {}, String(one.strength));
    return element("li", { class: one === chosen ? "chosen" : "" },
      element("button", {
        type: "button", class: "shown", say_aria_label: "frames.choose",
        onclick: () => {
          chosen = one;
          draw();
        },
      }, shown, element("span", { class: "number" }, `${given.indexOf(one) + 1}`)),
      element("span", { class: "file" }, one.file.name),
      use,
      hasStrength &&
        element("label", { class: "strength" }, element("span", { say: "frames.strength" }), strength, told),
      button("remove", () => removeFile(one), { class: "quiet" }));
  }

  // Which latent frames a file takes: as marked, or where the API puts it.
  function places(one) {
    if (one.use === "place") return one.cells;
    if (one.use === "edit") return new Set(spans.keys());
    if (one.use === "last_image") return new Set([spans.length - 1]);
    return new Set([0]);
  }

  function cell(place) {
    const [first, end] = spans[place];
    const owners = given.filter((one) => places(one).has(place));
    const numbers = owners.map((one) => given.indexOf(one) + 1).join(" ");
    const isMine = chosen?.use === "place";
    return element("button", {
      type: "button", class: owners.length ? "known" : "", disabled: !isMine, "aria-pressed": String(owners.length > 0),
      say_title: [end - first === 1 ? "frames.frame" : "frames.span", { first, last: end - 1 }],
      onclick: () => {
        if (!chosen.cells.delete(place)) chosen.cells.add(place);
        changed();
        timeline.children[place].focus();
      },
    }, element("b", {}, numbers), element("small", {}, end - first === 1 ? `${first}` : `${first}–${end - 1}`));
  }

  function changed() {
    onChange(given.length > 0);
    keep(given);
    draw();
  }

  function draw() {
    replace(list, given.map(row));
    timeline.hidden = hint.hidden = !given.length || !spans.length;
    replace(timeline, given.length ? spans.map((_, place) => cell(place)) : []);
  }

  kept().then((before) => {
    given = [...before.map((one) => ({ ...one, address: URL.createObjectURL(one.file) })), ...given];
    chosen ??= given[0] ?? null;
    onChange(given.length > 0);
    draw();
  });
  return {
    node,
    sketched(sketch) {
      spans = sketch.spans;
      draw();
    },
    clear() {
      [...given].forEach(removeFile);
    },
    // Files and fields of the request: [[name, file]], {name: value}.
    asked() {
      const placed = given.filter((one) => one.use === "place");
      const others = given.filter((one) => one.use !== "place");
      const files = [...others.map((one) => [one.use, one.file]), ...placed.map((one) => ["reference_path", one.file])];
      const edited = others.find((one) => one.use === "edit");
      const strategy = placed.flatMap((one, number) => entries(one, number)).join(";");
      const fields = { ...(edited && { strength: edited.strength }), ...(strategy && { mask_strategy: strategy }) };
      return { files, fields };
    },
  };
}

// Entries "loop,reference,first frame of it,place,length,strength" of a mask strategy: a picture is placed again in
// every latent frame, a clip goes on from the first one that is marked.
function entries(one, number) {
  const cells = [...one.cells].sort((first, second) => first - second);
  const runs = [];
  for (const cell of cells) {
    const run = runs.at(-1);
    if (one.isClip && run && cell === run.start + run.length) run.length += 1;
    else runs.push({ start: cell, length: 1 });
  }
  return runs.map(({ start, length }) => {
    const first = one.isClip ? start - cells[0] : 0;
    return [0, number, first, start, length, one.strength].join();
  });
}
