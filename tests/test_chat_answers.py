"""What the chat page makes of answers: Markdown, hostile ones, fast ones; and all around them.

In a real Chromium. A scripted server answers, because a model does not write these on demand; the
page with the real service is in test_chat_page.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from service import web
from tests.conftest import PATIENCE
from tests.scripted import ScriptedServer
from tests.test_chat_page import Watch, ask
from tests.test_chat_page import browser as browser

LIBRARY = Path(web.__file__).parent / "markdown-it.umd.min.js"
GUIDE = Path(__file__).parent.parent / "docs" / "getting-started.md"
LIBRARY_SHA256 = "391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e"

MARKDOWN = """\
# Sorting

Use `sorted`, **not** *bubble sort*:

1. First
   - nested
2. Second

   ```sh
   echo "in a list"
   ```

```python
def f(x: int) -> int:
    # ``` is no end
    return x * 2 * 3

print(f(1))
```

| name | steps |
|:-----|------:|
| merge | $n_1 * n_2 * n_3$ |
| a<br>b | ~~many~~ |

**重要：**请看[文档](https://example.com/a_b)。
One line
another

$$
E = mc^2
- b_1
= c
$$

Inline \\(a_1 * b * c\\) and \\[x *y* z\\], for $5 and $6.

> quoted

---
"""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[ScriptedServer]:
    with ScriptedServer(prefix=getattr(request, "param", "")) as server:
        yield server


Opener = Callable[..., Page]


@pytest.fixture
def opened(server: ScriptedServer, browser: Browser) -> Iterator[Opener]:
    """Opens the page; whatever it complains about, or asks elsewhere, fails."""
    watch = Watch()
    contexts = []

    def open_page(**options: Any) -> Page:
        options = {"locale": "en-US", "viewport": {"width": 900, "height": 700}, **options}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        contexts[-1].on("page", watch.add)  # other tabs
        watch.add(page)
        page.goto(server.url)
        expect(page.locator("#send")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    watch.check(server.url)


@pytest.fixture
def page(opened: Opener) -> Page:
    return opened()


def is_answered(page: Page, number: int = 1) -> None:
    """Wait until this many answers are complete, and on the page."""
    expect(page.locator(".model")).to_have_count(number)
    deadline = time.monotonic() + PATIENCE
    # Playwright's own waiting for a condition wants eval, which the page's policy forbids.
    while page.evaluate("running !== null || writers.size > 0"):
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def in_pieces(text: str, size: int = 3) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def in_two_parts(before: str, after: str, until: threading.Event) -> Iterator[str]:
    """What is on the page between the parts stays there until the event."""
    yield from in_pieces(before, 2)
    until.wait(PATIENCE)
    yield from in_pieces(after, 2)


def test_the_library_is_the_published_one() -> None:
    assert hashlib.sha256(LIBRARY.read_bytes()).hexdigest() == LIBRARY_SHA256


def test_the_documentation_tells_the_pages_size() -> None:
    told = re.search(r"one document of (\d+) KB", GUIDE.read_text())
    assert told and abs(len(web.PAGE.encode()) / 1000 - int(told[1])) <= 5


def test_markdown_is_rendered_and_formulas_stay_text(server: ScriptedServer, page: Page) -> None:
    server.answers["go"] = in_pieces(MARKDOWN)
    ask(page, "go")
    is_answered(page)
    answer = page.locator(".model .text")
    expect(answer.locator("h2")).to_have_text("Sorting")
    expect(answer.locator("p > strong")).to_have_text(["not", "重要："])
    expect(answer.locator("ol > li > ul > li")).to_have_text("nested")
    expect(answer.locator("ol .code code")).to_have_text('echo "in a list"')
    code = answer.locator(".part > .code")
    expect(code.locator(".bar span")).to_have_text("python")
    assert "`" not in (code.locator("code").inner_text().replace("# ``` is", ""))
    expect(answer.locator("td").nth(1)).to_have_text("$n_1 * n_2 * n_3$")
    expect(answer.locator("td").nth(1)).to_have_css("text-align", "right")
    expect(answer.locator("td br")).to_have_count(1)
    link = answer.locator("a")
    expect(link).to_have_attribute("href", "https://example.com/a_b")
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(answer).to_contain_text("$$\nE = mc^2\n- b_1\n= c\n$$", use_inner_text=True)
    expect(answer).to_contain_text("\\(a_1 * b * c\\) and \\[x *y* z\\], for $5 and $6.")
    expect(answer.locator("blockquote")).to_have_text("quoted")
    page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    code.get_by_role("button", name="Copy code").click()
    expect(code.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("window.copied")
    assert copied == MARKDOWN.partition("```python\n")[2].partition("```\n\n|")[0]
    page.get_by_role("button", name="Copy", exact=True).click()
    assert page.evaluate("window.copied") == MARKDOWN


def test_an_answer_in_pieces_looks_as_it_does_at_once(server: ScriptedServer, page: Page) -> None:
    # Slower than the frames, so that each piece is drawn.
    server.rate = 200
    server.answers["go"] = in_pieces(MARKDOWN, 2)
    ask(page, "go")
    is_answered(page)
    streamed = page.locator(".model .text").inner_html()
    page.reload()
    is_answered(page)
    assert page.locator(".model .text").inner_html() == streamed


def test_a_price_before_code_or_bold_text_is_no_formula(server: ScriptedServer, page: Page) -> None:
    server.answers["go"] = ["`a` for $5, `b` for US$6, `$c`, `$d`; **$7**, or **$e** each; $x$"]
    ask(page, "go")
    is_answered(page)
    expect(page.locator(".model .text code")).to_have_text(["a", "b", "$c", "$d"])
    expect(page.locator(".model .text strong")).to_have_text(["$7", "$e"])


HOSTILE = {
    "script": "<script>document.title='broken'</script>",
    "handler": "<img src=x onerror=\"document.title='broken'\"><svg/onload=alert(1)>",
    "block": "<div style='position:fixed;inset:0'>\n<iframe src='https://example.com'></iframe>",
    "javascript": "[a](javascript:document.title='broken') <javascript:alert(1)> [b](JaVaScRiPt:1)",
    "entity": "[a](&#106;avascript:alert(1)) [b](\\x01javascript:1) [c](java&#10;script:1)",
    "data": "[a](data:text/html,<script>1</script>) ![b](data:image/svg+xml,<svg/>)",
    "local": "[a](file:///etc/passwd) [b](/v1/models) [c](//x.org) [d](vbscript:1) [e](http:/x)",
    "picture": "![a](javascript:alert(1)) ![b](/x.png)",
    "reference": "[a]\n\n[a]: javascript:alert(1)\n\n[b][a]",
    "info": '```"><script>document.title="broken"</script>\n</code></pre><b>x</b>\n```',
    "table": "| <b>x</b> | [a](javascript:1) |\n|--|--|\n| <i onclick=1>y</i> | z |",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_answer_becomes_html_or_a_link_that_runs(
    server: ScriptedServer, page: Page, text: str
) -> None:
    server.answers["go"] = in_pieces(text)
    ask(page, "go")
    is_answered(page)
    bad = "script, img, svg, iframe, a, b, i, [style*=position], [onclick], [onerror], [onload]"
    assert page.locator(f"main :is({bad})").count() == 0
    assert page.title() == "scripted"


def test_a_picture_is_a_link(server: ScriptedServer, page: Page) -> None:
    server.answers["go"] = ["![a tower](https://example.com/x.png)"]
    ask(page, "go")
    expect(page.locator(".model a")).to_have_text("a tower")
    expect(page.locator(".model a")).to_have_attribute("href", "https://example.com/x.png")


HUGE = {
    "line": "a" * 1_000_000,
    "words": "word " * 200_000,
    "emphasis": "*a_ **b " * 10_000,
    "brackets": "[" * 60_000,
    "quotes": ">" * 60_000,
    "lists": "- " * 30_000,
    "rows": "|a|\n|-|\n" + "|" * 60_000,
    "breaks": "a\n" * 30_000,
    "paragraphs": "a\n\n" * 30_000,
    "code": "```\n" + "x = 1\n" * 100_000,
    "line of code": "```\n" + "x" * 1_000_000,
    "formula": "\\(" * 30_000 + "$$a" * 20_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_with_a_huge_answer_the_page_stays_usable(
    server: ScriptedServer, page: Page, text: str
) -> None:
    server.answers["go"] = in_pieces(text, 50_000)
    ask(page, "go")
    page.locator("#prompt").press_sequentially("next", timeout=PATIENCE * 1000)
    is_answered(page)
    shown = re.sub(r"\s", "", page.locator(".model .text").text_content() or "")
    assert len(shown) >= len(re.sub(r"[\s`*_>|-]", "", text)) * 0.9
    page.locator("#prompt").press("Enter")
    is_answered(page, 2)
    expect(page.locator(".model .text").nth(1)).to_have_text("I heard: next")


LONG = "".join(
    f"## Part {part}\n\nSome *words* on it, and `code`.\n\n- one\n- two\n\n"
    f"```python\nfor i in range({part}):\n    print(i)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    for part in range(300)
)


def test_a_hundred_tokens_a_second_leave_the_page_free(
    server: ScriptedServer, page: Page, browser: Browser
) -> None:
    """Each task of the page has less than 50 ms of processor time, and no text is parsed often.

    Time on the clock would be that of whatever else the machine does.
    """
    tokens = in_pieces(LONG[-4000:], 4)
    server.answers["go"] = iter([LONG, *tokens])
    server.rate = 100
    page.evaluate(
        """() => {
            window.parsed = [];
            const parse = markdown.parse;
            markdown.parse = function (text, env) {
                window.parsed.push(text.length);
                return parse.call(this, text, env);
            };
        }"""
    )
    ask(page, "warm up")
    is_answered(page)
    ask(page, "go")
    drawn = page.locator(".model").nth(1)
    expect(drawn).to_contain_text("Part 299")
    page.evaluate("parsed.length = 0")
    browser.start_tracing(page=page, categories=["toplevel", "__metadata"])
    is_answered(page, 2)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    main = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = [
        event["tdur"] / 1000
        for event in events
        if event["name"].endswith("RunTask")
        and (event["pid"], event["tid"]) in main
        and "tdur" in event
    ]
    assert len(tasks) > len(tokens)
    assert max(tasks) < 50
    parsed = page.evaluate("parsed")
    assert max(parsed) <= 8000
    assert sum(parsed) < len(tokens) * len(LONG) / 20


@pytest.mark.parametrize("has_tag", [True, False], ids=["tagged", "begun by the template"])
def test_reasoning_is_folded(server: ScriptedServer, opened: Opener, has_tag: bool) -> None:
    server.index["think"] = ["<think>", "</think>"]
    thought = threading.Event()
    begin = f"{'<think>' * has_tag}\nLet me **se"
    server.answers["go"] = in_two_parts(begin, "e**.\n</think>\n\nIt is *four*.", thought)
    page = opened()
    ask(page, "go")
    fold = page.locator(".model details")
    expect(fold.locator("div")).to_have_text("Let me **se")
    expect(page.locator(".model .text")).to_have_text("")
    thought.set()
    is_answered(page)
    expect(page.locator(".model .text em")).to_have_text("four")
    expect(fold.locator("div")).to_be_hidden()
    fold.locator("summary").click()
    expect(fold.locator("div")).to_have_text("Let me **see**.")
    ask(page, "and")
    is_answered(page, 2)
    assert server.bodies[-1]["history"] == [["go", "It is *four*."]]


def test_reasoning_is_folded_where_no_tags_are_configured(
    server: ScriptedServer, page: Page
) -> None:
    shown = threading.Event()
    server.answers["go"] = in_two_parts("<think>\nLet me see.\n</th", "ink>\n\nFour.", shown)
    server.answers["less"] = ["<"]
    ask(page, "go")
    expect(page.locator(".model details div")).to_have_text("Let me see. </th")  # not yet a tag
    shown.set()
    is_answered(page)
    expect(page.locator(".model .text")).to_have_text("Four.")
    expect(page.locator(".model details div")).to_have_text("Let me see.")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    ask(page, "less")
    is_answered(page, 2)
    expect(page.locator(".model .text").nth(1)).to_have_text("<")
    assert server.bodies[-1]["history"] == [["go", "<think>\nLet me see.\n</think>\n\nFour."]]


def test_regenerate_ends_an_edit(server: ScriptedServer, page: Page) -> None:
    for number, prompt in enumerate(("one", "two")):
        ask(page, prompt)
        is_answered(page, number + 1)
    page.locator("#prompt").fill("a draft")
    page.get_by_role("button", name="Edit").nth(1).click()
    page.get_by_role("button", name="Regenerate").click()
    is_answered(page, 2)
    expect(page.locator("#editing")).to_be_hidden()
    expect(page.locator("#prompt")).to_have_value("a draft")
    ask(page, "three")
    is_answered(page, 3)
    expect(page.locator(".user .text")).to_have_text(["one", "two", "three"])
    assert [turn[0] for turn in server.bodies[-1]["history"]] == ["one", "two"]


def breaks_off(*pieces: str) -> Iterator[str]:
    yield from pieces
    raise ConnectionError


@pytest.mark.parametrize("pieces", [(), ("half",)], ids=["at once", "in the middle"])
def test_a_failed_attempt_replaces_nothing(
    server: ScriptedServer, page: Page, pieces: tuple[str, ...]
) -> None:
    for number, question in enumerate(("one", "two")):
        ask(page, question)
        is_answered(page, number + 1)
    questions, prompt = page.locator(".user .text"), page.locator("#prompt")
    kept = page.evaluate("kept()[0].turns")
    server.answers["two"] = breaks_off(*pieces)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".model .error")).to_contain_text("The connection broke off")
    expect(page.locator(".model .text").last).to_have_text("".join(pieces))
    expect(prompt).to_have_value("")
    expect(questions).to_have_text(["one", "two", "two"])
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    server.answers["1"] = breaks_off(*pieces)
    prompt.fill("a draft")
    page.get_by_role("button", name="Edit").first.click()
    ask(page, "1")
    expect(page.locator(".model .error")).to_contain_text("The connection broke off")
    expect(questions).to_have_text(["one", "two", "1"])
    assert page.evaluate("kept()[0].turns") == kept
    # What was sent can be sent again, in the same place.
    expect(prompt).to_have_value("1")
    del server.answers["1"]
    prompt.press("Enter")
    is_answered(page)
    expect(questions).to_have_text(["1"])
    expect(prompt).to_have_value("a draft")


@pytest.mark.parametrize(
    "response, told",
    [
        ("'<html>', {status: 429, statusText: 'Too Many Requests'}", "429: Too Many Requests"),
        ("'{}', {status: 429, headers: {'Retry-After': 7}}", "is at its limit. Try again in 7 s."),
        ("'{\"detail\": 1}', {status: 404, statusText: 'Not Found'}", "404: Not Found"),
        ("'null', {status: 500}", "500: it gives no reason"),
        ("'<html>', {status: 502}", "502: it gives no reason"),
    ],
)
def test_what_a_proxy_answers_is_told(page: Page, response: str, told: str) -> None:
    assert page.evaluate(f"problem(new Response({response}))").endswith(told)


def test_a_question_is_edited_and_an_answer_regenerated(server: ScriptedServer, page: Page) -> None:
    for number, prompt in enumerate(("one", "two", "three")):
        ask(page, prompt)
        is_answered(page, number + 1)
    page.get_by_role("button", name="Regenerate").click()
    is_answered(page, 3)
    assert server.bodies[-1] == server.bodies[-2]
    page.get_by_role("button", name="Edit").nth(1).click()
    expect(page.locator("#prompt")).to_have_value("two")
    page.keyboard.press("Escape")
    expect(page.locator("#editing")).to_be_hidden()
    expect(page.locator("#prompt")).to_have_value("")
    page.get_by_role("button", name="Edit").nth(1).click()
    ask(page, "2")
    is_answered(page, 2)
    expect(page.locator(".user .text")).to_have_text(["one", "2"])
    assert server.bodies[-1]["prompt"] == "2"
    assert server.bodies[-1]["history"] == [["one", "I heard: one"]]
    server.refuses = True
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".model .error")).to_contain_text("Try again in 7 s")
    # What was to be replaced is still there.
    expect(page.locator(".user .text")).to_have_text(["one", "2", "2"])
    server.refuses = False
    ask(page, "after")
    is_answered(page, 4)
    assert [turn[0] for turn in server.bodies[-1]["history"]] == ["one", "2"]


