"""The page: tabs of Gradio's, each filled by a script of `page/`, which asks the API and nobody else.

Nothing is made within Gradio: it has no event that calls Python. Tabs are named by the scripts, in the language that is
chosen; the names here are what is seen until then.
"""

from typing import Any

import gradio

from opensora import __version__

TABS = ("generate", "queue", "gallery", "compare", "plan", "train")
"""Each has a script of its name in `page/`."""
_LABELS = "async () => (await import(new URL('studio/page/header.js', document.baseURI))).labels()"
_HEAD = f"""
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="studio/page/studio.css?version={__version__}">
<link rel="modulepreload" href="studio/page/header.js">
<link rel="modulepreload" href="studio/page/generate.js">
"""


def build_page() -> gradio.Blocks:
    """The page, to be mounted with `page_options`."""
    with gradio.Blocks(title="Open-Sora studio", analytics_enabled=False, fill_width=True) as page:
        header = gradio.HTML(
            js_on_load=_shown("header", ", () => trigger('change')"), elem_id="studio-header", apply_default_css=False
        )
        tabs = []
        with gradio.Tabs(elem_id="studio-tabs", overflow_behavior="wrap"):
            for name in TABS:
                with gradio.Tab(name.capitalize(), id=name) as tab:
                    gradio.HTML(js_on_load=_shown(name), elem_id=f"studio-{name}", apply_default_css=False)
                tabs.append(tab)
        header.change(fn=None, js=_LABELS, outputs=tabs)
    return page


def page_options() -> dict[str, Any]:
    """How Gradio shows it: with fonts of the system, so that nothing is fetched from elsewhere."""
    theme = gradio.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")  # 4.5 : 1 and more
    return {"theme": theme, "head": _HEAD, "footer_links": [], "run_history": False, "ssr_mode": False}


def _shown(name: str, more: str = "") -> str:
    """The script of a part of the page, told where to show it."""
    return f"import(new URL('studio/page/{name}.js', document.baseURI)).then((part) => part.show(element{more}))"
