// The tabs are Gradio's; here they are opened by name, and remembered over a reload.

const STORED = "opensora.tab";

const tabNamed = (name) => document.querySelector(`[role=tab][data-tab-id="${name}"]`);

export function openTab(name) {
  document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
  tabNamed(name)?.click();
  window.scrollTo({ top: 0 });
}

// Opens the tab of before the reload, and keeps which one is open.
export function keepTab() {
  const stored = sessionStorage.getItem(STORED);
  if (stored) tabNamed(stored)?.click();
  document.addEventListener("click", (event) => {
    const tab = event.target.closest?.("[role=tab]");
    if (tab) sessionStorage.setItem(STORED, tab.dataset.tabId);
  });
}
