// Asks the server: with the key, if it has keys, and with errors as one line and the field that they are about.

import { button, element } from "./dom.js";

const KEY = "opensora.key";
const BASE = new URL("../../", import.meta.url);

// What the server answered instead of what was asked for.
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `HTTP ${status}`);
    [this.status, this.code, this.param] = [status, error?.code, error?.param];
  }
}

export const url = (path) => new URL(path, BASE).href;

// The response to a request; throws `Refused`. Asks for the key where one is needed.
export async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(url(path), { ...options, headers });
    if (response.ok) return response;
    const error = (await response.json().catch(() => ({}))).error;
    if (response.status !== 401) throw new Refused(response.status, error);
    await askForKey(key !== null);
  }
}

export const get = async (path) => (await request(path)).json();

// Sends fields as JSON, or a form as it is, and returns the answer.
export async function post(path, body = {}, method = "POST") {
  const isForm = body instanceof FormData;
  const headers = isForm ? {} : { "Content-Type": "application/json" };
  const response = await request(path, { method, headers, body: isForm ? body : JSON.stringify(body) });
  return response.status === 204 ? null : response.json();
}

export const remove = (path) => request(path, { method: "DELETE" });

// An address that <img> and <video> can show: they send no key, so with one the content is fetched first.
export async function media(path) {
  if (sessionStorage.getItem(KEY) === null) return url(path);
  return URL.createObjectURL(await (await request(path)).blob());
}

// Forgets what `media` fetched.
export function release(address) {
  if (address?.startsWith("blob:")) URL.revokeObjectURL(address);
}

let asking = null; // one dialog for all that wait for the key

function askForKey(isWrong) {
  asking ??= new Promise((resolve) => {
    const input = element("input", { type: "password", id: "key", autocomplete: "current-password", required: true });
    const form = element("form", { method: "dialog" },
      element("label", { for: "key", say: "key.ask" }), input,
      element("p", { class: "error", say: isWrong ? "key.wrong" : "key.where" }),
      element("div", { class: "buttons" }, button("key.use", null, { type: "submit", class: "primary" })));
    const dialog = element("dialog", { class: "studio-dialog", oncancel: (event) => event.preventDefault() }, form);
    form.addEventListener("submit", () => {
      sessionStorage.setItem(KEY, input.value.trim());
      dialog.remove();
      asking = null;
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

const isSeen = () => new Promise((resolve) => {
  const look = () => {
    if (document.hidden) return;
    document.removeEventListener("visibilitychange", look);
    resolve();
  };
  document.addEventListener("visibilitychange", look);
  look();
});

// Server-sent events, for ever: reconnects where the line breaks, and says where it was. EventSource sends no key.
// A tab that nobody sees listens to nothing: browsers open six connections to a server, for all tabs together.
export async function events(path, onEvent, onState) {
  let last = null;
  let pause_ms = 500;
  for (;;) {
    await isSeen();
    const line = new AbortController();
    const hide = () => document.hidden && line.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const headers = { Accept: "text/event-stream", ...(last !== null && { "Last-Event-ID": last }) };
      const response = await request(path, { headers, signal: line.signal });
      onState(true);
      pause_ms = 500;
      for await (const event of parsed(response.body)) {
        if (event.id !== undefined) last = event.id;
        if (event.data !== undefined) onEvent(event.event ?? "message", JSON.parse(event.data));
      }
    } catch (error) {
      if (error instanceof Refused && error.status < 500 && error.status !== 429) throw error;
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    if (line.signal.aborted) continue;
    onState(false);
    await new Promise((resolve) => setTimeout(resolve, pause_ms));
    pause_ms = Math.min(2 * pause_ms, 8_000);
  }
}

async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const event = {};
      for (const line of block.split(/\r?\n/)) {
        const [, name, content] = line.match(/^(\w+): ?(.*)$/) ?? [];
        if (name) event[name] = name === "data" && event.data ? `${event.data}\n${content}` : content;
      }
      yield event;
    }
  }
}