def test_conversations_are_kept_chosen_exported_and_deleted(
    server: ScriptedServer, page: Page
) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("System prompt").fill("Be brief.")
    ask(page, "first")
    is_answered(page)
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("System prompt").fill("")
    ask(page, "second")
    is_answered(page)
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["second"])
    page.get_by_role("button", name="Chats").click()
    rows = page.locator("#list li")
    expect(rows).to_have_text([re.compile("^second"), re.compile("^first")])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(download.value.path().read_text())
    assert [talk["messages"] for talk in exported] == [
        [
            {"role": "user", "content": "second"},
            {"role": "assistant", "content": "I heard: second"},
        ],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "I heard: first"},
        ],
    ]
    rows.nth(1).get_by_role("button", name="first").first.click()
    expect(page.locator(".user .text")).to_have_text(["first"])
    ask(page, "more")
    is_answered(page, 2)
    assert server.bodies[-1]["history"] == exported[1]["messages"]
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Delete: first").click()
    expect(rows).to_have_count(1)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(rows).to_have_text("None yet.")
    assert page.evaluate("localStorage.length") == 0


def test_the_browser_keeps_a_bounded_number_and_size(server: ScriptedServer, page: Page) -> None:
    page.evaluate(
        """async () => {
            localStorage.setItem("of another page", "stays");
            localStorage.setItem(PREFIX + "x", "not ours");
            const note = {tokens: 1, rate: 1, first: 1, ends: []};
            for (let i = 0; i < 60; i++) {
                keep({...fresh(), turns: [{prompt: `number ${i}`, text: "", note}]});
                await new Promise((done) => setTimeout(done, 2)); // their order is that of time
            }
        }"""
    )
    assert page.evaluate("kept().length") == 50
    server.answers["long"] = ["a" * 900_000]
    server.answers["too long"] = ["a" * 1_900_000]
    for prompt in ("long", "too long"):
        ask(page, prompt)
        is_answered(page)
        page.get_by_role("button", name="New chat").click()
    titles = page.evaluate("kept().map(({turns}) => turns[0].prompt)")
    assert titles == ["too long", *(f"number {i}" for i in range(59, 10, -1))]
    server.answers["refused"] = ["a" * 2_100_000]
    ask(page, "refused")
    is_answered(page)
    expect(page.locator("#notice")).to_contain_text("This conversation is not kept")
    assert len(page.evaluate("kept()")) == len(titles)
    assert page.evaluate("localStorage['of another page']") == "stays"
    page.get_by_role("button", name="Chats").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    first = json.loads(download.value.path().read_text())[0]
    assert first["messages"][0]["content"] == "refused"


