"""The page at `/`: what the server says of it, and what it does in a browser, if there is one."""

import json
import re
import shutil
import threading
import webbrowser
from pathlib import Path

import pytest
import served
from served import FakeEngine, serving

import phi3_mlx
from phi3_mlx.cli import main
from phi3_mlx.engine.plan import Plan
from phi3_mlx.errors import OptionError
from phi3_mlx.server import running, static
from phi3_mlx.server.models import Models
from phi3_mlx.server.work import Begun, Ended, ModelCard, Piece

FOLDER = Path(static.__file__).parent / "page"
CARDS = [ModelCard("echo", 0, 4096, "says what it is told"), ModelCard("other", 0, 4096, "says it too")]
SECONDS = 60_000  # milliseconds that a browser may take


class TwoModels(FakeEngine):
    """Answers for two names, and keeps what it was asked."""

    def submit(self, work, listener):
        name, served.CARD = served.CARD, next(card for card in CARDS if card.name == work.model)
        try:
            return super().submit(work, listener)
        finally:
            served.CARD = name

    def listed(self):
        return CARDS


def plans(name, tokens):
    lengths = [256, 4096] if tokens is None else [tokens]
    return 2 * 10**9, {length: Plan(10**9, 10**5 * length, 10**8, 64) for length in lengths}


def test_the_page_s_files_are_those_of_the_folder_and_ask_no_other_host():
    with serving() as server:
        for path in static.PAGE_PATHS:
            status, headers, text = server.request("GET", path)
            assert status == 200
            assert text == (FOLDER / (path[1:] or "index.html")).read_text(encoding="utf-8")
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
            assert not re.findall(r"\sstyle=|\son\w+=\"|innerHTML|eval\(", text)
    assert {path[1:] or "index.html" for path in static.PAGE_PATHS} == {file.name for file in FOLDER.iterdir()}


def test_with_a_key_the_page_is_told_and_nothing_else():
    with serving(key="secret", plans=plans) as server:
        assert {server.request("GET", path)[0] for path in static.PAGE_PATHS} == {200}
        assert server.request("GET", "/plan?model=echo")[0] == 401
        assert server.request("GET", "/plan?model=echo", headers={"authorization": "Bearer secret"})[0] == 200


def test_a_plan_tells_the_parts_of_memory_by_length():
    models = Models(["tiny"], memory="2GB")
    with serving(plans=models.plans) as server:
        status, _, told = server.request("GET", "/plan?model=tiny&tokens=500")
        assert status == 200
        assert told["limit"] == 2 * 10**9
        planned = phi3_mlx.memory_plan("tiny", 500, here=True)
        assert told["lengths"] == [
            {"tokens": 500, "weights": planned.weights, "cache": planned.cache, "work": planned.workspace}
        ]
        _, _, told = server.request("GET", "/plan?model=tiny")
        assert [plan["tokens"] for plan in told["lengths"]] == [256, 512, 1024, 2048, 4096]
        assert server.request("GET", "/plan?model=nobody")[0] == 404
        for wrong in ("0", "-1", "x", "9" * 30, "1" * 11, "1" * 5000):
            status, _, told = server.request("GET", f"/plan?model=tiny&tokens={wrong}")
            assert (status, told["error"]["param"]) == (400, "tokens")


def test_serve_opens_the_page_in_a_browser(monkeypatch):
    opened, told = [], threading.Event()
    monkeypatch.setattr(webbrowser, "open", lambda url: (opened.append(url), told.set()))
    monkeypatch.setattr(running, "run", lambda app, service, listening, on_start: (on_start(), service.close()))
    with pytest.raises(SystemExit):
        main(["serve", "-m", "tiny", "--port", "0", "--open"])
    assert told.wait(60)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", opened[0])


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def engine():
    return TwoModels()


