// What can be done with a video, as buttons.

import { openTab } from "./tabs.js";
import { button, confirmed, element, notify } from "./dom.js";
import { act, isMade, isWaiting } from "./jobs.js";
import { text } from "./language.js";
import { media } from "./server.js";
import { change, take } from "./settings.js";
import { sketched } from "./sketch.js";

export function actionsOf(video) {
  const { id, state } = video;
  const quiet = { class: "quiet" };
  const isOver = state === "failed" || state === "cancelled";
  return [
    isMade(video) && button("job.download", () => download(video), quiet),
    button("job.use", () => useSettings(video), quiet),
    isMade(video) && button("job.remix", () => goOn(video, "remix"), quiet),
    isMade(video) && button("job.extend", () => goOn(video, "extend"), quiet),
    isMade(video) && button("job.edit", () => goOn(video, "edit"), quiet),
    isWaiting(video) && button("job.cancel", () => act(id, "cancel"), quiet),
    isOver && button("job.retry", () => act(id, "retry"), quiet),
    !isWaiting(video) && button("job.delete", async () => {
      if (await confirmed("job.delete_sure")) await act(id, "delete");
    }, { class: "quiet danger" }),
  ].filter(Boolean);
}

// Its settings in the form. Frames that it was made from lie on the server: then the new clip is a remix of it.
export function useSettings(video) {
  if (video.inputs.length) return goOn(video, "remix");
  takeFrom(video);
  openTab("generate");
}

// The form asks for a clip that is made from this one.
function goOn(video, kind) {
  takeFrom(video);
  change({ source: { id: video.id, kind, prompt: video.prompt } });
  openTab("generate");
}

function takeFrom(video) {
  const { prompt, model, format } = video;
  take({ ...video.request, prompt, model, format }, sketched()?.sketch?.channels ?? 4);
}

async function download(video) {
  const address = await media(`v1/videos/${video.id}/content`);
  const words = video.prompt.slice(0, 40).replace(/[^\p{L}\p{N}]+/gu, "-") || "clip";
  const name = `${words}-${video.id.slice(-6)}.${video.format}`;
  element("a", { href: address, download: name }).click();
  notify(text("job.downloading", { name }));
}
