"""The page, in a real browser: it opens from disk, and what it offers does what it says.

One Chromium for all of it. A page that asks for anything but itself, or that says anything on the console, fails.
"""

import json
import math
import random
import re
import threading

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from benchmarks.viewer import CHROMIUM, QUIET, sample_record
from trl_ibtpo.viewing.library import Library
from trl_ibtpo.viewing.page import WEB, as_script, page_of, write_page
from trl_ibtpo.viewing.records import dump_record, record_group
from trl_ibtpo.viewing.server import make_server

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 1</script>",
    "<!-- <script> -->",
    "<img src=x onerror='window.pwned = 1'>",
    "javascript:window.pwned=1",
    '<a href="javascript:window.pwned=1">here</a> " \' ` ${window.pwned=1} {{data}}',
    "\x00\x07\x1b[31mred\x1b]8;;http://example.com\x07 \x7f\x9b",
    "right \u202eto left\u202c \u2066isolated\u2069 \u200f",
    "x" * 10_000,
    "lone \ud800 and \udfff surrogates",
    "\u2028\u2029 line separators",
    "](http://example.com) **bold** <b>bold</b> &lt;b&gt; ../../etc/passwd",
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page of records from disk; afterwards it must have asked for nothing else and complained of nothing."""
    opened = []

    def open_page(records=None, path=None, width=1280, **options):
        if path is None:
            path = tmp_path / f"{len(opened)}.html"
            path.write_text(page_of(records), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector(".pane")
        opened.append((page, path, requests, complaints))
        return page

    yield open_page
    for page, path, requests, complaints in opened:
        assert complaints == []
        assert [url for url in requests if url != path.as_uri() and not url.startswith("data:")] == []
        page.close()


def until(page, condition: str) -> None:
    """Wait for it; Playwright's own way of waiting runs text as code, which the page's policy forbids."""
    for _ in range(3000):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(10)
    raise AssertionError(condition)


def items(page):
    return page.locator("svg[role=tree] [role=treeitem]")


def flat_record():
    messages = [{"role": "assistant", "content": "I look it up."}, {"role": "tool", "content": "The result is 7."}]
    completions = [[*messages, {"role": "assistant", "content": f"So it is {number}."}] for number in range(8)]
    rewards = {"right": [float(number == 7) for number in range(8)]}
    return record_group(
        completions, question="Which?", rewards=rewards, advantages=list(np.linspace(-1, 1, 8)), step=3
    )


def tool_record():
    record = sample_record(5)
    for node in record["nodes"][2::3]:
        node["parts"] = [{"role": "assistant", "text": node["text"]}, {"role": "observation", "text": "result: 42"}]
        node["text"] += "result: 42"
        del node["token_ends"]
    return record


RECORDS = {
    "12 trajectories": lambda: sample_record(3),
    "64 trajectories": lambda: sample_record(4, levels=61, tokens=600),
    "flat group": flat_record,
    "tool turns": tool_record,
}


@pytest.mark.parametrize("kind", RECORDS)
def test_pages_open_from_disk(show, kind):
    """The fixture sees that nothing is asked for and nothing is said."""
    record = RECORDS[kind]()
    page = show([record])
    leaves = len(record["leaves"])
    right = sum(leaf["success"] >= 0.5 for leaf in record["leaves"])
    assert page.locator(".story").inner_text().startswith(f"{leaves} attempts at one question: {right} ended right")
    assert page.locator("tr[data-leaf]").count() == leaves
    assert items(page).count() == len(record["nodes"]) if kind != "64 trajectories" else items(page).count() > 64
    assert page.locator(".leaf.right").count() == right + 1  # and the legend's
    for view in ("list", "tree"):
        page.get_by_text(view.title(), exact=True).click()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1280
    if kind == "tool turns":
        page.locator("[data-step='2']").click()
        assert page.locator("#inspector .role").all_inner_texts()[-2:] == ["assistant", "observation"]
        assert "result: 42" in page.locator("#inspector").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_hostile_completions_stay_text(show, width, scheme):
    record = record_group(HOSTILE, question=HOSTILE[1], rewards={HOSTILE[0]: [1.0] * len(HOSTILE)}, step=1)
    grown = sample_record(1, question=HOSTILE[1])
    for number, node in enumerate(grown["nodes"][1:]):
        node["text"] = HOSTILE[number % len(HOSTILE)]
        node["token_ends"] = [len(node["text"])]
        node["logprobs"] = [-3.0]
    page = show([record, grown], width=width, color_scheme=scheme)
    shown = page.evaluate(
        """async (steps) => {
            const shown = [];
            for (const tree of [0, 1]) {
                await openTree(tree);
                for (const view of ["list", "tree"]) {
                    document.querySelector(`input[value=${view}]`).click();
                    for (let step = 1; step <= steps; step++) {
                        panes[0].choose(step);
                        shown.push([step, document.querySelector("#inspector .text").textContent]);
                    }
                }
            }
            return shown;
        }""",
        len(HOSTILE),
    )
    assert len(shown) == 4 * len(HOSTILE)
    for step, text in shown:
        assert text == page.evaluate("text => visible(text)", HOSTILE[step - 1])
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert page.evaluate("window.pwned") is None
    assert page.locator("a[href]:not(.skip), img, iframe, object, embed, base, form[action]").count() == 0
    assert page.locator("script").count() == 4 and page.locator("#panes script, #panes b b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "\ud800" not in page.title()


def test_the_index_cannot_end_its_element():
    text = as_script({"a": "</script><!--&\u2028\ud800"})
    assert json.loads(text) == {"a": "</script><!--&\u2028\ud800"}
    assert not set("<>&") & set(text) and text.isascii()


def test_scripts_make_no_markup():
    """Texts reach the page as text nodes: nothing in the scripts parses markup or runs text."""
    for path in WEB.glob("*.js"):
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser", path.read_text()
        )
        assert not found, path.name
        assert "</script" not in path.read_text() and "<!--" not in path.read_text()


def test_the_page_without_its_data_is_small(tmp_path):
    assert sum(path.stat().st_size for path in WEB.iterdir()) < 200_000
    assert len(page_of([])) < 200_000


def test_the_slider_replays_growth(show):
    record = sample_record(3)
    page = show([record])
    slider = page.get_by_label("Rounds of growth shown")
    for round in (0, 1, 5, 8):
        slider.fill(str(round))
        there = sum(leaf["round"] <= round for leaf in record["leaves"])
        assert page.locator("svg[role=tree] .node:not(.ghost) .leaf").count() == there
        assert page.locator("tr[data-leaf]:not(.dim)").count() == there
        if round:
            (step,) = record["rounds"][round - 1]["steps"]
            assert page.locator("[aria-selected=true][data-step]").get_attribute("data-step") == str(step)
            assert page.locator("#inspector h3").first.inner_text() == f"Round {round}: why here?"
    # The success under the question is that of the leaves that were there.
    first = [leaf["success"] for leaf in record["leaves"] if leaf["round"] == 0]
    slider.fill("0")
    assert f"{round_half_up(100 * np.mean(first))}% right" in items(page).first.get_attribute("aria-label")
    page.keyboard.press("]")
    assert page.locator("output").inner_text() == "after round 1 of 8"
    page.get_by_role("button", name="Replay the growth").click()
    until(page, "document.querySelector('output').textContent !== 'after round 1 of 8'")


def round_half_up(value: float) -> int:
    return int(value + 0.5)


def test_a_branch_point_says_why(show):
    record = sample_record(3)
    page = show([record])
    for choice in record["rounds"]:
        page.get_by_label("Rounds of growth shown").fill(str(choice["round"]))
        text = page.locator("#inspector").inner_text()
        assert f"highest of {choice['eligible']} steps" in text
        scores = [each for each in page.locator(".beat button span:first-child").all_inner_texts()]
        expected = [f"{value:.2f}".replace("-", "\u2212") for value in choice["priorities"][:6]]
        assert scores == expected
        # The score is taken apart in the page from what was known then; it must come to what the run computed.
        page.get_by_text("How the score was made").click()
        total = re.search("Score (\u2212?[0-9.]+) =", page.locator("#inspector").inner_text())[1]
        assert total == expected[0]
        parts = page.locator("#inspector tbody tr td:last-child").all_inner_texts()
        added = sum(float(part.replace("\u2212", "-")) for part in parts)
        assert added == pytest.approx(choice["priorities"][0], abs=0.02 * len(parts))
        ended = [leaf["success"] for leaf in record["leaves"] if leaf["round"] == choice["round"]]
        assert f"ended {'right' if ended[0] else 'wrong'}" in text


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("confidence", "Rewards were not looked at"),
        ("random", "at random"),
        ("entropy_fork", "drawn at random from the 5% of"),
    ],
)
def test_other_strategies_say_why(show, strategy, words):
    record = sample_record(3)
    record["method"]["branching"] = strategy
    for choice in record["rounds"]:
        choice["priorities"] = sorted((-random.Random(step).random() for step in choice["candidates"]), reverse=True)
    page = show([record])
    page.get_by_label("Rounds of growth shown").fill("2")
    assert words in page.locator("#inspector").inner_text()


def test_clicks_choose_steps_and_trajectories(show):
    record = sample_record(3)
    page = show([record])
    page.locator("svg[role=tree] [data-step='2']").click()
    node = record["nodes"][2]
    inspector = page.locator("#inspector")
    assert node["text"].strip() in inspector.inner_text()
    advantage = node["advantage_global"] + node["advantage_local"]
    for term, value in {
        "tokens": str(node["tokens"]),
        "mean log-probability": f"{node['mean_logprob']:.3f}",
        "A_GL": f"{node['advantage_global']:+.2f}",
        "A_IB": f"{node['advantage_local']:+.2f}",
        "advantage": f"{advantage:+.2f}",
    }.items():
        shown = inspector.locator("dt", has_text=term).locator("xpath=following-sibling::dd[1]")
        assert value.replace("-", "\u2212") in [
            each.replace("\u22120.00", "+0.00") for each in shown.all_inner_texts()
        ] or (value in ("-0.00", "+0.00"))
    assert inspector.locator(".doubt span").count() > 0
    page.locator("tr[data-leaf='5']").click()
    path, step = set(), record["leaves"][5]["node"]
    while step > 0:
        path.add(step)
        step = record["nodes"][step]["parent"]
    lit = page.locator("svg[role=tree] .node:not(.dim)").evaluate_all("nodes => nodes.map(each => +each.dataset.step)")
    assert set(lit) == path | {0}
    # Everything else folds away, and comes back.
    page.get_by_role("button", name="Fold all but #6").click()
    folded = items(page).count()
    assert folded < len(record["nodes"]) and page.get_by_text("folded").count() > 0
    page.get_by_role("button", name="Unfold all").click()
    assert items(page).count() == len(record["nodes"])
    rewards = page.locator("tr[data-leaf='5'] td").all_inner_texts()
    assert [float(each) for each in rewards[5:7]] == list(record["leaves"][5]["rewards"].values())


def test_chains_fold(show):
    record = sample_record(3)
    page = show([record])
    page.get_by_label("Fold chains").check()
    folded = items(page).count()
    branched = {leaf["branched_after"] for leaf in record["leaves"] if leaf["round"]}
    assert folded == 1 + len(record["leaves"]) + len(branched - {0})
    page.locator("svg[role=tree] [aria-level]").last.dblclick()
    assert items(page).count() > folded


def test_search_finds_steps(show):
    record = sample_record(3)
    record["nodes"][7]["text"] = record["nodes"][20]["text"] = "The Needle <b> is here"
    del record["nodes"][7]["token_ends"], record["nodes"][20]["token_ends"]
    page = show([record])
    page.keyboard.press("/")
    page.keyboard.type("needle <B>")
    assert page.locator("#hits").inner_text() == "2 steps"
    found = page.locator(".node.found").evaluate_all("nodes => nodes.map(each => +each.dataset.step)")
    assert found == [7, 20]
    page.keyboard.press("Enter")
    assert page.locator("[data-step][aria-selected=true]").get_attribute("data-step") == "7"
    page.keyboard.press("Enter")
    assert page.locator("[data-step][aria-selected=true]").get_attribute("data-step") == "20"
    page.get_by_text("List", exact=True).click()
    assert page.locator(".flat mark").count() == sum(7 in path or 20 in path for path in paths(record)) + sum(
        {7, 20} <= set(path) for path in paths(record)
    )
    page.locator("#search").press("Escape")
    assert page.locator(".flat mark").count() == 0


def paths(record):
    for leaf in record["leaves"]:
        path, step = [], leaf["node"]
        while step > 0:
            path.append(step)
            step = record["nodes"][step]["parent"]
        yield path


def test_a_tree_can_be_walked_with_the_keyboard(show):
    record = sample_record(3)
    page = show([record])
    page.keyboard.press("t")
    focused = "document.activeElement.dataset.step"
    page.keyboard.press("Home")
    assert page.evaluate(focused) == "0"
    first = record["nodes"].index(next(node for node in record["nodes"] if node["parent"] == 0))
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == str(first)
    assert page.evaluate("document.activeElement.getAttribute('role')") == "treeitem"
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith(f"Step {first}, ") and "right" in label
    height = "document.activeElement.querySelector('.dot').getBoundingClientRect().y"
    before = page.evaluate(height)
    page.keyboard.press("ArrowDown")
    assert page.evaluate(height) > before
    page.keyboard.press("ArrowUp")
    assert page.evaluate(height) == before
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == "0"
    before = items(page).count()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
    assert items(page).count() < before
    page.keyboard.press("Enter")
    assert items(page).count() == before
    for key, check in {
        "l": "!document.querySelector('.flat').hidden",
        "c": "document.getElementById('colour').value === 'advantage'",
        "f": "document.getElementById('fold').checked",
        "?": "document.getElementById('help').open",
    }.items():
        page.keyboard.press(key)
        assert page.evaluate(check), key


def test_trees_are_sorted_filtered_and_walked_through(show):
    records = [sample_record(seed, step=seed, question=f"Question {seed}") for seed in range(1, 7)]
    for leaf in records[2]["leaves"]:  # all right
        leaf["success"] = 1.0
    page = show(records)
    rows = page.locator("#trees [role=option]")

    def steps():
        return [int(re.search(r"step (\d+)", text)[1]) for text in rows.all_inner_texts()]

    success = {each["step"]: np.mean([leaf["success"] for leaf in each["leaves"]]) for each in records}
    for order, key in {
        "oldest": lambda step: step,
        "newest": lambda step: -step,
        "hardest": lambda step: success[step],
        "easiest": lambda step: -success[step],
        "scores": lambda step: (
            -np.std([n["ib_score"] for n in records[step - 1]["nodes"][1:] if n["ib_score"] is not None])
        ),
        "advantages": lambda step: (
            -np.std([n["advantage_global"] + n["advantage_local"] for n in records[step - 1]["nodes"][1:]])
        ),
        "tokens": lambda step: -records[step - 1]["generated_tokens"],
    }.items():
        page.locator("#sort").select_option(order)
        assert [round(key(step), 3) for step in steps()] == sorted(round(key(step), 3) for step in range(1, 7)), order
    page.get_by_label("with right and wrong answers only").check()
    mixed = [step for step in success if 0 < success[step] < 1]
    assert 3 not in mixed and sorted(steps()) == mixed
    assert page.locator("#count").inner_text() == f"{len(mixed)} of 6"
    page.locator("#filter").fill(f"question {mixed[-1]}")
    assert steps() == mixed[-1:]
    page.locator("#filter").fill("")
    page.locator("#sort").select_option("oldest")
    rows.first.click()
    until(page, f"document.querySelector('.asked').textContent === 'Question {mixed[0]}'")
    for key, place in (("j", 1), ("j", 2), ("k", 1)):
        page.locator("body").press(key)
        until(page, f"document.querySelector('.asked').textContent === 'Question {mixed[place]}'")
    page.get_by_label("Next tree").click()
    until(page, f"document.querySelector('.asked').textContent === 'Question {mixed[2]}'")
    page.locator("#trees").press("End")
    until(page, f"document.querySelector('.asked').textContent === 'Question {mixed[-1]}'")


def write_run(folder, name, shift, count=4):
    trees = folder / name / "trees"
    trees.mkdir(parents=True)
    for step in range(1, count + 1):
        line = dump_record(sample_record(step + shift, step=step, question=f"Question {step}"))
        (trees / f"step-{step:06d}.jsonl").write_text(line + "\n")
    logs = [{"step": step, "reward": step / 10 + shift, "entropy": 1 / step} for step in range(1, 9)]
    (trees / "metrics.jsonl").write_text("\n".join(map(json.dumps, logs)))
    return folder / name


def test_a_run_opens_with_its_curves(show, tmp_path):
    run = write_run(tmp_path, "run", 0)
    (run / "trees" / "step-000009.jsonl").write_text('{"format": "trl_ibtpo.tree/1", "nodes": [{}')
    write_page(Library([run]), tmp_path / "run.html")
    page = show(path=tmp_path / "run.html")
    assert page.locator("h1").inner_text() == "run"
    assert page.locator("figure b").all_inner_texts() == ["Reward", "Entropy"]
    assert page.locator("#problems summary").inner_text() == "1 record could not be read"
    page.locator("#problems summary").click()
    assert (
        page.locator("#problems li").inner_text().startswith("step-000009.jsonl, line 1, is left out: it is not JSON")
    )
    # A point of a curve leads to the trees grown there: of the left end, step 1; by keys, the next ones.
    curve = page.locator("figure svg").first
    curve.click(position={"x": 3, "y": 30})
    until(page, "document.querySelector('.pane h3').textContent === 'training step 1'")
    curve.press("ArrowRight")
    curve.press("Enter")
    until(page, "document.querySelector('.pane h3').textContent === 'training step 2'")


def test_two_runs_side_by_side(show, tmp_path):
    runs = [write_run(tmp_path, "first", 0), write_run(tmp_path, "second", 10)]
    write_page(Library(runs), tmp_path / "two.html")
    page = show(path=tmp_path / "two.html")
    assert page.locator("h1").inner_text() == "first and second"
    until(page, "document.querySelectorAll('.pane').length === 2")
    for _ in range(3):
        questions = page.locator(".asked").evaluate_all("boxes => boxes.map(each => each.textContent)")
        names = page.locator(".pane h3").evaluate_all("heads => heads.map(each => each.textContent)")
        assert questions[0] == questions[1]
        assert {name.split(" ")[0] for name in names} == {"first", "second"}
        entry = page.evaluate("panes[0].entry")
        page.keyboard.press("j")
        until(page, f"panes[0].entry !== {entry}")
    page.get_by_label("Beside it").select_option("")
    until(page, "document.querySelectorAll('.pane').length === 1")


def test_only_rows_in_sight_are_in_the_page(show):
    page = show([sample_record(1)])
    page.evaluate(
        "() => { while (index.entries.length < 10000) index.entries.push({ ...index.entries[0] }); arrange(); }"
    )
    assert page.locator("#count").inner_text() == "10,000"
    assert page.locator("#trees [role=option]").count() < 40
    page.locator("#trees").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    page.wait_for_selector("#row-9999")
    assert page.locator("#trees [role=option]").count() < 40


def test_a_record_of_others_says_what_it_lacks(show):
    record = {"format": "trl_ibtpo.tree/1", "nodes": [{}, {"parent": 0, "text": "a"}, {"parent": 1}]}
    record["leaves"] = [{"node": 2}]
    record["nodes"][1]["mood"] = math.nan
    record["colour"] = {"deep": [math.inf, {"</script>": -math.inf}]}
    page = show([record])
    assert "Not recorded: step, question, method" in page.locator(".pane").inner_text()
    assert items(page).count() == 3


def test_a_run_is_followed(browser, tmp_path):
    run = write_run(tmp_path, "run", 0, count=1)
    server = make_server(Library([run]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    page = browser.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    address = "http://{}:{}/".format(*server.server_address)
    try:
        page.goto(address)
        until(page, "panes.length === 1 && document.querySelectorAll('[role=treeitem]').length > 12")
        line = dump_record(sample_record(2, step=2, question="What came later"))
        (run / "trees" / "step-000002.jsonl").write_text(line + "\n")
        until(page, "document.getElementById('trees').textContent.includes('What came later')")
        assert page.locator("#live").inner_text() == "following"
        page.get_by_text("What came later").click()
        until(page, "document.querySelector('.asked').textContent === 'What came later'")
    finally:
        page.close()  # first, or it asks a server that is gone
        server.shutdown()
        thread.join()
        server.server_close()
    assert complaints == [] and all(url.startswith(address) or url.startswith("data:") for url in requests)