def test_a_full_browser_drops_the_oldest_conversations(server: ScriptedServer, page: Page) -> None:
    server.answers |= {"long": ["a" * 1_000_000], "longer": ["a" * 1_800_000]}
    for prompt in ("long", "short", "longer"):
        ask(page, prompt)
        is_answered(page)
        if prompt == "short":  # others fill what Chromium gives to an address: 5 Mi characters
            page.evaluate("localStorage.setItem('chat:/other/:x', 'a'.repeat(3_400_000))")
        page.get_by_role("button", name="New chat").click()
    titles = "kept().map(({turns}) => turns[0].prompt)"
    assert page.evaluate(titles) == ["longer", "short"]
    # Where dropping makes too little room, all stay.
    page.evaluate("localStorage.removeItem(PREFIX + kept()[0].id)")
    page.evaluate("localStorage.setItem('chat:/other/:y', 'a'.repeat(1_500_000))")
    ask(page, "longer")
    is_answered(page)
    expect(page.locator("#notice")).to_contain_text("This conversation is not kept")
    assert page.evaluate(titles) == ["short"]
    # Where another tab takes what is dropped meanwhile, that is told too.
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException(); }; }")
    ask(page, "again")
    is_answered(page, 2)
    expect(page.locator("#notice")).to_contain_text("This conversation is not kept")


