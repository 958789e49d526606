"""Queue and gallery as a browser shows them: of a server whose clips are noise, made at once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import expect
from server.test_worker import until
from studio_server import StudioServer

from opensora.server.jobs import Job

pytestmark = pytest.mark.browser
expect.set_options(timeout=60_000)

Opening = Callable[..., Any]
PROMPT = "a small red ball rolls left over the grass"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    server = StudioServer(tmp_path_factory.mktemp("studio"))
    yield server
    server.close()


@pytest.fixture
def running(server: StudioServer) -> Iterator[Job]:
    """A job that goes on until it is cancelled; nothing of the queue is left afterwards."""
    yield server.add("it hangs")
    for job in server.store.queue():
        server.store.cancel(job.id)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def line(page: Any, job: Job) -> Any:
    """Of the queue."""
    return page.locator(f".queue [data-id={job.id}]")


def test_cancelling_what_waits_leaves_what_runs(server: StudioServer, running: Job, open_page: Opening) -> None:
    waits = server.add(PROMPT)
    page = open_page(server.url)
    tab(page, "Queue")
    expect(line(page, running)).to_contain_text("step 7 of 8")
    line(page, waits).get_by_role("button", name="Cancel").click()
    expect(page.locator(".queue.over").locator(f"[data-id={waits.id}]")).to_contain_text("cancelled")
    expect(line(page, running)).to_contain_text("step 7 of 8")
    assert (server.store.get(waits.id).state, server.store.get(running.id).state) == ("cancelled", "in_progress")


def test_a_reload_and_another_tab_show_the_same(server: StudioServer, running: Job, open_page: Opening) -> None:
    waits = server.add(PROMPT)
    page = open_page(server.url)
    tab(page, "Queue")
    expect(line(page, running)).to_contain_text("step 7 of 8")
    page.reload()
    expect(line(page, running)).to_contain_text("step 7 of 8")  # the tab stays open, too
    other = open_page(server.url, beside=page)
    tab(other, "Queue")
    expect(line(other, running)).to_contain_text("step 7 of 8")
    line(other, waits).get_by_role("button", name="Hold").click()
    expect(line(page, waits)).to_contain_text("held")


def test_the_order_is_changed_by_keyboard_and_pause(server: StudioServer, running: Job, open_page: Opening) -> None:
    first, second, third = (server.add(PROMPT, seed=seed) for seed in range(3))
    page = open_page(server.url)
    tab(page, "Queue")
    expect(line(page, third)).to_be_visible()
    line(page, third).get_by_role("button", name="Earlier").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".queue:not(.over) > li").nth(2)).to_have_attribute("data-id", third.id)
    assert [job.id for job in server.store.queue()] == [job.id for job in (running, first, third, second)]
    line(page, second).get_by_label("Priority").fill("-3")
    line(page, second).get_by_label("Priority").press("Enter")
    expect(line(page, second)).to_contain_text("priority -3")
    page.get_by_role("button", name="Pause the queue").click()
    expect(page.get_by_role("button", name="Let the queue go on")).to_be_visible()
    assert server.store.summary().is_paused
    page.get_by_role("button", name="Let the queue go on").click()
    expect(page.get_by_role("button", name="Pause the queue")).to_be_visible()


def test_the_queue_and_the_page_outlive_the_server(server: StudioServer, running: Job, open_page: Opening) -> None:
    waits = server.add(PROMPT)
    page = open_page(server.url)
    tab(page, "Queue")
    expect(line(page, waits)).to_be_visible()
    server.stop()
    expect(page.locator(".connection")).to_contain_text("does not answer")
    server.start()
    expect(page.locator(".connection")).to_contain_text("2 in the queue")
    expect(line(page, running)).to_contain_text("step 7 of 8")


def test_a_tab_that_nobody_sees_holds_no_connection(server: StudioServer, open_page: Opening) -> None:
    page = open_page(server.url)
    tab(page, "Queue")
    hide = """is_hidden => { Object.defineProperty(document, "hidden", { value: is_hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange")) }"""
    until(lambda: server.num_streams() == 1)
    page.evaluate(hide, True)
    until(lambda: server.num_streams() == 0)
    missed = server.add("it fails")
    until(lambda: server.store.get(missed.id).state == "failed")
    page.evaluate(hide, False)
    expect(line(page, missed)).to_be_visible()  # what it has missed is told


def test_a_waiting_line_is_dragged_before_another(server: StudioServer, running: Job, open_page: Opening) -> None:
    first, second = (server.add(PROMPT, seed=seed) for seed in range(2))
    page = open_page(server.url)
    tab(page, "Queue")
    line(page, second).drag_to(line(page, first))
    until(lambda: [job.id for job in server.store.queue()] == [running.id, second.id, first.id])
    expect(page.locator(".queue:not(.over) > li").nth(1)).to_have_attribute("data-id", second.id)


def test_what_cannot_be_made_says_why_and_can_be_tried_again(server: StudioServer, open_page: Opening) -> None:
    wrong = server.add("it fails")
    page = open_page(server.url)
    tab(page, "Queue")
    expect(line(page, wrong)).to_contain_text("`fps` is 0, expected more")
    line(page, wrong).get_by_role("button", name="Try again").click()
    until(lambda: server.store.get(wrong.id).attempt == 2 and server.store.get(wrong.id).state == "failed")
    expect(line(page, wrong)).to_contain_text("`fps` is 0, expected more")
    line(page, wrong).get_by_role("button", name="Delete").click()
    expect(line(page, wrong)).to_have_count(0)


def test_what_is_asked_for_is_made_and_shown_with_its_settings(server: StudioServer, open_page: Opening) -> None:
    page = open_page(server.url)
    settings = {"Prompt": PROMPT, "Steps": "6", "Seed": "7", "Width": "40", "Guider": "apg:eta=0"}
    for name, value in settings.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Chosen ones").check()
    page.get_by_title("Guide channel 1").uncheck()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".generate .state")).to_contain_text("made in")
    job = server.store.jobs(limit=1)[0]
    asked = job.request
    assert (asked.prompt, asked.num_inference_steps, asked.seed, asked.width) == (PROMPT, 6, 7, 40)
    assert (asked.guider, asked.cfg_channels) == ("apg:eta=0", [0, 2, 3])
    page.reload()  # the form is as it was
    expect(page.get_by_label("Steps", exact=True)).to_have_value("6")
    expect(page.get_by_title("Guide channel 1")).not_to_be_checked()
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("Steps", exact=True)).to_have_value("")
    tab(page, "Gallery")
    page.locator(f".gallery [data-id={job.id}] .open").click()
    page.get_by_role("dialog").get_by_role("button", name="Use these settings").click()
    for name, value in settings.items():
        expect(page.get_by_label(name, exact=True)).to_have_value(value)
    expect(page.get_by_title("Guide channel 1")).not_to_be_checked()
    expect(page.get_by_title("Guide channel 2")).to_be_checked()


