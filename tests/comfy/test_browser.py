"""The pack in ComfyUI's frontend, in a headless Chromium: templates, a run by the Run button, help pages, languages.

Screenshots go to the folder that LEGO_SCREENSHOTS names (`make test-comfy`: .comfyui/screenshots), else to pytest's.
`make comfy-pictures` writes the README's docs/comfyui.jpg from one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

ROOT = Path(__file__).parent.parent.parent
NAMES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY = "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types?.LegoLoadPipeline)"
RUN_MILLISECONDS = 240_000
GRAPH = (230, 240, 1690, 840)  # where the graph is on the screenshot, in pixels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(server: Any) -> Iterator[Any]:
    """The frontend, opened by a user who hasn't been there before."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not here: `make test-comfy` installs it")
    if CHROMIUM is None:
        pytest.skip(
            "there is no Chromium, and only root can have `make test-comfy` install it: apt-get install chromium"
        )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        opened = browser.new_page(viewport={"width": 1920, "height": 1080})
        opened.goto(server.url)
        opened.wait_for_function(READY, timeout=120_000)
        opened.wait_for_timeout(3000)
        yield opened
        browser.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("LEGO_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_templates(page: Any) -> None:
    """Shows the pack's templates; a user who is new sees the dialog without asking."""
    if not page.get_by_text("lego-pipeline", exact=True).first.is_visible():
        page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("lego-pipeline", exact=True).first.click()
    page.get_by_test_id(f"template-workflow-{NAMES[0]}").wait_for()
    page.wait_for_timeout(1000)


def test_the_template_browser_lists_all_workflows_with_thumbnails(page: Any, screenshots: Path) -> None:
    open_templates(page)
    for name in NAMES:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        assert card.is_visible()
        picture = card.locator("img").first
        picture.wait_for()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 256
    page.screenshot(path=screenshots / "templates.png")


def test_a_template_is_opened_and_run(page: Any, screenshots: Path) -> None:
    open_templates(page)
    page.get_by_test_id("template-workflow-LEGO action frame").click()
    page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'LegoEnhancePrompt')")
    page.wait_for_timeout(1000)
    with page.expect_response(lambda response: response.url.endswith("/prompt")) as queued:
        page.get_by_test_id("queue-button").click()
    assert queued.value.json()["node_errors"] == {}
    save = page.evaluate("app.graph.nodes.find(node => node.type === 'SaveImage').id")
    shown = f"() => app.nodeOutputs['{save}']?.images?.length && app.graph.getNodeById({save}).imgs?.length"
    page.wait_for_function(shown, timeout=RUN_MILLISECONDS)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(2000)
    page.screenshot(path=screenshots / "workflow.png")
    if os.environ.get("LEGO_WRITE_PICTURES"):
        with PIL.Image.open(screenshots / "workflow.png") as shot:
            shot.convert("RGB").crop(GRAPH).save(ROOT / "docs" / "comfyui.jpg", quality=88, optimize=True)
    assert (
        page.evaluate(
            "app.graph.nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types)).length"
        )
        == 0
    )
    assert not page.evaluate("app.lastNodeErrors") and not page.evaluate("app.lastExecutionError")
    text = page.evaluate("app.graph.nodes.find(node => node.type === 'PreviewAny').widgets.map(w => w.value)")
    assert any("hand" in str(value) for value in text), text


