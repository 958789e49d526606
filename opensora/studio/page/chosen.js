// The clips that are compared, by id; they stay over a reload.

const STORED = "opensora.compared";

const listeners = new Set();
let chosen = JSON.parse(localStorage.getItem(STORED) ?? "[]");

export const compared = () => chosen;

export function toggleCompared(id) {
  chosen = chosen.includes(id) ? chosen.filter((other) => other !== id) : [...chosen, id];
  localStorage.setItem(STORED, JSON.stringify(chosen));
  listeners.forEach((listener) => listener());
}

export function onCompared(listener) {
  listeners.add(listener);
}