def test_what_is_not_a_conversation_is_passed_over(server: ScriptedServer, page: Page) -> None:
    ask(page, "go")
    is_answered(page)
    page.evaluate(
        """() => {
            const note = {tokens: 1, rate: 1, first: 1, ends: []};
            const turn = {prompt: "", text: "", note};
            const bad = [{...turn, prompt: 1}, {...turn, note: {}}, null].map((turn) => [turn]);
            for (const turns of [...bad, null, "x", {}, []]) {
                const talk = {...fresh(), turns};
                localStorage[PREFIX + talk.id] = JSON.stringify(talk);
            }
            localStorage[PREFIX + "1"] = JSON.stringify({...fresh(), turns: [turn]});
        }"""
    )
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["go"])
    ask(page, "on")
    is_answered(page, 2)
    page.get_by_role("button", name="Chats").click()
    expect(page.locator("#list li")).to_have_text([re.compile("^go")])


def choose(page: Page, title: str) -> None:
    page.get_by_role("button", name="Chats").click()
    page.locator("#list").get_by_role("button", name=title, exact=True).first.click()


def test_two_tabs_lose_nothing_of_each_other(server: ScriptedServer, page: Page) -> None:
    ask(page, "one")
    is_answered(page)
    other = page.context.new_page()
    other.goto(server.url)
    choose(other, "one")
    ask(other, "here")
    is_answered(other, 2)
    ask(page, "there")
    is_answered(page, 2)
    ask(page, "more")
    is_answered(page, 3)
    questions = "kept().map(({turns}) => turns.map(({prompt}) => prompt))"
    assert page.evaluate(questions) == [["one", "there", "more"], ["one", "here"]]
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["one", "there", "more"])
    # What is deleted in one is gone in the other too, and does not come back.
    choose(other, "one")
    expect(other.locator(".user .text")).to_have_text(["one", "there", "more"])
    server.rate = 20
    server.answers["count"] = (f"{number} " for number in range(1000))
    ask(other, "count")
    expect(other.locator(".model .text").last).to_contain_text("3")
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Delete: one").first.click()
    expect(other.locator(".user")).to_have_count(0)
    is_answered(other, 0)
    assert page.evaluate(questions) == [["one", "here"]]


