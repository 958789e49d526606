// What the page says: one table of texts, in the language of the browser or the one that was chosen.

const TEXTS = await (await fetch(new URL("texts.json", import.meta.url))).json();
export const LANGUAGES = { en: "English", zh: "中文" };
const STORED = "opensora.language";

const listeners = new Set();
let language = localStorage.getItem(STORED) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
document.documentElement.lang = language;

export const current = () => language;

// A text of the table with its {values}; the key itself tells where one is missing.
export function text(key, values = {}) {
  const words = TEXTS[key]?.[language] ?? key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

// Writes a text into a node or an attribute of it, and again whenever the language changes.
export function say(node, property, key) {
  const [name, values] = Array.isArray(key) ? key : [key, {}];
  node.said = { ...node.said, [property]: [name, values] };
  node.setAttribute("data-said", "");
  write(node, property, name, values);
}

function write(node, property, key, values) {
  if (property === "textContent") node.textContent = text(key, values);
  else node.setAttribute(property, text(key, values));
}

export function choose(chosen) {
  language = chosen;
  localStorage.setItem(STORED, chosen);
  document.documentElement.lang = chosen;
  for (const node of document.querySelectorAll("[data-said]")) {
    for (const [property, [key, values]] of Object.entries(node.said)) write(node, property, key, values);
  }
  listeners.forEach((listener) => listener());
}

// Calls `listener` whenever another language is chosen.
export function onLanguage(listener) {
  listeners.add(listener);
}
