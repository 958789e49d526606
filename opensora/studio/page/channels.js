// Which latent channels are guided, and how strongly: one tile for each channel, with what it holds of the last clip.

import { element, replace } from "./dom.js";
import { media, release } from "./server.js";
import { change, onSettings, settings } from "./settings.js";

const WAYS = ["own", "chosen", "scales"];

// The address of a clip's channels as a picture; null where it has none.
async function shownPicture(id) {
  const address = await media(`v1/videos/${id}/content?variant=channels`).catch(() => null);
  const image = element("img", { src: address ?? "" });
  return image.decode().then(() => address, () => null);
}

// The picker, and how it is told what the model is (`sketch`) and which clip its pictures are of (`picture`).
export function channelPicker() {
  const tiles = element("div", { class: "channels" });
  const ways = WAYS.map((way) =>
    element("label", { class: "choice" },
      element("input", { type: "radio", name: "guided", value: way, onchange: () => chooseWay(way) }),
      element("span", { say: `channels.${way}` })));
  const node = element("fieldset", { class: "group", "data-field": "cfg_channels" },
    element("legend", { say: "channels.title" }),
    element("div", { class: "choices" }, ways),
    tiles,
    element("p", { class: "hint", say: "channels.hint" }),
    element("p", { class: "error", role: "alert" }));
  let model = { channels: 4, cfg_channels: [0, 1, 2, 3], own: {} };
  let address = null;
  let pictureOf = null;

  function chooseWay(way) {
    const changed = { guided: way };
    if (way === "chosen" && !settings.channels.length) changed.channels = [...model.cfg_channels];
    if (way === "scales" && settings.scales.length !== model.channels) changed.scales = ownScales();
    change(changed);
  }

  function ownScales() {
    const scale = settings.guidance_scale || String(model.own.guidance_scale ?? 1);
    return [...Array(model.channels).keys()].map((channel) => (model.cfg_channels.includes(channel) ? scale : "1"));
  }

  function isGuided(channel) {
    if (settings.guided === "own") return model.cfg_channels.includes(channel);
    if (settings.guided === "chosen") return settings.channels.includes(channel);
    return Number(settings.scales[channel]) !== 1;
  }

  function toggle(channel) {
    const others = settings.channels.filter((other) => other !== channel);
    const chosen = settings.channels.includes(channel) ? others : [...others, channel];
    change({ channels: chosen.sort((first, second) => first - second) });
  }

  function tile(channel) {
    const picture = element("span", { class: "latent", "aria-hidden": "true" });
    const check = element("input", {
      type: "checkbox", onchange: () => toggle(channel), say_title: ["channels.one", { channel }],
    });
    const scale = element("input", {
      type: "number", min: 0, step: 0.1, inputmode: "decimal", say_title: ["channels.scale", { channel }],
      "aria-label": `${channel}`,
      oninput: () => change({ scales: settings.scales.map((old, at) => (at === channel ? scale.value : old)) }, scale),
    });
    const name = element("label", {}, picture, element("span", { class: "name" }, check, `${channel}`));
    return { node: element("div", { class: "channel" }, name, scale), picture, check, scale };
  }

  let shown = [];
  function draw(source = null) {
    if (shown.length !== model.channels) {
      shown = [...Array(model.channels).keys()].map(tile);
      replace(tiles, shown.map((one) => one.node));
    }
    ways.forEach((label, place) => {
      label.firstChild.checked = WAYS[place] === settings.guided;
    });
    tiles.dataset.way = settings.guided;
    shown.forEach((one, channel) => {
      one.node.classList.toggle("guided", isGuided(channel));
      one.check.checked = isGuided(channel);
      one.check.disabled = settings.guided !== "chosen";
      one.scale.hidden = settings.guided !== "scales";
      if (one.scale !== source) one.scale.value = settings.scales[channel] ?? "";
      one.picture.style.backgroundImage = address ? `url("${address}")` : "";
      one.picture.style.backgroundSize = `100% ${100 * model.channels}%`;
      one.picture.style.backgroundPosition = `0 ${(100 * channel) / Math.max(1, model.channels - 1)}%`;
    });
  }

  onSettings(draw);
  draw();
  return {
    node,
    sketched(sketch) {
      model = { ...model, ...sketch };
      if (settings.guided === "scales" && settings.scales.length !== model.channels) change({ scales: ownScales() });
      draw();
    },
    // The video whose channels are shown, by id; null for none, as where another model made it.
    async pictured(id) {
      if (pictureOf === id) return;
      pictureOf = id;
      const before = address;
      const found = id && (await shownPicture(id));
      if (pictureOf !== id) return;
      address = found;
      draw();
      release(before);
    },
  };
}