def hide(page: Page) -> None:
    """As a phone does with what is behind: it may never come back."""
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_an_unfinished_answer_is_kept(server: ScriptedServer, page: Page) -> None:
    ask(page, "one")
    is_answered(page)
    server.rate = 20
    server.answers["count"] = (f"{number} " for number in range(1000))
    ask(page, "count")
    answer = page.locator(".model").nth(1)
    expect(answer.locator(".text")).to_contain_text("3")
    hide(page)
    assert page.evaluate("kept()[0].turns[1].text").startswith("0 1 2 3")
    choose(page, "one")  # which is this one
    expect(answer.locator(".text")).to_contain_text("9")
    page.reload()
    expect(answer.locator(".text")).to_contain_text("0 1 2 3 4 5 6 7 8 9")
    # But it replaces no whole one.
    server.answers["count"] = [f"{number} " for number in range(1000)]
    for leave in ("reload", "New chat"):
        page.get_by_role("button", name="Edit").first.click()
        ask(page, "count")
        expect(page.locator(".model .text")).to_contain_text("3")
        hide(page)
        if leave == "reload":
            page.reload()
        else:
            page.get_by_role("button", name=leave).click()
            choose(page, "one")
        expect(page.locator(".user .text")).to_have_text(["one", "count"])


def test_a_first_question_that_fails_is_not_kept(server: ScriptedServer, page: Page) -> None:
    asked = threading.Event()

    def waits() -> Iterator[str]:
        asked.wait(PATIENCE)
        yield from breaks_off()

    server.answers["go"] = waits()
    ask(page, "go")
    hide(page)
    assert page.evaluate("kept()[0].turns[0].prompt") == "go"
    asked.set()
    expect(page.locator(".model .error")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0


@pytest.mark.parametrize("server", ["/llm"], indirect=True)
def test_below_a_prefix_with_a_choice_of_models(server: ScriptedServer, opened: Opener) -> None:
    server.models = ["scripted", "other"]
    page = opened()
    page.get_by_label("model").select_option("other")
    ask(page, "hi")
    is_answered(page)
    assert server.bodies[-1]["model"] == "other"
    expect(page.locator(".model .note")).to_contain_text("other")
    assert server.paths == {"/llm/", "/llm/health/ready", "/llm/v1/models"}


def test_the_chooser_has_models_and_adapters_and_no_aliases(
    server: ScriptedServer, opened: Opener
) -> None:
    tuned = {"id": "tuned", "root": "tuned", "parent": "scripted"}
    alias = {"id": "alias", "root": "scripted"}
    server.models = ["scripted", alias, tuned]
    expect(opened().locator("#models option")).to_have_text(["scripted", "tuned"])


def test_a_text_file_comes_into_the_prompt(page: Page, tmp_path: Path) -> None:
    def attach(name: str, content: bytes) -> None:
        file = tmp_path / name
        file.write_bytes(content)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="File").click()
        chooser.value.set_files(file)

    prompt = page.locator("#prompt")
    prompt.fill("What is this?")
    attach("a.md", b"x\n```\ny\n```\n")
    expect(prompt).to_have_value("What is this?\n\na.md:\n````\nx\n```\ny\n```\n````\n")
    prompt.fill("")
    attach("中文.txt", "你好".encode("gb18030"))
    expect(prompt).to_have_value("中文.txt:\n```\n你好\n```\n")
    attach("a.bin", b"\0\1\2\3")
    expect(page.locator("#notice")).to_contain_text("no text")
    attach("big.txt", b"a" * 256 * 1024)
    expect(page.locator("#notice")).to_have_text("")
    attach("bigger.txt", b"a" * (256 * 1024 + 1))
    expect(page.locator("#notice")).to_contain_text("more than 256 KiB")
    # One that is gone, or locked, can be chosen again.
    page.evaluate(
        """() => {
            window.read = Blob.prototype.arrayBuffer;
            Blob.prototype.arrayBuffer = async () => { throw new DOMException(); };
        }"""
    )
    prompt.fill("")
    attach("late.txt", b"here")
    expect(page.locator("#notice")).to_have_text("The file cannot be read.")
    page.evaluate("() => { Blob.prototype.arrayBuffer = window.read; }")
    attach("late.txt", b"here")
    expect(prompt).to_have_value("late.txt:\n```\nhere\n```\n")


