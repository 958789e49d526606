// Elements of the page. Text from outside is only ever put in as text, never as markup.

import { say } from "./language.js";

// An element: attributes by name, listeners as `onclick`, `say: key` for a text of the table, `class` as in HTML.
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "say") say(node, "textContent", value);
    else if (name.startsWith("say_")) say(node, name.slice(4).replace("_", "-"), value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// A button that says a text of the table.
export function button(key, onclick, attributes = {}) {
  return element("button", { type: "button", say: key, onclick, ...attributes });
}

// Puts children in the place of others; nodes that stay are not moved, so that focus and playing go on.
export function replace(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.childNodes]) if (!wanted.has(child)) child.remove();
  children.forEach((child, place) => {
    if (parent.childNodes[place] !== child) parent.insertBefore(child, parent.childNodes[place] ?? null);
  });
}

// A message for a few seconds at the edge of the page, which screen readers read.
export function notify(text, kind = "") {
  let list = document.getElementById("notices");
  if (!list) {
    list = element("div", { id: "notices", role: "status", "aria-live": "polite" });
    document.body.append(list);
  }
  const notice = element("p", { class: kind, onclick: () => notice.remove() }, text);
  list.append(notice);
  setTimeout(() => notice.remove(), kind === "error" ? 12_000 : 4_000);
}

// Asks yes or no in a dialog of the page; resolves to whether it was yes.
export function confirmed(key, values = {}) {
  return new Promise((resolve) => {
    const end = (answer) => () => {
      dialog.remove();
      resolve(answer);
    };
    const dialog = element("dialog", { class: "studio-dialog", oncancel: end(false) },
      element("p", { say: [key, values] }),
      element("div", { class: "buttons" },
        button("yes", end(true), { class: "primary" }),
        button("no", end(false))));
    document.body.append(dialog);
    dialog.showModal();
  });
}