@pytest.fixture
def page(browser, engine):
    """The page, with no word on its console, and no request to another host, when the test is over."""
    with serving(engine, plans=plans) as server:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(SECONDS)
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.locator("option").first.wait_for(state="attached")
        yield page
        page.close()
        assert [line for line in said if "status of 4" not in line] == []
        assert all(url.startswith((server.url, "data:")) for url in asked)


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator("#send").wait_for(state="visible")
    page.locator(".figures", has_text="planned").last.wait_for()


def test_a_chat_streams_and_goes_on(page, engine):
    say(page, "one two three")
    assert page.locator(".text").inner_text().strip() == "one two three"
    figures = page.locator(".figures").inner_text()
    assert re.fullmatch(r"first token .* s · .* tokens/s · 1\.1 GB planned · 3 \+ 3 tokens", figures)
    say(page, "four")
    roles = [(message["role"], message["content"].strip()) for message in engine.tickets[-1].work.prompt]
    assert roles == [("user", "one two three"), ("assistant", "one two three"), ("user", "four")]


def test_an_answer_can_be_stopped_and_a_message_edited(page, engine):
    go_on = threading.Event()

    def slow(ticket, tell):
        tell(Begun(1, 0, (), ""))
        tell(Piece(0, "first ", (served.token("first ", 0),)))
        go_on.wait(60)
        tell(Ended(0, "stop", 1))

    engine.script = slow
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    page.locator(".text span").wait_for()
    page.keyboard.press("Escape")
    page.locator(".figures", has_text="stopped").wait_for()
    assert engine.tickets[-1].cancelled.wait(60)
    go_on.set()
    engine.script = served.say_words
    page.locator(".user button").click()
    page.locator(".user").wait_for(state="detached")
    assert page.input_value("#prompt") == "go"
    assert page.locator(".answer").count() == 0
    say(page, "gone on")
    assert [message["content"] for message in engine.tickets[-1].work.prompt] == ["gone on"]
    page.press("#prompt", "ArrowUp")
    page.locator(".user").wait_for(state="detached")
    assert page.input_value("#prompt") == "gone on"


def test_two_models_answer_one_prompt_side_by_side(page, engine):
    page.check("#compare")
    assert [page.locator(".name").nth(n).input_value() for n in (0, 1)] == ["echo", "other"]
    page.locator("summary", has_text="Settings").nth(1).click()
    page.locator(".temperature").nth(1).fill("0.5")
    page.locator(".max_tokens").nth(1).fill("1")
    say(page, "one two")
    first, second = [ticket.work for ticket in engine.tickets[-2:]]
    assert (first.model, second.model) == ("echo", "other")
    assert (first.request.temperature, second.request.temperature) == (0.0, 0.5)
    assert [page.locator(".text").nth(n).inner_text().strip() for n in (0, 1)] == ["one two", "one"]
    assert "cut at the most tokens" in page.locator(".figures").nth(1).inner_text()


def test_a_token_tells_what_else_could_have_stood_there(page):
    say(page, "alpha beta")
    page.locator(".text span").nth(1).hover()
    tooltip = page.locator("#token")
    tooltip.wait_for(state="visible")
    assert [row.split("\t") for row in tooltip.inner_text().splitlines()] == [["beta ", "60.7 %"], ["other", "22.3 %"]]
    page.mouse.move(5, 5)
    tooltip.wait_for(state="hidden")
    page.focus(".text")
    page.keyboard.press("ArrowRight")
    tooltip.wait_for(state="visible")
    assert "alpha" in tooltip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "beta" in tooltip.inner_text()


def test_a_schema_a_system_message_and_tools_are_sent(page, engine):
    page.locator("#more summary").click()
    page.fill("#system", "Be brief.")
    page.fill("#schema", '{"type": "object"}')
    say(page, "one")
    work = engine.tickets[-1].work
    assert work.prompt[0] == {"role": "system", "content": "Be brief."}
    assert json.loads(work.request.schema) == {"type": "object"}
    page.fill("#schema", "")
    page.fill("#tools", json.dumps([{"type": "function", "function": {"name": "weather"}}]))
    say(page, "two")
    assert [tool.name for tool in engine.tickets[-1].work.tools] == ["weather"]
    page.fill("#tools", "no JSON")
    page.fill("#prompt", "three")
    page.press("#prompt", "Enter")
    page.locator("#problem", has_text="the tools field is no JSON").wait_for()
    assert page.input_value("#prompt") == "three"


