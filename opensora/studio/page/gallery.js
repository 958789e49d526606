// The tab of all clips that were made: thumbnails as far as one scrolls, each with its record and what to do with it.

import { compared, onCompared, toggleCompared } from "./chosen.js";
import { button, element, replace } from "./dom.js";
import { isMade, newestFirst, onVideos, readMore, video as videoOf } from "./jobs.js";
import { onLanguage, text } from "./language.js";
import { media, release } from "./server.js";
import { openTab } from "./tabs.js";
import { viewer } from "./viewer.js";

export function show(root) {
  const search = element("input", {
    type: "search", say_placeholder: "gallery.search", say_aria_label: "gallery.search", oninput: draw,
  });
  const count = element("span", { class: "state", role: "status" });
  const compare = button("gallery.compare", () => openTab("compare"));
  const empty = element("p", { class: "empty", say: "gallery.empty" });
  const grid = element("ul", { class: "gallery" });
  const end = element("div", { class: "end" });
  replace(root, [element("div", { class: "gallery-tab" },
    element("div", { class: "bar" }, search, compare, count), empty, grid, end)]);

  const cards = new Map();
  // Pictures are fetched when they come near the screen, and let go of when they are far away.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) cards.get(entry.target.dataset.id)?.picture(entry.isIntersecting);
  }, { rootMargin: "600px" });
  const atEnd = new IntersectionObserver(async ([entry]) => {
    if (!entry.isIntersecting || !(await readMore().catch(() => false))) return;
    atEnd.unobserve(end); // asks again whether the end is still on the screen
    atEnd.observe(end);
  }, { rootMargin: "1200px" });
  atEnd.observe(end);

  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const made = newestFirst().filter(isMade);
    const found = made.filter(({ prompt }) => words.every((word) => prompt.toLowerCase().includes(word)));
    for (const one of found) {
      if (!cards.has(one.id)) {
        const made = card(one);
        cards.set(one.id, made);
        near.observe(made.node);
      }
      cards.get(one.id).draw();
    }
    replace(grid, found.map(({ id }) => cards.get(id).node));
    empty.hidden = found.length > 0;
    count.textContent = text("gallery.count", { count: found.length });
    compare.disabled = compared().length < 2;
    for (const [id, one] of cards) {
      if (!videoOf(id)) {
        one.picture(false);
        near.unobserve(one.node);
        cards.delete(id);
      }
    }
  }

  onVideos(draw);
  onCompared(draw);
  onLanguage(draw);
  draw();
}

function card(video) {
  const { id, prompt, size, seconds } = video;
  const image = element("img", { alt: "", width: 160, height: 160 });
  const check = element("input", {
    type: "checkbox", say_title: "gallery.choose", say_aria_label: "gallery.choose", onchange: () => toggleCompared(id),
  });
  const node = element("li", { "data-id": id },
    element("button", { type: "button", class: "open", title: prompt, onclick: () => details(id) },
      image, element("span", { class: "prompt" }, prompt)),
    element("span", { class: "facts" }, check, `${size} · ${Number(seconds).toFixed(1)} s`));
  let address = null;
  let isNear = false;

  return {
    node,
    draw() {
      check.checked = compared().includes(id);
    },
    async picture(near) {
      isNear = near;
      if (near && address === null) {
        address = "";
        address = await media(`v1/videos/${id}/content?variant=thumbnail`).catch(() => null);
        if (isNear) image.src = address ?? "";
      }
      if (!isNear && address) {
        image.removeAttribute("src");
        release(address);
        address = null;
      }
    },
  };
}

// A clip and its record, over the page.
function details(id) {
  const place = element("div", { class: "shown-clip" });
  const close = () => dialog.close();
  const dialog = element("dialog", { class: "studio-dialog wide" },
    element("button", { type: "button", class: "close quiet", say_aria_label: "close", onclick: close }, "×"), place);
  const view = viewer(place);
  const draw = () => (videoOf(id) ? view.show(videoOf(id)) : close());
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  document.body.append(dialog);
  dialog.showModal();
  const stop = onVideos(draw);
  dialog.addEventListener("close", () => {
    stop();
    dialog.remove();
  });
  draw();
}