def test_a_preview_comes_and_cancel_stops_the_run(page: Any, screenshots: Path) -> None:
    """At four times the checkpoint's side, so that there is time to look and to press the button."""
    file = ROOT / "example_workflows" / "LEGO native sampling.json"
    page.evaluate("async workflow => app.loadGraphData(workflow)", json.loads(file.read_text(encoding="utf-8")))
    page.evaluate(
        """() => {
            const node = type => app.graph.nodes.find(node => node.type === type);
            node("LegoEncodeFrame").widgets.find(widget => widget.name === "resolution").value = 512;
            const scheduler = node("BasicScheduler");
            scheduler.disconnectInput(scheduler.inputs.findIndex(input => input.name === "steps"));
            scheduler.widgets.find(widget => widget.name === "steps").value = 500;
            const id = node("SamplerCustomAdvanced").id;
            window.seen = {steps: 0, previews: 0, interrupted: false, sampler: id};
            app.api.addEventListener("progress", ({detail}) => {
                if (detail.node == id) window.seen.steps = detail.value;
            });
            app.api.addEventListener("b_preview", () => { window.seen.previews += 1; });
            app.api.addEventListener("execution_interrupted", () => { window.seen.interrupted = true; });
        }"""
    )
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => window.seen.steps >= 3 && window.seen.previews", timeout=RUN_MILLISECONDS)
    shown = page.evaluate(
        """async () => {
            const [url] = app.nodePreviewImages[window.seen.sampler];
            const image = new Image();
            image.src = url;
            await image.decode();
            return [image.naturalWidth, image.naturalHeight];
        }"""
    )
    assert min(shown) >= 32
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1500)
    page.screenshot(path=screenshots / "preview.png")
    cancel = page.get_by_role("button", name="Cancel current run")
    before = page.evaluate("() => window.seen.steps")
    with page.expect_response(lambda response: response.url.endswith("/interrupt")):
        cancel.click()
    sent = page.evaluate("() => window.seen.steps")
    page.wait_for_function("() => window.seen.interrupted", timeout=RUN_MILLISECONDS)
    assert 3 <= before and page.evaluate("() => window.seen.steps") <= sent + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_as_it_was_saved(name: str, page: Any, server: Any, to_api: Any, screenshots: Path) -> None:
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    opened = page.evaluate(
        "async workflow => { await app.loadGraphData(workflow); return (await app.graphToPrompt()).output }", workflow
    )
    assert page.evaluate("app.graph.nodes.length") == len(workflow["nodes"])
    assert (
        page.evaluate(
            "app.graph.nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types)).length"
        )
        == 0
    )
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / f"{name}.png")
    expected = to_api(workflow, server.get("/object_info"))
    assert {key: (node["class_type"], node["inputs"]) for key, node in opened.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in expected.items()
    }


@pytest.mark.parametrize(("locale", "title"), [("en", "LEGO Enhance Prompt"), ("fr", "LEGO Enrichir le prompt")])
def test_a_node_has_a_help_page_in_each_language(locale: str, title: str, page: Any, screenshots: Path) -> None:
    page.evaluate("locale => app.extensionManager.setting.set('Comfy.Locale', locale)", locale)
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(3000)
    page.keyboard.press("Escape")
    page.evaluate(
        """async () => {
            await app.loadGraphData({version: 0.4, nodes: [], links: [], last_node_id: 0, last_link_id: 0});
            const node = LiteGraph.createNode("LegoEnhancePrompt");
            app.graph.add(node);
            app.canvas.selectNode(node);
        }"""
    )
    assert page.evaluate("app.graph.nodes[0].title") == title
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name=title).first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / f"help_{locale}.png")


def test_with_its_vlm_bypassed_a_workflow_reads_what_the_first_run_saved(page: Any, server: Any) -> None:
    file = ROOT / "example_workflows" / "LEGO saved enhancement.json"
    workflow = json.loads(file.read_text(encoding="utf-8"))
    to_prompt = "async w => { await app.loadGraphData(w); return (await app.graphToPrompt()).output }"
    assert server.run(page.evaluate(to_prompt, workflow))["status"]["status_str"] == "success"
    for node in workflow["nodes"]:
        if node["type"] in ("LegoLoadVlm", "LegoSaveEnhancement"):
            node["mode"] = 4
    graph = page.evaluate(to_prompt, workflow)
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert "LegoLoadVlm" not in kinds and kinds["LegoLoadEnhancement"]["cache"] == "output/enhancements"
    assert server.run(graph)["status"]["status_str"] == "success"
