"""The page in a headless Chromium, on the embedded checkpoint, click by click. The server reaches this machine only.

    LEGO_WRITE_PICTURES=1 python -m pytest tests/app/test_browser.py -k storyboard

writes the README's docs/app.jpg. Other screenshots go to the folder that LEGO_SCREENSHOTS names, else to pytest's.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.cli.records import PNG_KEY

WITHOUT_GRADIO = 'Gradio is not here: pip install "lego-pipeline[app]"'

ROOT = Path(__file__).parent.parent.parent
MILLISECONDS = 120_000
ONLY_HERE = """
import socket

connect = socket.socket.connect

def connect_here(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        open(FILE, "a").write(f"{address}\\n")
        raise OSError(f"no way to {address}")
    return connect(self, address)

socket.socket.connect = connect_here
"""

pytestmark = pytest.mark.slow


class App:
    """A running `lego app` that is kept from connecting to other machines, and what it tried.

    Args:
        folder: for its files; empty again when it has ended.
        flags: of the command.
    """

    def __init__(self, folder: Path, *flags: str):
        self.tried, self.temporary = folder / "tried.txt", folder / "temporary"
        for name in ("site", "temporary"):
            (folder / name).mkdir()
        (folder / "site" / "sitecustomize.py").write_text(ONLY_HERE.replace("FILE", repr(str(self.tried))))
        paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(self.temporary)}
        # A proxy for all the world must not come between the page and its server.
        environment |= {"HTTP_PROXY": "http://192.0.2.1:3128", "http_proxy": "http://192.0.2.1:3128"}
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "lego_pipeline.cli", "app", "--port", "0", "--json", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.url = json.loads(line)["url"]

    def config(self) -> dict[str, Any]:
        """What the server tells the browser of the page."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/config", timeout=60) as answer:
            return json.load(answer)

    def end(self) -> int:
        """Ends it as a service manager does; its exit code."""
        self.process.terminate()
        with self.process:  # closes its output
            return self.process.wait(60)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    pytest.importorskip("gradio", reason=WITHOUT_GRADIO)
    running = App(tmp_path_factory.mktemp("app"))
    yield running
    assert running.end() == 0, running.log.read_text()
    assert not list(running.temporary.iterdir()), "frames or pictures stay behind"
    assert not running.tried.exists(), running.tried.read_text()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def visit(app: App, browser: Any) -> Iterator[Callable[[], Any]]:
    """`visit()`: the page as a new visitor sees it; whatever it asks another server for fails the test."""
    asked: list[str] = []
    contexts = []

    def open_page() -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(app.url)
        page.locator("#generate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((app.url, "data:", "blob:"))]


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("LEGO_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take_example(page: Any, action: str) -> None:
    page.locator("#examples button", has_text=action).click()
    page.wait_for_function(
        "action => document.querySelector('#action input').value === action && document.querySelector('#frame img')",
        arg=action,
    )


def open_settings(page: Any) -> None:
    """Opens the advanced settings. Gradio builds them then, and sets their first values once more a moment later."""
    page.get_by_text("Advanced settings").click()
    page.locator("#seed input").wait_for()
    page.wait_for_timeout(1500)


def text_of(page: Any, element: str) -> str:
    return page.locator(f"#{element} textarea").input_value()


def wait_for_text(page: Any, element: str, before: str = "") -> str:
    page.wait_for_function(
        "([element, before]) => ![before, ''].includes(document.querySelector(`#${element} textarea`).value)",
        arg=[element, before],
    )
    return text_of(page, element)


def wait_for_pictures(page: Any, element: str, count: int) -> None:
    """Until a gallery has the frame and so many pictures, and the run has ended."""
    page.wait_for_function(
        "([element, count]) => document.querySelectorAll(`#${element} .gallery-item img`).length === count + 1",
        arg=[element, count],
    )
    page.locator("#stop[disabled]" if element == "pictures" else "#stop-board[disabled]").wait_for(state="attached")


def captions(page: Any, element: str) -> list[str]:
    return page.locator(f"#{element} .caption-label").all_inner_texts()


def download(page: Any, element: str) -> bytes:
    with page.expect_download() as caught:
        page.locator(f"#{element}").click()
    return Path(caught.value.path()).read_bytes()


def record_of(png: bytes) -> dict[str, Any]:
    with PIL.Image.open(io.BytesIO(png)) as image:
        image.load()
        return json.loads(image.info[PNG_KEY])


def message_of(page: Any) -> str:
    """The text of the note that has come up, which is closed."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    page.locator(".toast-close").first.click()
    toast.wait_for(state="detached")
    return text


def test_from_a_frame_to_downloaded_pictures(visit: Callable[[], Any], screenshots: Path) -> None:
    page = visit()
    take_example(page, "turn on tap")
    page.locator("#describe").click()
    own = wait_for_text(page, "description")
    assert "tap" in own
    edited = own.replace("right", "left") if "right" in own else own.replace("left", "right")
    page.locator("#description textarea").fill(edited)
    page.locator("#count input[type=number]").fill("2")
    page.locator("#count input[type=number]").press("Enter")
    open_settings(page)
    page.locator("#seed input").fill("5")
    page.locator("#steps input[type=number]").fill("3")
    page.locator("#steps input[type=number]").press("Enter")
    page.locator("#generate").click()
    wait_for_pictures(page, "pictures", 2)
    assert captions(page, "pictures") == ["frame", "seed 5", "seed 6"]
    assert text_of(page, "description") == edited, "what the visitor wrote stays"

    record = record_of(download(page, "png"))
    wanted = {"action": "turn on tap", "description": edited, "seed": 6, "steps": 3, "model": "kitchen"}
    assert {name: record[name] for name in wanted} == wanted and record["request"]["dtype"] == "float32"
    page.locator("#pictures .gallery-item button").nth(1).click()  # enlarges it, and the buttons are about it
    page.get_by_text("Parameters of this picture").click()
    page.locator("#parameters").get_by_text("turn-on-tap-seed-5").first.wait_for()
    first = download(page, "png")
    assert record_of(first)["seed"] == 5
    page.screenshot(path=screenshots / "enlarged.png")

    with zipfile.ZipFile(io.BytesIO(download(page, "zip"))) as archive:
        frame, *names = archive.namelist()
        assert names == ["turn-on-tap-seed-5.png", "turn-on-tap-seed-6.png", "generation.jsonl"]
        assert frame == f"frame/{record['image']}"
        assert archive.read(names[0]) == first
        lines = [json.loads(line) for line in archive.read("generation.jsonl").decode().splitlines()]
        assert lines == [record_of(archive.read(name)) for name in names[:2]]

    shown = page.locator("#frame img").get_attribute("src")
    page.locator("#reuse").click()
    page.wait_for_function("before => document.querySelector('#frame img').src !== before", arg=shown)
    assert "turn-on-tap-seed-5.png" in page.locator("#frame img").get_attribute("src")
    take_example(page, "wash hands")
    assert text_of(page, "description") == edited, "the visitor's own words are not thrown away"


def test_generate_describes_first_and_a_new_action_drops_the_models_words(visit: Callable[[], Any]) -> None:
    page = visit()
    take_example(page, "take cup")
    page.locator("#generate").click()
    wait_for_pictures(page, "pictures", 1)
    own = wait_for_text(page, "description")
    assert record_of(download(page, "png"))["description"] == own
    take_example(page, "turn on tap")
    page.wait_for_function("document.querySelector('#description textarea').value === ''")


def test_few_steps_are_painted_without_guidance(visit: Callable[[], Any]) -> None:
    page = visit()
    take_example(page, "turn on tap")
    open_settings(page)
    page.locator("#fast input").check()
    page.locator("#guidance-scale input[type=number][disabled]").wait_for()
    page.locator("#generate").click()
    wait_for_pictures(page, "pictures", 1)
    record = record_of(download(page, "png"))
    assert record["model"] == "kitchen --fast"
    assert (record["guidance_scale"], record["image_guidance_scale"]) == (1, 1)


def test_a_bad_file_is_refused_in_words(visit: Callable[[], Any], tmp_path: Path) -> None:
    page = visit()
    (tmp_path / "cut.png").write_bytes((ROOT / "docs" / "comfyui_icon.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    upload = page.locator("#frame input[type=file]")
    for name, words in (("cut.png", "copy or download it again"), ("text.png", "of a format that Pillow reads")):
        upload.set_input_files(tmp_path / name)
        message = message_of(page)
        assert f"This frame can't be used: image {name} must be" in message and words in message
        page.locator("#frame img").wait_for(state="detached")
    page.locator("#generate").click()
    assert "Drop a frame first" in message_of(page)
    PIL.Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    upload.set_input_files(tmp_path / "red.png")
    page.locator("#frame img").wait_for()
    page.locator("#generate").click()
    assert "Type or pick an action first" in message_of(page)
    page.locator("#action input").fill("peel banana")
    page.locator("#action input").press("Enter")
    page.locator("#generate").click()
    wait_for_pictures(page, "pictures", 1)
    assert "has not seen frames like" in message_of(page)
    record = record_of(download(page, "png"))
    assert (record["action"], record["image"]) == ("peel banana", "red.png")


def test_a_storyboard_has_its_pictures_words_and_curve(visit: Callable[[], Any], screenshots: Path) -> None:
    page = visit()
    take_example(page, "turn on tap")
    page.locator("#generate").click()
    wait_for_pictures(page, "pictures", 1)
    page.get_by_role("tab", name="Storyboard").click()
    page.locator("#paint").click()
    assert "A storyboard needs one to 12 actions, got 0" in message_of(page)
    page.locator("#lines textarea").fill("turn on tap\nwash hands\nturn off tap")
    page.locator("#paint").click()
    wait_for_pictures(page, "board", 3)
    assert captions(page, "board") == ["frame", "1. turn on tap", "2. wash hands", "3. turn off tap"]
    assert page.locator("#texts li").count() == 3
    assert page.locator("#drift polyline").count() == 2
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "storyboard.png", full_page=True)
    if os.environ.get("LEGO_WRITE_PICTURES"):
        with PIL.Image.open(screenshots / "storyboard.png") as shot:
            shot.convert("RGB").save(ROOT / "docs" / "app.jpg", quality=88, optimize=True)
    with zipfile.ZipFile(io.BytesIO(download(page, "board-zip"))) as archive:
        names = ["01-turn-on-tap.png", "02-wash-hands.png", "03-turn-off-tap.png"]
        assert archive.namelist()[1:] == [*names, "generation.jsonl", "drift.json"]
        records = [record_of(archive.read(name)) for name in names]
        assert [record["image"] for record in records[1:]] == names[:2], "each picture feeds the next"
        assert len(json.loads(archive.read("drift.json"))) == 3
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "narrow.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#follow").get_by_text("the first frame").click()
    page.locator("#lines textarea").fill("turn on tap\nwash hands")
    page.locator("#paint").click()
    wait_for_pictures(page, "board", 2)
    assert page.locator("#drift polyline").count() == 1


def test_stop_keeps_what_was_finished(visit: Callable[[], Any], screenshots: Path) -> None:
    page = visit()
    take_example(page, "put cup")
    page.locator("#count input[type=number]").fill("8")
    page.locator("#count input[type=number]").press("Enter")
    open_settings(page)
    page.locator("#steps input[type=number]").fill("40")
    page.locator("#steps input[type=number]").press("Enter")
    page.locator("#generate").click()
    page.locator("#status").get_by_text("picture 2 of 8, step").wait_for()
    page.screenshot(path=screenshots / "progress.png")
    page.locator("#stop").click()
    page.get_by_text("Stopped after").wait_for()
    pictures = len(captions(page, "pictures")) - 1
    assert 1 <= pictures < 8
    page.get_by_text(f"Stopped after {pictures} of 8; what was finished stays.").wait_for()
    assert record_of(download(page, "png"))["seed"] == pictures - 1
    page.locator("#generate:not([disabled])").wait_for()


def test_two_visitors_do_not_mix(visit: Callable[[], Any]) -> None:
    pages = visit(), visit()
    for page, action, seed in zip(pages, ("take cup", "put bowl"), ("1", "2"), strict=True):
        take_example(page, action)
        open_settings(page)
        page.locator("#seed input").fill(seed)
    for page in pages:
        page.locator("#generate").click()  # the second waits for the first
    for page, action, seed in zip(pages, ("take cup", "put bowl"), (1, 2), strict=True):
        wait_for_pictures(page, "pictures", 1)
        assert captions(page, "pictures") == ["frame", f"seed {seed}"]
        record = record_of(download(page, "png"))
        assert (record["action"], record["seed"]) == (action, seed)
        with zipfile.ZipFile(io.BytesIO(download(page, "zip"))) as archive:
            assert f"{action.replace(' ', '-')}-seed-{seed}.png" in archive.namelist()
            assert len(archive.namelist()) == 3
        assert text_of(page, "description") == record["description"]
    third = visit()
    assert third.locator("#pictures img").count() == 0 and not text_of(third, "description")


def test_the_server_offers_the_page_and_nothing_else(app: App) -> None:
    config = app.config()
    assert {item["api_visibility"] for item in config["dependencies"]} == {"private"}
    assert not config["analytics_enabled"] and not config.get("run_history")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in ("/docs", "/openapi.json", f"/gradio_api/file={KITCHEN / 'model_index.json'}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            opener.open(app.url + path, timeout=60)
        with refused.value as answer:  # which closes its socket
            assert answer.code in (403, 404), path


def test_a_file_that_was_not_uploaded_is_no_frame(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("gradio", reason=WITHOUT_GRADIO)
    secret = tmp_path / "secret.png"
    PIL.Image.new("RGB", (32, 32), "red").save(secret)
    running = App(tmp_path, "--model", str(tiny_folder))
    try:
        [check] = [item["id"] for item in running.config()["dependencies"] if item["targets"][0][1] == "upload"]
        frame = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        asked = json.dumps({"fn_index": check, "data": [frame], "session_hash": "visitor"}).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        queue, kind = f"{running.url}/gradio_api/queue", {"Content-Type": "application/json"}
        opener.open(urllib.request.Request(f"{queue}/join", asked, kind), timeout=60).close()
        with opener.open(f"{queue}/data?session_hash=visitor", timeout=60) as answers:
            messages = [json.loads(line.removeprefix(b"data:")) for line in answers if line.startswith(b"data:")]
        [ended] = [message for message in messages if message["msg"] == "process_completed"]
        assert not ended["success"]
        assert not list(running.temporary.rglob("secret.png")), "it was copied to where pictures are served from"
    finally:
        assert running.end() == 0


def test_the_page_is_laid_out_for_its_model(tmp_path: Path, tiny_folder: Path) -> None:
    """A model without a VLM, whose scene isn't kept and which has no few-step adapters."""
    pytest.importorskip("gradio", reason=WITHOUT_GRADIO)
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("vlm", "vlm_processor"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"vlm": [None, None], "vlm_processor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    running = App(tmp_path, "--model", str(folder))
    try:
        props = [item["props"] for item in running.config()["components"]]
        visible = {item.get("elem_id"): item.get("visible") for item in props}
        assert [visible[name] for name in ("describe", "fast", "keep-scene", "examples")] == [False] * 4
        assert visible["generate"] and any(str(folder) in str(item.get("value")) for item in props)
    finally:
        assert running.end() == 0