def test_errors_are_shown_at_their_fields(server: StudioServer, open_page: Opening) -> None:
    page = open_page(server.url)
    page.get_by_label("Prompt", exact=True).fill("a small red dragon")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("[data-field=form] > .error")).to_contain_text("does not know: dragon")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Guider", exact=True).fill("apg:eta")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("[data-field=guider] > .error")).to_contain_text("expected options such as")
    expect(page.get_by_label("Guider", exact=True)).to_be_focused()
    expect(page.locator("[data-field=form] > .error")).to_be_empty()
    assert not server.store.queue()


def test_a_chinese_browser_is_answered_in_chinese(server: StudioServer, open_page: Opening) -> None:
    page = open_page(server.url, locale="zh-CN")
    expect(page.get_by_role("tab")).to_have_text(["生成", "队列", "作品", "对比", "预估", "训练"])
    expect(page.get_by_role("button", name="生成", exact=True)).to_be_visible()
    page.get_by_label("语言").select_option("en")
    expect(page.get_by_role("tab").first).to_have_text("Generate")
    page.reload()  # what is chosen stays
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_every_tab_without_scrolling_sideways(
    server: StudioServer, open_page: Opening, theme: str
) -> None:
    page = open_page(server.url, viewport={"width": 390, "height": 844}, is_mobile=True, color_scheme=theme)
    page.get_by_label("Prompt", exact=True).wait_for()
    for name in ("Queue", "Gallery", "Compare", "Plan", "Train", "Generate"):
        tab(page, name)
        expect(page.locator(f"#studio-{name.lower()} > * > *")).not_to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    tops = page.get_by_role("tab").evaluate_all("tabs => tabs.map((tab) => tab.getBoundingClientRect().top)")
    assert len(set(tops)) == 1  # all tabs are in one row
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".shown-clip .stage")).to_be_in_viewport()  # it is below the form


