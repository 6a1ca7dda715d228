"""The rater's page clicked and typed through in a headless Chromium, from a file and from both kinds of server.

Screenshots at two widths go to the folder that LEGO_SCREENSHOTS names, else to pytest's.
"""

import functools
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from lego_pipeline.cli import main
from lego_pipeline.study import blinding
from lego_pipeline.study.page import Key
from lego_pipeline.study.serve import StudyServer
from lego_pipeline.study.votes import check_votes
from tests.study.conftest import SYSTEMS

pytestmark = pytest.mark.slow

READY = "() => readyAt < performance.now()"  # the pictures of a question are there, and keys count


class Rater:
    """Somebody at a page.

    Args:
        page: of playwright.
        address: of the study's page.
    """

    def __init__(self, page: Any, address: str):
        self.page, self.address, self.problems = page, address, []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(address)

    def start(self, code: str) -> None:
        self.page.get_by_label("Your code").fill(code)
        self.page.get_by_role("button", name="Start").click()
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_function(f"() => !document.getElementById('question').hidden && ({READY})()")

    def shown(self) -> list[str]:
        """Tokens of the pictures to choose from, in their order."""
        sources = self.page.locator(".choice img").evaluate_all("images => images.map(image => image.src)")
        return [Path(source).stem for source in sources]

    def question(self) -> str:
        return self.page.evaluate("order[place]")

    def answer(self, key: str) -> None:
        """Presses a key and waits for the next question, or the end."""
        before = self.question()
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            f"before => !document.getElementById('done').hidden || (order[place] !== before && ({READY})())",
            arg=before,
        )

    def answered(self) -> int:
        return int(self.page.locator("#count").inner_text().split()[0])

    def download(self, name: str, folder: Path) -> Path:
        with self.page.expect_download() as waiting:
            self.page.get_by_role("button", name=name).click()
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Rater]]:
    """`visit(address)`: a rater with a browser profile of their own; in the end no page has had an error."""
    contexts, raters = [], []

    def open_page(address: str, **options: Any) -> Rater:
        contexts.append(browser.new_context(**options))
        raters.append(Rater(contexts[-1].new_page(), address))
        return raters[-1]

    yield open_page
    for context in contexts:
        context.close()
    assert [rater.problems for rater in raters] == [[] for _ in raters]


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("LEGO_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def address_of(folder: Path) -> str:
    return (folder / "page" / "index.html").as_uri()


@contextmanager
def serving(server: Any) -> Iterator[str]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_from_a_file_by_keyboard_alone_votes_are_saved_and_become_a_report(
    frames_study: Path, visit: Callable[..., Rater], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Key.read(frames_study / "key.json")
    rater = visit(address_of(frames_study))
    rater.page.get_by_label("Your code").focus()
    rater.page.keyboard.press("Control+A")
    rater.page.keyboard.type("Anna")
    rater.page.keyboard.press("Enter")
    rater.wait()
    assert "Code: anna" in rater.page.locator("#who").inner_text()
    taken = {}
    for _ in key.questions:
        question, shown = rater.question(), rater.shown()
        wanted = [t for t in shown if t in key.questions[question]["expected"]] or [
            token for token in shown if key.questions[question]["choices"][token] == SYSTEMS[0]
        ]
        taken[question] = wanted[0]
        rater.answer(str(shown.index(wanted[0]) + 1))
    assert rater.page.get_by_role("heading", name="All questions are answered").is_visible()
    votes = rater.download("Download your answers", tmp_path)
    assert votes.name == "votes-anna.json"
    checked = check_votes(json.loads(votes.read_text()), key)
    assert {name: answer["choice"] for name, answer in checked.answers.items()} == taken
    command = ["study-report", str(votes), "--key", str(frames_study / "key.json"), "--json"]
    assert main([*command, "--output", str(tmp_path / "report")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(s["name"], s["count"]) for s in result["systems"]] == [(SYSTEMS[0], 6), (SYSTEMS[1], 0)]
    assert result["raters"][0]["checks_right"] == result["raters"][0]["checks"] == 2


def test_orders_are_blinded_and_those_that_the_key_gives(frames_study: Path, visit: Callable[..., Rater]) -> None:
    key = Key.read(frames_study / "key.json")
    seen = {}
    for code in ("anna", "ben"):
        rater = visit(address_of(frames_study))
        rater.start(code)
        names = rater.page.evaluate("order")
        assert names == blinding.in_order(key.seed, code, "", list(key.questions))
        for _ in names:
            question = rater.question()
            seen[code, question] = rater.shown()
            expected = blinding.in_order(key.seed, code, question, list(key.questions[question]["choices"]))
            assert seen[code, question] == expected
            rater.page.keyboard.press("ArrowRight")
            if names.index(question) < len(names) - 1:
                rater.page.wait_for_function("before => order[place] !== before", arg=question)
        content = rater.page.content()
        assert not any(word in content for word in (*SYSTEMS, "pair-"))
    assert any(seen["anna", name] != seen["ben", name] for name in key.questions)
    places = {order.index(next(t for t in order if key.questions[name]["choices"][t] == SYSTEMS[0]))
              for (_, name), order in seen.items() if not key.questions[name]["expected"]}  # fmt: skip
    assert places == {0, 1}


def test_a_refresh_loses_nothing_and_answers_can_be_changed(
    frames_study: Path, visit: Callable[..., Rater], tmp_path: Path
) -> None:
    rater = visit(address_of(frames_study))
    rater.start("anna")
    rater.answer("1")
    rater.answer("2")
    rater.page.locator(".choice").nth(1).click()
    rater.page.wait_for_function("() => answers.size === 3")
    rater.page.reload()  # before the page has gone on by itself
    rater.wait()
    assert rater.answered() == 3 and "Code: anna" in rater.page.locator("#who").inner_text()
    pressed = rater.page.locator(".choice[aria-pressed='true']")
    assert rater.page.evaluate("place") == 2 and pressed.get_attribute("data-choice") == rater.shown()[1]
    rater.page.keyboard.press("ArrowLeft")
    rater.page.wait_for_function("() => place === 1")
    rater.wait()
    assert pressed.get_attribute("data-choice") == rater.shown()[1]
    rater.page.keyboard.press("1")
    rater.page.wait_for_timeout(600)
    assert rater.page.evaluate("place") == 1  # a changed answer does not go on by itself
    rater.page.keyboard.press("9")  # no such picture
    assert rater.answered() == 3
    rater.page.reload()
    rater.wait()
    votes = json.loads(rater.download("Download answers so far", tmp_path).read_text())
    checked = check_votes(votes, Key.read(frames_study / "key.json"))
    places = [answer["order"].index(answer["choice"]) for answer in checked.answers.values()]
    assert places == [0, 0, 1]


def test_two_raters_of_one_browser_do_not_mix(frames_study: Path, visit: Callable[..., Rater]) -> None:
    rater = visit(address_of(frames_study))
    rater.start("anna")
    rater.answer("1")
    rater.page.get_by_role("button", name="Change code").click()
    rater.start("ben")
    assert rater.answered() == 0
    rater.page.get_by_role("button", name="Change code").click()
    rater.start("anna")
    assert rater.answered() == 1


def test_a_page_that_was_changed_refuses_to_start(
    frames_study: Path, visit: Callable[..., Rater], tmp_path: Path
) -> None:
    folder = copytree(frames_study, tmp_path / "study")
    page = folder / "page" / "index.html"
    text = page.read_text()
    page.write_text(text.replace('"action":"open drawer"', '"action":"open window"', 1))
    assert page.read_text() != text
    rater = visit(address_of(folder))
    assert "was changed after it was made" in rater.page.get_by_role("alert").first.inner_text()
    assert not rater.page.locator("#start").is_visible() and not rater.page.locator("#question").is_visible()


def test_a_picture_that_is_missing_stops_the_answer_and_says_so(
    frames_study: Path, visit: Callable[..., Rater], tmp_path: Path
) -> None:
    folder = copytree(frames_study, tmp_path / "study")
    rater = visit(address_of(folder))
    rater.start("anna")
    lost = folder / "page" / "frames" / f"{rater.shown()[0]}.png"
    lost.unlink()
    rater.page.reload()
    rater.page.get_by_text("could not be loaded").wait_for()
    rater.page.keyboard.press("1")
    assert rater.answered() == 0


def test_the_own_server_saves_votes_and_gives_them_to_another_browser(
    frames_study: Path, visit: Callable[..., Rater], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copytree(frames_study, tmp_path / "study")
    key = Key.read(folder / "key.json")
    with serving(StudyServer(folder, key)) as address:
        first = visit(address)
        first.start("anna")
        first.answer("1")
        first.answer("1")
        first.page.get_by_text("and on the study's computer").wait_for()
        second = visit(f"{address}?rater=anna")
        second.page.get_by_role("button", name="Start").click()
        second.wait()
        assert second.answered() == 2
        second.answer("2")
        with first.page.expect_response(lambda r: r.request.method == "POST" and r.status == 200):
            first.answer("2")  # doesn't know of the answer in the other browser, and loses it not
        for _ in range(len(key.questions)):
            if not first.page.locator("#question").is_visible():
                break
            first.answer("1")
        first.page.get_by_text("saved on the study's computer. You can close").wait_for()
    saved = check_votes(json.loads((folder / "votes" / "anna.json").read_text()), key)
    assert saved.is_sealed and saved.answers.keys() == key.questions.keys()
    command = ["study-report", str(folder / "votes"), "--key", str(folder / "key.json"), "--json", "--attention", "0"]
    assert main([*command, "--output", str(tmp_path / "report")]) == 0
    assert json.loads(capsys.readouterr().out)["raters"][0]["sealed"]


def test_answers_that_the_server_missed_are_not_said_to_be_there_and_are_sent_later(
    frames_study: Path, visit: Callable[..., Rater], tmp_path: Path
) -> None:
    folder = copytree(frames_study, tmp_path / "study")
    key = Key.read(folder / "key.json")
    with serving(StudyServer(folder, key)) as address:
        rater = visit(address)
        rater.start("anna")
        rater.page.route("**/votes", lambda route: route.abort())
        for _ in key.questions:
            rater.answer("1")
        rater.page.get_by_text("not on the study's computer").wait_for()
        assert "Please download" in rater.page.locator("#doneadvice").inner_text()
        assert not (folder / "votes").exists()
        rater.page.unroute("**/votes")
        rater.page.reload()
        rater.page.get_by_text("saved on the study's computer. You can close").wait_for()
    assert len(check_votes(json.loads((folder / "votes" / "anna.json").read_text()), key).answers) == 8


def test_any_web_server_will_do(frames_study: Path, visit: Callable[..., Rater], tmp_path: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(frames_study / "page"))
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as address:
        rater = visit(address)
        rater.start("anna")
        rater.answer("2")
        assert rater.page.locator("#saved").inner_text() == "Saved in this browser."
        votes = json.loads(rater.download("Download answers so far", tmp_path).read_text())
        rater.page.goto("about:blank")
    assert len(check_votes(votes, Key.read(frames_study / "key.json")).answers) == 1


def test_descriptions_are_graded(
    make_study: Callable[..., Path], visit: Callable[..., Rater], tmp_path: Path, screenshots: Path
) -> None:
    folder = make_study("--mode", "descriptions", "--questions", "2")
    key = Key.read(folder / "key.json")
    rater = visit(address_of(folder))
    rater.start("anna")
    rater.page.screenshot(path=screenshots / "study_descriptions.png")
    grades = ["right", "partly", "wrong", "hallucinated"]
    for number, name in enumerate(("Right", "Partly right", "Wrong", "Hallucinated"), start=1):
        assert rater.page.get_by_role("button", name=name).first.is_visible()
        rater.answer(str(number))
    votes = json.loads(rater.download("Download your answers", tmp_path).read_text())
    assert [answer["choice"] for answer in check_votes(votes, key).answers.values()] == grades


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_every_control_has_a_name(
    width: int, frames_study: Path, visit: Callable[..., Rater], screenshots: Path
) -> None:
    rater = visit(address_of(frames_study), viewport={"width": width, "height": 800})
    rater.page.screenshot(path=screenshots / f"study_start_{width}.png")
    rater.start("anna")
    rater.page.screenshot(path=screenshots / f"study_question_{width}.png")
    assert rater.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert rater.page.locator("img:not([alt]), button:empty").count() == 0
    assert rater.page.get_by_role("button", name="Picture 1").is_visible()
    assert rater.page.get_by_role("progressbar", name="0 of 8 answered").is_visible()
    assert rater.page.evaluate("document.activeElement.id") == "action"
    requests: list[str] = []
    rater.page.on("request", lambda request: requests.append(request.url))
    rater.page.reload()
    rater.wait()
    assert requests and all(url.startswith(("file:", "data:")) for url in requests)


def test_code_with_other_signs_is_explained(frames_study: Path, visit: Callable[..., Rater]) -> None:
    rater = visit(address_of(frames_study))
    rater.page.get_by_label("Your code").fill("no spaces!")
    rater.page.get_by_role("button", name="Start").click()
    assert rater.page.get_by_text("A code has 1 to 32 letters").is_visible()
    assert not rater.page.locator("#question").is_visible()


def test_the_scripts_digest_is_sha_256(frames_study: Path, visit: Callable[..., Rater]) -> None:
    rater = visit(address_of(frames_study))
    for text in ("", "abc", "ä€𝄞", "x" * 55, "x" * 56, "x" * 64, "y" * 1000):
        assert rater.page.evaluate("text => sha256(text)", text) == blinding.digest(text)