def test_a_tool_is_called_and_what_it_gives_is_sent(page, engine):
    call = '[{"name": "weather", "arguments": {"city": "Oslo"}}]'

    def calling(ticket, tell):
        said = "It snows." if ticket.work.prompt[-1]["role"] == "tool" else f"<|tool_call|>{call}<|/tool_call|>"
        tell(Begun(1, 0, (), ""))
        tell(Piece(0, said, (served.token(said, 0),)))
        tell(Ended(0, "stop", 1))

    engine.script = calling
    page.locator("#more summary").click()
    page.fill("#tools", json.dumps([{"type": "function", "function": {"name": "weather"}}]))
    say(page, "How is it in Oslo?")
    assert page.locator(".call").inner_text().replace(" ", "") == 'weather({"city":"Oslo"})'
    page.fill(".result input", "-3 and snow")
    page.press(".result input", "Enter")
    page.locator(".text", has_text="It snows.").wait_for()
    *_, asked, given = engine.tickets[-1].work.prompt
    assert asked["tool_calls"][0]["function"]["name"] == "weather"
    assert (given["role"], given["content"]) == ("tool", "-3 and snow")
    assert given["tool_call_id"] == asked["tool_calls"][0]["id"]


def test_a_fault_is_told_where_the_answer_would_stand(page, engine):
    def failing(ticket, tell):
        raise OptionError("the duck is tired")

    engine.script = failing
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    page.locator(".answer .problem", has_text="the duck is tired").wait_for()


def test_the_plan_of_memory_is_drawn(page):
    page.locator("summary", has_text="Memory").first.click()
    page.locator(".plan svg").wait_for()
    assert page.locator(".plan polygon").count() == 3
    assert "1.5 GB at 4,096 tokens; 2.0 GB may be used" in page.locator(".plan figcaption").inner_text()


def test_it_is_light_or_dark_and_fits_a_phone(page):
    def color():
        return page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")

    light = color()
    page.click("#theme")
    assert color() != light
    page.reload()
    page.locator("option").first.wait_for(state="attached")
    assert color() != light
    page.set_viewport_size({"width": 360, "height": 640})
    page.check("#compare")
    say(page, "a long word: " + "x" * 300)
    widths = page.locator("html").evaluate("html => [html.scrollWidth, html.clientWidth]")
    assert widths[0] <= widths[1]


@pytest.mark.parametrize(("width", "height"), [(360, 640), (390, 844), (768, 1024), (1280, 800)])
def test_the_chat_has_room_beside_each_panel_at_any_width(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    say(page, "one two three " * 60)

    def fits():
        """The head is one line, nothing is wider than the page, and the chat has a quarter of it."""
        assert page.locator("header").evaluate("head => head.clientHeight") < 60
        assert page.locator("html").evaluate("html => html.scrollWidth") <= width
        assert page.locator("#send").bounding_box()["y"] < height
        return page.locator(".messages").first.evaluate("log => log.clientHeight") >= height / 4

    assert fits()
    for panel in ("System message", "Settings", "Memory"):
        summary = page.locator("summary", has_text=panel).first
        summary.click()
        if panel == "Memory":
            page.locator(".plan svg").wait_for()
        assert fits(), panel
        summary.click()


def test_a_key_is_asked_for_and_used(browser, engine):
    with serving(engine, plans=plans, key="secret") as server:
        page = browser.new_page()
        page.set_default_timeout(SECONDS)
        page.goto(server.url)
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.locator("option").first.wait_for(state="attached")
        page.locator("#key-form").wait_for(state="hidden")
        say(page, "one two")
        assert page.locator(".text").inner_text().strip() == "one two"
        page.close()