def test_a_completion_is_plain_text(server: ScriptedServer, opened: Opener) -> None:
    server.index["style"] = "completion"
    server.answers["go"] = ["go\n# on\n**and** on"]
    page = opened()
    page.get_by_text("Sampling").click()
    expect(page.get_by_label("System prompt")).to_be_hidden()
    ask(page, "go")
    is_answered(page)
    assert page.locator(".model .text").inner_text() == "go\n# on\n**and** on"
    assert "history" not in server.bodies[-1]


def test_by_keyboard_alone(server: ScriptedServer, page: Page) -> None:
    server.answers["go"] = ["```sh\nls\n```\n"]

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(40):
            page.keyboard.press(key)
            focused = page.evaluate(
                "document.activeElement.ariaLabel || document.activeElement.textContent"
            )
            if focused == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("go")
    page.keyboard.press("Enter")
    is_answered(page)
    tab_to("Copy code", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_focused()
    tab_to("Edit", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Escape")
    tab_to("Regenerate", "Shift+Tab")
    page.keyboard.press("Enter")
    is_answered(page)
    assert len(server.bodies) == 2
    expect(page.locator("#send")).to_be_focused()
    tab_to("Chats")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Chats")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#conversations")).to_be_focused()
    page.locator("#prompt").focus()
    server.rate = 20
    server.answers["count"] = (f"{number} " for number in range(1000))
    page.keyboard.type("count")
    page.keyboard.press("Enter")
    expect(page.locator(".model .text").nth(1)).to_contain_text("3")
    page.keyboard.press("Escape")
    expect(page.locator(".model .note").nth(1)).to_contain_text("stopped")


