"""The server's page: its files by reading them, and what it does in a real Chromium."""

import os
import re
import shutil
import time
from html.parser import HTMLParser

import pytest
from page_server import HOSTILE, PAGE, FakeServer

ADDRESS = re.compile(r"https?://[^\s\"'`)]+")
CHROMIUM = os.environ.get("BITFIT_CHROMIUM") or shutil.which("chromium")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SECONDS = 120  # far more than anything takes on a busy machine: what hangs fails
INTENT, TOPICS, ENTITIES = "shop-0000-intent", "shop-0000-topics", "shop-0000-entities"
SIMILARITY, ANSWERS = "shop-0000-similarity", "shop-0000-answers"
FILE = {"name": "new one.bitfit.safetensors", "mimeType": "", "buffer": b'{"made": "up"}'}


# ------------------------------------------------------------------ the files


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def tags_of_page():
    parser = Tags()
    parser.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    return parser.tags


def test_the_page_has_no_inline_script_style_or_handler():
    for tag, attributes in tags_of_page():
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "style"
        assert tag != "script" or attributes["src"]


def test_every_file_the_page_names_is_there():
    for _, attributes in tags_of_page():
        for name in ("src", "href"):
            path = attributes.get(name, "#")
            assert path.startswith(("page/", "#"))  # relative: works below a prefix too
            assert path.startswith("#") or (PAGE / path.removeprefix("page/")).is_file()
    for script in PAGE.glob("*.js"):
        for module in re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8")):
            assert (PAGE / module).is_file()


def test_ids_are_unique_and_every_label_and_description_has_its_element():
    attributes = [found for _, found in tags_of_page()]
    ids = [found["id"] for found in attributes if "id" in found]
    assert len(set(ids)) == len(ids)
    for found in attributes:
        for name in ("for", "aria-labelledby", "aria-describedby", "list"):
            assert set(found.get(name, "").split()) <= set(ids)


