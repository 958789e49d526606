// The line above the tabs: whether the server answers, the language, light or dark.

import { element, replace } from "./dom.js";
import { isWaiting, newestFirst, onVideos, queue, started } from "./jobs.js";
import { choose, current, LANGUAGES, onLanguage, text } from "./language.js";
import { keepTab } from "./tabs.js";

const THEME = "opensora.theme";
const THEMES = ["auto", "light", "dark"];
const TABS = ["generate", "queue", "gallery", "compare", "plan", "train"];
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

// Shows it; `relabel` has Gradio ask `labels` again.
export function show(root, relabel) {
  const state = element("span", { class: "connection", role: "status" });
  const languages = Object.entries(LANGUAGES).map(([value, name]) =>
    element("option", { value, selected: value === current() }, name));
  const language = element("select", { say_aria_label: "language", onchange: () => choose(language.value) }, languages);
  const theme = element("select", { say_aria_label: "theme", onchange: () => chooseTheme(theme.value) },
    THEMES.map((value) => element("option", { value, say: `theme.${value}`, selected: value === storedTheme() })));
  replace(root, [element("header", { class: "studio-header" },
    element("h1", {}, "Open-Sora ", element("span", { say: "studio" })), state, language, theme)]);

  chooseTheme(storedTheme());
  prefersDark.addEventListener("change", () => chooseTheme(storedTheme()));
  const draw = () => {
    const count = newestFirst().filter(isWaiting).length;
    state.classList.toggle("away", !queue.is_connected);
    state.textContent = text(queue.is_connected ? "server.there" : "server.away", { count });
  };
  onVideos(draw);
  onLanguage(() => {
    draw();
    relabel();
  });
  started.then(draw, (error) => {
    state.textContent = error.message;
  });
  keepTab();
  relabel();
}

const storedTheme = () => localStorage.getItem(THEME) ?? "auto";

function chooseTheme(theme) {
  localStorage.setItem(THEME, theme);
  document.body.classList.toggle("dark", theme === "dark" || (theme === "auto" && prefersDark.matches));
}

// What Gradio writes on its tabs.
export const labels = () => TABS.map((name) => ({ __type__: "update", label: text(`tab.${name}`) }));