def test_enter_of_an_input_method_or_a_touch_keyboard_sends_nothing(
    server: ScriptedServer, opened: Opener, page: Page
) -> None:
    prompt = page.locator("#prompt")
    prompt.fill("ni hao")
    # Safari's, after the composition.
    prompt.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    phone = opened(has_touch=True, is_mobile=True)
    expect(phone.locator("#prompt")).to_have_attribute("placeholder", "Ask something.")
    phone.locator("#prompt").press_sequentially("one\ntwo")
    expect(phone.locator("#prompt")).to_have_value("one\ntwo")
    assert server.bodies == []
    phone.locator("#send").click()
    is_answered(phone)
    prompt.press("Enter")
    is_answered(page)
    assert [body["prompt"] for body in server.bodies] == ["one\ntwo", "ni hao"]


def test_an_edit_leaves_a_draft_and_is_announced(server: ScriptedServer, page: Page) -> None:
    prompt = page.locator("#prompt")
    ask(page, "one")
    is_answered(page)
    expect(prompt).to_have_accessible_description("")
    prompt.fill("a draft")
    for name in ("Cancel", "New chat"):
        page.get_by_role("button", name="Edit").click()
        expect(prompt).to_have_value("one")
        expect(prompt).to_have_accessible_description(re.compile("replaces this question"))
        page.get_by_role("button", name=name).click()
        expect(prompt).to_have_value("a draft")
        expect(prompt).to_have_accessible_description("")


def test_curl_of_an_old_question_has_what_it_was_asked_with(
    server: ScriptedServer, page: Page
) -> None:
    server.models = ["scripted", "other"]
    page.reload()
    page.get_by_text("Sampling").click()
    page.get_by_label("Model").select_option("other")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("temperature").fill("0.5")
    ask(page, "go")
    is_answered(page)
    page.reload()
    page.get_by_text("Sampling").click()
    page.get_by_label("System prompt").fill("Be long.")
    page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    page.get_by_role("button", name="Copy as curl").click()
    copied = page.evaluate("window.copied")
    assert json.loads(copied.partition(" -d '")[2].removesuffix("'")) == server.bodies[0]
    # The button goes back to its own name.
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    expect(page.get_by_role("button", name="Copy as curl")).to_be_visible()


def test_the_chosen_language_is_for_all_of_the_page_and_kept(
    server: ScriptedServer, page: Page
) -> None:
    server.models = ["scripted", "other"]
    page.reload()
    expect(page.get_by_label("model")).to_be_visible()
    server.rate = 20
    server.answers["count"] = (f"{number} " for number in range(1000))
    ask(page, "count")
    expect(page.locator(".model .text")).to_contain_text("3")
    page.keyboard.press("Escape")
    note = page.locator(".model .note")
    expect(note).to_contain_text(re.compile("tokens.*stopped.*scripted"))
    page.locator("#language").click()
    for _ in range(2):
        expect(note).to_contain_text(re.compile("个词元.*已停止.*scripted"))
        expect(page.get_by_label("模型")).to_be_visible()
        assert re.findall("stopped|tokens|已停止", note.inner_text()) == ["已停止"]
        page.reload()


def test_what_is_no_event_ends_the_request(server: ScriptedServer, page: Page) -> None:
    sent: list[int] = []

    def endless() -> Iterator[str | bytes]:
        yield b"data: <html>\n\n"
        for number in range(20 * PATIENCE):
            sent.append(number)
            yield f"{number} "

    server.rate = 20
    server.answers["go"] = endless()
    ask(page, "go")
    expect(page.locator(".model .error")).to_contain_text("The connection broke off")
    page.wait_for_timeout(1000)
    number = len(sent)
    page.wait_for_timeout(500)
    assert len(sent) == number


def test_a_fault_of_the_parser_leaves_plain_text(server: ScriptedServer, page: Page) -> None:
    page.evaluate(
        """() => {
            const parse = markdown.parse;
            markdown.parse = function (text, env) {
                if (text.includes("bad")) throw new Error("a fault");
                return parse.call(this, text, env);
            };
        }"""
    )
    server.answers |= {"go": ["**bad** text"], "on": ["*good*"]}
    ask(page, "go")
    is_answered(page)
    expect(page.locator(".model .text")).to_have_text("**bad** text")
    ask(page, "on")
    is_answered(page, 2)
    expect(page.locator(".model em")).to_have_text("good")