def test_clips_are_compared_within_one_frame(server: StudioServer, open_page: Opening) -> None:
    jobs = [server.add(f"{PROMPT} {seed}", seed=seed, num_frames=17) for seed in range(2)]
    page = open_page(server.url)
    tab(page, "Gallery")
    for job in jobs:
        page.locator(f".gallery [data-id={job.id}]").get_by_label("Choose for comparing").check()
    page.get_by_role("button", name="Compare the chosen ones").click()
    page.locator(".clips video").nth(1).wait_for()
    times = "[...document.querySelectorAll('.clips video')].map(video => video.currentTime)"
    page.wait_for_function(f"(([a, b]) => a > 0.3 && a < 1.8 && Math.abs(a - b) < 1 / 8)({times})")
    page.get_by_role("button", name="Pause").click()
    page.get_by_label("Place in the clips").evaluate(
        "range => { range.value = 0.5; range.dispatchEvent(new Event('input')) }"
    )
    settled = "[...document.querySelectorAll('.clips video')].every(video => video.paused && !video.seeking)"
    page.wait_for_function(
        f"{settled} && (([a, b]) => Math.abs(a - b) < 0.01 && Math.abs(a - 17 / 16) < 0.01)({times})"
    )
    page.get_by_role("button", name="Frame ›").click()
    page.wait_for_function(
        f"{settled} && (([a, b]) => Math.abs(a - b) < 0.01 && Math.abs(a - 19 / 16) < 0.01)({times})"
    )
    bright = """() => { const canvas = document.querySelector('.difference canvas');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      return data.filter((value, place) => place % 4 < 3 && value > 40).length / data.length }"""
    page.wait_for_function(f"({bright})() > 0.3")  # noise against other noise
    expect(page.locator(".figures")).to_contain_text("PSNR", timeout=120_000)
    expect(page.locator(".figures")).to_contain_text("SSIM 0.")


def test_a_gallery_of_500_clips_scrolls(server: StudioServer, open_page: Opening) -> None:
    server.add_clips(server.store.jobs(states=["completed"], limit=1)[0], 500)
    page = open_page(server.url)
    tab(page, "Gallery")
    cards = page.locator(".gallery > li")
    expect(cards.first).to_be_visible()
    loaded = "[...document.querySelectorAll('.gallery img')].filter(image => image.getAttribute('src')).length"
    page.wait_for_function(f"{loaded} > 0")
    assert page.evaluate(loaded) < 100  # what is far away is not fetched
    found = page.get_by_text("copy 0 of a clip", exact=True)
    page.wait_for_function(
        """() => { window.scrollTo(0, document.body.scrollHeight);
          return document.querySelectorAll('.gallery > li').length >= 500 }""",
        polling=50,
        timeout=180_000,
    )
    found.scroll_into_view_if_needed()
    expect(found).to_be_in_viewport()
    image = page.locator(".gallery > li", has=found).locator("img")
    expect(image).to_have_js_property("complete", True)
    page.wait_for_function(f"{loaded} < 150")
    page.get_by_label("Search prompts").fill("copy 499")
    expect(cards).to_have_count(1)