def test_data_never_becomes_markup_or_code_and_no_other_host_is_named():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(ADDRESS.findall(text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc",
            text,
        )
        assert not re.search(r"@import|url\(", text) or file.suffix == ".js"


def test_the_page_knows_the_symbols_of_the_paper():
    from bitfit.terms import SYMBOLS

    script = (PAGE / "heat.js").read_text(encoding="utf-8")
    assert dict(re.findall(r'(\w+): "(b_\w+)"', script)) == SYMBOLS


# ------------------------------------------------------------------ in Chromium


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here: apt install chromium, or BITFIT_CHROMIUM=path")
    library = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    with library.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def server(request):
    fake = FakeServer(**getattr(request, "param", {}))
    yield fake
    fake.close()


@pytest.fixture
def visit(browser, server):
    """A function from a hash to the page there; at the end nothing may have gone wrong."""
    contexts, wrong = [], []

    def look(message):
        # a refused request is shown on the page, and Chromium notes it here too
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def check(request):
        if not request.url.startswith((server.address, f"blob:{server.address}")):
            wrong.append(request.url)

    def go(where="", **options):
        size = options.pop("size", (1280, 900))
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        context.set_default_timeout(1000 * SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", look)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", check)
        page.goto(server.address + where)
        page.wait_for_selector("#list[aria-busy=false]", state="attached")
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def text_of(page, selector):
    return page.locator(selector).inner_text()


def until(page, claim):
    """Wait for a claim in JavaScript; Playwright's own way needs what the page's policy forbids."""
    end = time.monotonic() + SECONDS
    while not page.evaluate(claim):
        assert time.monotonic() < end, claim
        page.wait_for_timeout(30)


def ask(page, text, pair=None):
    page.fill("#text", text)
    if pair is not None:
        page.fill("#pair", pair)
    page.click("#ask-button")
    page.wait_for_selector("#answers[aria-busy=false] article")


def card(page, name):
    return page.locator(f'article[data-task="{name}"]')


def give_key(page, key):
    page.fill("#key", key)
    page.click("#key-form button[type=submit]")


# ---- the list


def test_the_list_pages_through_thousands_and_finds_by_name_and_label(visit):
    page = visit()
    assert page.locator("#list li").count() == 50
    assert text_of(page, "#total") == "3,002"
    page.click("#next")
    until(page, "document.querySelector('#range').textContent.startsWith('51–100')")
    page.fill("#search", "0499 entities")
    until(page, "document.querySelectorAll('#list li').length === 1")
    assert "shop-0499-entities" in text_of(page, "#list")
    assert "tokens" in text_of(page, "#list")
    until(page, "document.querySelector('#say').textContent === '1 task found'")
    page.fill("#search", "refund_status")
    until(page, "document.querySelector('#range').textContent === '1–50 of 500'")
    page.fill("#search", "<b>nothing")
    page.wait_for_selector("#list-message .empty")
    assert "No task matches “<b>nothing”" in text_of(page, "#list-message")


def test_a_row_shows_kind_labels_score_size_version_use_and_place(visit):
    row = visit().locator("#list li").first.inner_text()
    for part in (INTENT, "classification", "refund_status", "accuracy", "KB", "v", "ago", "pinned"):
        assert part in row


@pytest.mark.parametrize("server", [{"number": 0}], indirect=True)
def test_a_server_without_tasks_says_so(visit):
    page = visit()
    assert "No tasks yet" in text_of(page, "#list-message")
    assert page.locator("#next").is_disabled()


def test_a_failing_list_says_why_and_can_be_tried_again(visit, server):
    server.fail["/v1/tasks"] = (503, {"error": {"code": "starting", "message": "still loading"}})
    page = visit()
    assert "still loading" in text_of(page, "#list-message")
    server.fail.clear()
    page.click("#list-message button")
    page.wait_for_selector("#list li")


# ---- answers


def test_a_text_is_answered_by_tasks_of_all_kinds_side_by_side(visit, server):
    names = [INTENT, TOPICS, ENTITIES, SIMILARITY, ANSWERS]
    page = visit()
    for name in names:
        page.check(f'#list input[data-name="{name}"]')
    assert page.url.endswith("#try/" + ",".join(names))
    ask(page, "Priya is in Berlin", "It came on Monday.")
    assert page.locator("article").count() == 5
    assert len(server.predicted) == 1
    sent = {item["task"]: item for item in server.predicted[0]["items"]}
    assert "text_pair" not in sent[INTENT]
    assert sent[SIMILARITY]["text_pair"] == sent[ANSWERS]["text_pair"] == "It came on Monday."
    widths = (
        card(page, INTENT)
        .locator(".bar")
        .evaluate_all("bars => bars.map(b => b.getBoundingClientRect().width)")
    )
    assert len(widths) == 5
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 20
    assert "%" in card(page, TOPICS).inner_text()
    assert re.search(r"\d\.\d+", card(page, SIMILARITY).locator(".result").inner_text())
    until(page, "document.querySelector('#say').textContent.startsWith('5 answers in ')")


def test_tags_and_answers_are_marked_at_their_characters_whatever_stands_before(visit):
    page = visit(f"#try/{ENTITIES},{ANSWERS}")
    ask(page, "🚲🚲 𝒳 é Priya rode\nto Zürich", "👩‍👩‍👧 closed on Monday 🚲")
    marks = card(page, ENTITIES).locator("mark")
    assert [mark.split() for mark in marks.all_inner_texts()] == [
        ["Priya", "PER"],
        ["Zürich", "LOC"],
    ]
    assert card(page, ANSWERS).locator("mark").all_inner_texts() == ["Monday"]
    marked = card(page, ANSWERS).locator(".marked").evaluate("node => node.textContent")
    assert marked == "👩‍👩‍👧 closed on Monday 🚲"
    card(page, ENTITIES).locator("summary").click()
    assert "Zürich" in card(page, ENTITIES).locator("table").inner_text()


def test_abstention_no_entity_no_answer_and_cut_texts_are_said(visit, server):
    server.tasks[INTENT]["max_length"] = 4
    page = visit(f"#try/{INTENT},{ENTITIES},{ANSWERS}")
    page.click(".options summary")
    page.fill("#min-confidence", "100")
    page.fill("#top-k", "2")
    ask(page, "nobody went nowhere at all", "nothing here")
    text = card(page, INTENT).inner_text()
    assert "No answer" in text
    assert "is below 100.0 %" in text
    assert "cut off" in text
    assert card(page, INTENT).locator(".bar").count() == 2
    assert card(page, INTENT).locator(".on").count() == 0
    assert "Nothing marked" in card(page, ENTITIES).inner_text()
    assert "No answer found" in card(page, ANSWERS).inner_text()


def test_what_is_missing_is_said_at_its_field(visit):
    page = visit()
    page.click("#ask-button")
    assert text_of(page, "#ask-error") == "Choose at least one task in the list."
    page.check(f'#list input[data-name="{SIMILARITY}"]')
    page.click("#ask-button")
    assert text_of(page, "#ask-error") == "Write a text first."
    page.fill("#text", "a text")
    page.click("#ask-button")
    assert "needs a second text" in text_of(page, "#ask-error")
    assert page.evaluate("document.activeElement.id") == "pair"


def test_an_error_of_one_task_leaves_the_answers_of_the_others(visit, server):
    page = visit(f"#try/{INTENT},{TOPICS}")
    page.wait_for_selector(".chip >> nth=1")
    del server.tasks[INTENT]
    ask(page, "a text")
    assert "no task is called" in card(page, INTENT).inner_text()
    assert card(page, TOPICS).locator(".bar").count() == 5


def test_a_busy_and_an_absent_server_are_named_and_can_be_asked_again(visit, server):
    page = visit(f"#try/{INTENT}")
    page.wait_for_selector(".chip")
    server.fail["/v1/predict"] = (429, {"error": {"code": "busy", "message": "the queue is full"}})
    page.fill("#text", "a text")
    page.click("#ask-button")
    page.wait_for_selector("#answers [role=alert]")
    assert "the queue is full Try again in 2 s." in text_of(page, "#answers")
    server.fail.clear()
    page.click("#answers button")
    page.wait_for_selector("article")
    page.context.set_offline(True)
    page.click("#ask-button")
    page.wait_for_selector("#answers [role=alert]")
    assert "cannot be reached" in text_of(page, "#answers")


def test_only_the_last_of_two_questions_is_shown(visit, server):
    page = visit(f"#try/{ENTITIES}")
    page.wait_for_selector(".chip")
    server.delay["/v1/predict"] = 0.6
    page.fill("#text", "first Berlin")
    page.click("#ask-button")
    page.wait_for_selector("#answers[aria-busy=true]")
    server.delay.clear()
    ask(page, "second Zürich")
    page.wait_for_timeout(800)
    assert "second" in text_of(page, ".marked")


def test_a_link_with_tasks_that_are_gone_keeps_the_others(visit):
    page = visit(f"#try/{INTENT},not-there,%3Cimg%3E")
    page.wait_for_selector("#notices .bad")
    assert "not-there" in text_of(page, "#notices")
    assert page.locator(".chip").count() == 1
    visit("#try/%E0%A4%A")  # no UTF-8: as without a hash


# ---- one task, two tasks


def test_the_heat_map_has_symbols_layers_the_average_and_its_numbers(visit):
    page = visit(f"#task/{INTENT}")
    page.wait_for_selector("#task .grid")
    assert page.title() == f"{INTENT} · bitfit"
    head = page.locator("#task thead th").all_inner_texts()
    assert head[1:] == ["0", "1", "2", "3", "4", "5", "avg"]
    rows = page.locator("#task tbody tr").all_inner_texts()
    assert len(rows) == 8
    table = {row.split()[0] for row in rows}
    assert {"bq", "bLN1", "bm2"} <= table
    means = page.locator("#task tbody td:last-child").all_inner_texts()
    assert means[:-1] == sorted(means[:-1], key=float, reverse=True)
    first = page.locator("#task tbody td").first
    first.hover()
    said = text_of(page, "#task .readout")
    assert re.fullmatch(r"b_\w+, layer 0: 0\.0\d+, mean absolute change of a bias", said)
    shown = float(first.inner_text()) / 1000
    assert shown == pytest.approx(float(re.search(r": ([\d.]+),", said)[1]), abs=6e-5)
    first.focus()
    for key in ("ArrowRight", "ArrowDown", "End", "ArrowRight"):
        page.keyboard.press(key)
    assert "average" in text_of(page, "#task .readout")
    assert page.evaluate("document.activeElement.cellIndex") == 7
    assert page.locator("#task td[tabindex='0']").count() == 1


def test_a_task_with_only_a_head_has_no_heat_map(visit):
    page = visit("#task/head-only")
    page.wait_for_selector("#task .empty")
    assert "only its head was trained" in text_of(page, "#task")


def test_an_unknown_task_is_an_error_and_a_link_to_a_task_opens_it(visit):
    page = visit("#task/nobody")
    page.wait_for_selector("#task [role=alert]")
    assert "no task is called 'nobody'" in text_of(page, "#task")
    page.click(f'#list a[data-name="{TOPICS}"]')
    page.wait_for_selector("#task .facts")
    assert page.url.endswith(f"#task/{TOPICS}")
    assert page.locator("#list [aria-current]").inner_text() == TOPICS
    page.go_back()
    page.wait_for_selector("#task [role=alert]")


def test_two_tasks_are_compared_by_cosine_and_norms(visit):
    page = visit(f"#task/{INTENT}")
    page.click("#task a.button")
    until(page, f"document.querySelector('#compare-a').value === '{INTENT}'")
    page.focus("#compare-b")
    page.fill("#compare-b", "0001-int")
    page.wait_for_selector("#compare-b-names option[value='shop-0001-intent']", state="attached")
    page.fill("#compare-b", "shop-0001-intent")
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare .grid")
    assert page.url.endswith(f"#compare/{INTENT}/shop-0001-intent")
    assert "0.310" in text_of(page, "#compare .totals")
    page.locator("#compare .grid td").first.hover()
    assert re.search(
        r"b_q, layer 0: cosine -?0\.\d{3}; norms [\d.]+ and", text_of(page, "#compare .readout")
    )
    assert "head.classifier.weight" in text_of(page, "#compare")
    page.click("#compare summary")
    assert page.locator("#compare details tbody tr").count() == 43


def test_a_comparison_that_is_refused_or_badly_named_says_why(visit):
    page = visit(f"#compare/{INTENT}/head-only")
    page.wait_for_selector("#compare [role=alert]")
    assert "different bases" in text_of(page, "#compare")
    page.fill("#compare-b", "../x")
    page.keyboard.press("Enter")
    assert "cannot be the name" in text_of(page, "#compare-error")


# ---- rates


def test_rates_are_asked_for_while_the_page_is_seen(visit):
    page = visit("#server")
    until(page, "document.querySelectorAll('.chart path').length === 3")
    until(page, "/M.*L/.test(document.querySelector('.chart path').getAttribute('d'))")
    assert re.search(r"[\d,]+ items/s · p50 [\d.]+ · p99 \d+ ms", text_of(page, "#live"))
    assert "minilm" in text_of(page, "#base")
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    asked = []  # by the page: a request may be long on its way to the server

    def note(request):
        if request.url.endswith("/v1/stats"):
            asked.append(request)

    page.on("request", note)
    page.evaluate(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(200)
    before = len(asked)
    page.wait_for_timeout(2500)
    assert len(asked) == before
    page.evaluate(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    end = time.monotonic() + SECONDS
    while len(asked) == before:
        assert time.monotonic() < end
        page.wait_for_timeout(30)


def test_without_load_no_line_of_zeros_stands_beside_the_buttons(visit, server):
    server.is_busy = False
    page = visit("#server")
    # Two looks: of one there is no line yet.
    until(page, "/M.*L/.test(document.querySelector('.chart path')?.getAttribute('d'))")
    assert text_of(page, "#live").startswith("0 items/s")
    assert page.locator("#live-spark").is_hidden()
    server.is_busy = True
    page.wait_for_selector("#live-spark path")


def test_a_lost_server_is_shown_and_found_again(visit, server):
    page = visit("#server")
    page.wait_for_selector("#live[data-state=good]")
    page.context.set_offline(True)
    page.wait_for_selector("#live[data-state=bad]")
    assert "cannot be reached" in text_of(page, "#server")
    assert page.locator(".tile").count() == 6  # what was known stays
    page.context.set_offline(False)
    page.wait_for_selector("#live[data-state=good]")


# ---- keys, uploads, rollback, removal

KEYS = {"keys": {"looker": "predict", "keeper": "manage"}}


@pytest.mark.parametrize("server", [KEYS], indirect=True)
def test_without_a_key_the_page_asks_for_one_and_keeps_it_in_the_tab(visit, server):
    page = visit()
    page.wait_for_selector("#live[data-state=bad]")
    assert "The server wants a key" in text_of(page, "#list-message")
    page.click("#list-message button:has-text('key')")
    give_key(page, "wrong key")
    assert "without spaces" in text_of(page, "#key-error")
    give_key(page, "wrong")
    page.wait_for_selector("#list-message:has-text('does not know this key')")
    page.click("#key-button")
    give_key(page, "looker")
    page.wait_for_selector("#list li")
    page.wait_for_selector("#live[data-state=good]")
    page.reload()
    page.wait_for_selector("#list li")
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"bitfit-key": "looker"}, {}, ""]
    assert not [path for _, path, _ in server.requests if "looker" in path or "wrong" in path]
    page.click("#key-button")
    assert page.input_value("#key") == ""
    page.click("#key-forget")
    page.wait_for_selector("#list-message:has-text('wants a key')")


@pytest.mark.parametrize("server", [KEYS], indirect=True)
def test_uploads_need_the_role_manage_and_go_on_with_another_key(visit, server):
    page = visit()
    page.click("#key-button")
    give_key(page, "looker")
    page.wait_for_selector("#list li")
    page.click("#upload-button")
    page.set_input_files("#file", FILE)
    assert page.input_value("#upload-name") == "new-one"
    page.click("#upload-submit")
    page.wait_for_selector("#upload-error:has-text('role manage')")
    assert "new-one" not in server.tasks
    page.click("#upload-error button")
    give_key(page, "keeper")
    page.click("#upload-submit")
    page.wait_for_selector("#task .facts")
    assert page.url.endswith("#task/new-one")
    assert server.tasks["new-one"]["version"] == 1
    assert "new-one is added." in text_of(page, "#notices")
    until(page, "document.querySelector('#total').textContent === '3,003'")


def test_a_replaced_task_is_its_next_version_and_can_be_rolled_back(visit, server):
    page = visit(f"#task/{TOPICS}")
    page.click("#upload-button")
    page.set_input_files("#file", FILE | {"name": f"{TOPICS}.bitfit.safetensors"})
    before = server.tasks[TOPICS]["version"]
    page.click("#upload-submit")
    page.wait_for_selector(f"#notices:has-text('now at version {before + 1}')")
    page.wait_for_selector(f"#task dd:text-is('{before + 1}')")
    page.click("#task button:has-text('Roll back')")
    assert f"as version {before + 2}" in text_of(page, "#confirm-text")
    page.click("#confirm-submit")
    page.wait_for_selector(f"#task dd:text-is('{before + 2}')")
    assert not page.locator("#confirm-dialog").is_visible()


@pytest.mark.parametrize("server", [KEYS], indirect=True)
def test_rollback_removal_and_download_without_the_role_say_so(visit, server):
    page = visit()
    page.click("#key-button")
    give_key(page, "looker")
    page.click(f'#list a[data-name="{INTENT}"]')
    page.click("#task button:has-text('Roll back')")
    page.click("#confirm-submit")
    page.wait_for_selector("#confirm-error:has-text('role manage')")
    page.keyboard.press("Escape")
    page.click("#task button:has-text('Remove')")
    page.click("#confirm-submit")
    page.wait_for_selector("#confirm-error:has-text('role manage')")
    assert INTENT in server.tasks
    page.keyboard.press("Escape")
    page.click("#task button:has-text('Download')")
    page.wait_for_selector("#key-dialog[open]")
    give_key(page, "keeper")
    page.wait_for_selector("#task .facts")
    with page.expect_download() as download:
        page.click("#task button:has-text('Download')")
    assert download.value.suggested_filename == f"{INTENT}.bitfit.safetensors"


def test_a_removed_task_leaves_the_list_and_the_choice(visit, server):
    page = visit(f"#try/{INTENT},{TOPICS}")
    page.wait_for_selector(".chip >> nth=1")
    page.click(f'#list a[data-name="{INTENT}"]')
    page.click("#task button:has-text('Remove')")
    page.click("#confirm-submit")
    page.wait_for_selector("#notices:has-text('is removed')")
    until(page, "document.querySelector('#total').textContent === '3,001'")
    assert INTENT not in server.tasks
    assert page.locator(".chip").count() == 1


def test_a_refused_upload_shows_the_reason_and_bad_input_is_never_sent(visit, server):
    page = visit()
    page.click("#upload-button")
    page.click("#upload-submit")
    assert "Choose a task file" in text_of(page, "#upload-error")
    page.set_input_files("#file", FILE | {"name": "model.pkl"})
    assert "ends in .bitfit.safetensors" in text_of(page, "#upload-error")
    page.set_input_files("#file", FILE | {"buffer": b"\x80\x04pickle"})
    page.fill("#upload-name", "../../etc")
    page.click("#upload-submit")
    assert "begins with a letter" in text_of(page, "#upload-error")
    assert not [asked for asked in server.requests if asked[0] == "PUT"]
    page.fill("#upload-name", "etc")
    page.click("#upload-submit")
    page.wait_for_selector("#upload-error:has-text('a pickle, and no task file')")


def test_a_file_can_be_dropped_anywhere_on_the_page(visit, server):
    page = visit()
    data = page.evaluate_handle(
        "() => { const data = new DataTransfer();"
        "data.items.add(new File(['{}'], 'dropped.bitfit.safetensors')); return data; }"
    )
    page.dispatch_event("#list", "dragenter", {"dataTransfer": data})
    assert page.evaluate("document.body.classList.contains('dropping')")
    page.dispatch_event("#list", "drop", {"dataTransfer": data})
    assert page.locator("#upload-dialog").is_visible()
    page.click("#upload-submit")
    page.wait_for_selector("#notices:has-text('dropped is added')")
    assert "dropped" in server.tasks


# ---- keyboard, colours, sizes, hostile names


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def test_a_text_can_be_tried_and_a_dialog_used_by_keyboard_alone(visit):
    page = visit()
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("document.activeElement.dataset.skip") == "search"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("Enter")
    assert focused(page) == "search"
    page.keyboard.type("0007 intent")
    until(page, "document.querySelectorAll('#list li').length === 1")
    press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.name") == "shop-0007-intent"
    press("Shift+Tab")
    press("Space")
    press("ArrowUp")  # a box has no arrow keys: nothing moves
    page.keyboard.press("Home")
    for _ in range(12):  # over the pager into the form
        if focused(page) == "text":
            break
        press("Tab")
    page.keyboard.type("Where is my order?")
    press("Control+Enter")
    page.wait_for_selector("article[data-task='shop-0007-intent']")
    page.focus("#key-button")
    press("Enter")
    assert focused(page) == "key"
    for _ in range(6):
        press("Tab")
        inside = (
            "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
        assert page.evaluate(inside)
    press("Escape")
    assert focused(page) == "key-button"


def test_the_list_keeps_the_focus_when_it_is_refreshed(visit):
    page = visit()
    page.focus(f'#list a[data-name="{TOPICS}"]')
    page.evaluate(
        "import('./page/state.js').then(state => state.tell('tasks'))"
        ".then(() => new Promise(done => setTimeout(done, 500)))"
    )
    assert page.evaluate("document.activeElement.dataset.name") == TOPICS


def test_colours_follow_the_system_until_the_reader_chooses(visit):
    page = visit(color_scheme="dark")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.locator("#theme-button").get_attribute("aria-pressed") == "true"
    page.emulate_media(color_scheme="light")
    until(page, "document.documentElement.dataset.theme === 'light'")
    page.click("#theme-button")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"


# Every visible text against the nearest background behind it: [ratio, wanted, text].
CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!hasText || !node.checkVisibility() || node.disabled) continue;
    if (node.closest(".hidden-text")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(style.color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push([ratio, isLarge ? 3 : 4.5, node.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(visit, scheme):
    page = visit(f"#try/{INTENT},{TOPICS},{ENTITIES},{ANSWERS}", color_scheme=scheme)
    page.wait_for_selector(".chip >> nth=3")
    seen = []

    def look():
        until(page, "document.getAnimations().length === 0")  # the colours of buttons are there
        found = page.evaluate(CONTRAST)
        assert len(found) > 20
        seen.extend(found)

    page.click("#ask-button")
    look()
    ask(page, "Priya of Bosch in Berlin", "on Monday")
    look()
    for where in (
        "#task/hostile",
        f"#compare/{INTENT}/shop-0001-intent",
        "#server",
        "#task/nobody",
    ):
        page.goto(page.url.split("#")[0] + where)
        page.wait_for_selector("main :is(.grid, .tile, [role=alert]):visible")
        look()
    page.click("#upload-button")
    page.click("#upload-submit")
    look()
    assert [entry for entry in seen if entry[0] < entry[1]] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_edges_of_fields_and_the_focus_ring_stand_out(visit, scheme):
    page = visit(color_scheme=scheme)
    colours = page.evaluate(
        "() => { const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['edge', 'accent', 'surface', 'page', 'bad', 'good']"
        ".map(n => [n, style.getPropertyValue('--' + n)])); }"
    )

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for front in ("edge", "accent", "bad", "good"):
        for back in ("surface", "page"):
            high, low = sorted((light(colours[front]), light(colours[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (front, back)


def test_nothing_moves_where_the_reader_wants_no_motion(visit):
    page = visit(reduced_motion="reduce")
    durations = page.evaluate(
        "[...document.querySelectorAll('*')].map(n => getComputedStyle(n).transitionDuration)"
    )
    assert set(durations) == {"0s"}


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_hostile_names_are_plain_text_and_break_nothing_at_any_width(visit, width, server):
    server.tasks[INTENT]["labels"] = [f"{HOSTILE[0]} {i}" for i in range(1000)]
    page = visit("#task/hostile", size=(width, 780))
    page.wait_for_selector("#task .grid")
    for button in page.locator("#task button:has-text('Show')").all():
        button.click()
    pages = [
        "#task/hostile", f"#task/{INTENT}", f"#try/hostile,{INTENT},{ENTITIES}", "#tasks",
        f"#compare/hostile/{INTENT}", "#server", "#task/%3Cimg%20src%3Dx%20onerror%3D1%3E",
        "#compare/%3Cimg%3E/%22", "#constructor",
    ]  # fmt: skip
    for where in pages:
        page.goto(server.address + where)
        page.wait_for_timeout(200)
        if "#try" in where:
            page.wait_for_selector(".chip >> nth=2")
            page.click(".options summary")
            page.fill("#top-k", "1000")
            ask(page, " ".join(HOSTILE))
            page.click("article button")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, where
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 1
    assert page.locator("body script").count() == 0


def test_on_a_narrow_screen_the_list_is_a_view_of_its_own(visit):
    page = visit(size=(360, 780))
    assert page.locator("#list li").first.is_visible()
    assert not page.locator("#text").is_visible()
    page.check(f'#list input[data-name="{INTENT}"]')
    page.click(".views a[data-to=try]")
    assert page.locator("#text").is_visible()
    assert not page.locator("#list").is_visible()
    assert page.locator(".chip").count() == 1