def test_without_storage_the_page_works(server: ScriptedServer, page: Page) -> None:
    page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage", "BroadcastChannel"]) {
            Object.defineProperty(window, name, {get() { throw new DOMException("no"); }});
        }"""
    )
    page.reload()
    server.rate = 2
    ask(page, "go")
    page.locator("#language").click()  # also before the first piece
    is_answered(page)
    expect(page.locator("#notice")).to_contain_text("没有保存")
    page.locator("#conversations").click()
    expect(page.locator("#list li")).to_have_count(1)


def test_a_list_of_models_that_is_none_is_told(server: ScriptedServer, page: Page) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(body="<html>"))
    page.reload()
    expect(page.locator("#notice")).to_contain_text("The connection broke off")


def test_a_screen_reader_is_told_of_an_answer_once(server: ScriptedServer, page: Page) -> None:
    status = page.get_by_role("status")
    written = threading.Event()
    server.answers["go"] = in_two_parts("The answer", " is four.", written)
    ask(page, "go")
    expect(status).to_have_text("The answer is being written.")
    written.set()
    is_answered(page)
    expect(status).to_have_text("The answer is four.")
    expect(page.get_by_role("article", name="Question")).to_have_count(1)
    expect(page.get_by_role("article", name="Answer")).to_contain_text("The answer is four.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_axe_finds_nothing_serious(
    server: ScriptedServer, opened: Opener, scheme: str, locale: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    server.index |= {"think": ["<think>", "</think>"], "asks_for_key": scheme == "dark"}
    server.models = ["scripted", "other"] if scheme == "light" else ["scripted"]
    wide = "| " + " | ".join(["a long word"] * 40) + " |\n|" + "--|" * 40 + "\n"
    server.answers["go"] = ["<think>Hm.</think>", MARKDOWN, f"```\n{'wide ' * 100}\n```\n", wide]
    page = opened(locale=locale, color_scheme=scheme, viewport={"width": 390, "height": 800})
    found: list[Any] = []

    def check() -> None:
        results = Axe().run(page)
        found.extend(
            (violation["id"], node["html"][:200])
            for violation in results.response["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        )

    check()
    ask(page, "go")
    is_answered(page)
    page.locator(".model summary").click()
    check()
    page.locator("footer summary").click()
    page.locator(".idle").first.click()
    check()
    page.locator("#conversations").click()
    check()
    page.keyboard.press("Escape")
    server.refuses = True
    page.locator("#cancel").click()
    ask(page, "no")
    expect(page.locator(".model .error")).to_be_visible()
    check()
    assert found == []


@pytest.mark.parametrize("width", [360, 390])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_on_a_phone_nothing_breaks(
    server: ScriptedServer, opened: Opener, width: int, locale: str
) -> None:
    server.index["model"] = "deepseek-r1-distill-qwen-7b"
    server.answers["go"] = [MARKDOWN, f"```\n{'wide ' * 100}\n```\n{'long' * 100}\n", "|a" * 60]
    page = opened(locale=locale, viewport={"width": width, "height": 640})
    ask(page, "long " * 100)
    is_answered(page)
    ask(page, "go")
    is_answered(page, 2)
    page.locator("footer summary").click()

    def is_whole() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.documentElement.scrollHeight") <= 640
        for box in page.locator("header > *, footer :is(button, textarea)").all():
            place = box.bounding_box()
            if place is not None:
                assert 0 <= place["x"] and place["x"] + place["width"] <= width

    is_whole()
    for field in page.locator("input, textarea, select").all():
        assert field.evaluate("(one) => getComputedStyle(one).fontSize") == "16px"
    rows = [box.bounding_box() for box in page.locator("header > :visible").all()]
    middles = {round(row["y"] + row["height"] / 2) for row in rows if row}
    assert max(middles) - min(middles) <= 1
    assert all(row["height"] < 45 for row in rows if row)
    page.locator("#conversations").click()
    is_whole()
    page.keyboard.press("Escape")
    # All that may stand in the footer and the header at once.
    server.index["asks_for_key"] = True
    server.models = [server.index["model"], "long-name-of-an-adapter-" * 3]
    page.reload()
    page.locator("#key").fill("secret")
    page.locator("#key").press("Tab")
    expect(page.locator("#models")).to_be_visible()
    page.locator("footer summary").click()
    page.locator(".user .idle").first.click()
    page.evaluate("notice(say('unkept'))")
    is_whole()
    expect(page.locator("#send")).to_be_in_viewport(ratio=1)


def test_the_language_button_needs_no_chinese_font(page: Page) -> None:
    button = page.locator("#language")
    assert button.inner_text() == "ZH"
    button.click()
    expect(page.locator("#send")).to_have_text("发送")
    assert button.inner_text() == "EN"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
