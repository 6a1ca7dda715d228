"""`lego study`: a blinded user study of several systems' pictures, or of their descriptions; pages and a server.

`lego study-report` counts the votes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lego_pipeline.cli.samples import check_seed

if TYPE_CHECKING:
    from lego_pipeline.study.page import Key
    from lego_pipeline.study.serve import StudyServer

TITLES = {"frames": "Which picture shows the action?", "descriptions": "Does the text describe the action?"}


@dataclass(kw_only=True)
class Study:
    """Make a blinded user study: output/page is for raters, output/key.json is not.

    Raters open page/index.html from a folder, from any web server, or from the one of --serve, which also saves their
    votes in output/votes. They see neither systems' names nor whose picture is whose; the order is another one for
    each rater and question. A rater may stop at any time and go on later.
    """

    output: Path
    """Folder of the study. One that is there is only served (--serve), or made again by the command that made it."""
    data: Path | None = None
    """Manifest with frames and actions; needed to make a study."""
    systems: tuple[str, ...] = ()
    """NAME=DIR for each system, DIR as `lego generate --data --output DIR` wrote it. With --mode descriptions: folders
    with generation.jsonl, or .jsonl files of id and description; without any the manifest's own descriptions."""
    split: str | None = None
    """Split of the manifest; without it all rows."""
    mode: Literal["frames", "descriptions"] = "frames"
    """Pick the best of all systems' pictures, or grade descriptions: right, partly, wrong, hallucinated."""
    questions: int | None = None
    """Number of rows to ask about, chosen by --seed; without it all that every system has something for."""
    attention_checks: int = 0
    """Further questions with a known answer, such as the true frame among frames of other actions; `lego study-report`
    leaves out who fails."""
    title: str | None = None
    """Heading of the page."""
    seed: int = 0
    """Chooses the rows, and with a rater's code the order of everything they see."""
    serve: bool = False
    """Serve the study until Ctrl+C."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 for all of this machine's, without encryption or log-in."""
    port: int = 8321
    """Port to serve at; 0 takes a free one."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Make the study, serve it, or both; 0 when the study is written."""
        from lego_pipeline.study.page import KEY, PAGE, Key

        self._check()
        if self.data is None:
            key = Key.read(self.output / KEY)
        else:
            key = self._make(self.data)
        server = self._server(key) if self.serve else None
        result = {
            "page": str(self.output / PAGE / "index.html"),
            "key": str(self.output / KEY),
            "study": key.study,
            "questions": len(key.questions),
            "url": server.url if server else None,
        }
        if self.json:
            print(json.dumps({"ok": True, **result}), flush=True)
        else:
            print(
                f"{result['page']}: {result['questions']} questions, for raters; {result['key']}: keep it to yourself"
            )
            if server:
                print(f"{server.url}: serving, votes go to {server.votes}; stop with Ctrl+C", flush=True)
        if server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                pass
            finally:
                server.server_close()
        return 0

    def _check(self) -> None:
        """Refuse what makes no study."""
        if self.data is None:
            given = {"--systems": self.systems, "--split": self.split, "--questions": self.questions}
            named = [name for name, value in given.items() if value]
            if named or not self.serve:
                asked = f" with `{named[0]}`" if named else ""
                raise ValueError(
                    f"`--data` must be given to make a study{asked}, got none; name a manifest, or only `--output` "
                    "and `--serve` for a study that is there."
                )
        if self.questions is not None and self.questions < 1:
            raise ValueError(f"`--questions` must be at least 1, got {self.questions}.")
        if self.attention_checks < 0:
            raise ValueError(f"`--attention-checks` must be at least 0, got {self.attention_checks}.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`--port` must be from 0 to 65535, got {self.port}.")
        check_seed(self.seed, "--seed")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"`--output` must be a folder, but {self.output} is a file.")

    def _make(self, data: Path) -> Key:
        """Write page and key."""
        from datasets import Image

        from lego_pipeline.data.manifest import IMAGES, read_manifest
        from lego_pipeline.study.page import secret_in, write_study
        from lego_pipeline.study.questions import FACTS, FRAME_PATH, Chooser
        from lego_pipeline.study.systems import parse_systems

        systems = parse_systems(self.systems)
        rows = read_manifest(data, self.split)
        rows = rows.select_columns([*FACTS, *IMAGES, *({FRAME_PATH} & set(rows.column_names))])
        for name in IMAGES:
            rows = rows.cast_column(name, Image(decode=False))
        secret = secret_in(self.output)
        chooser = Chooser(rows, secret, self.seed)
        ask = chooser.frames if self.mode == "frames" else chooser.descriptions
        questions = ask(systems, self.questions, self.attention_checks)
        return write_study(
            self.output,
            rows,
            questions,
            mode=self.mode,
            title=self.title or TITLES[self.mode],
            seed=self.seed,
            secret=secret,
            systems={name: str(folder) for name, folder in systems.items()} or {"manifest": str(data)},
        )

    def _server(self, key: Key) -> StudyServer:
        """The server, listening.

        Raises:
            OSError: it can't listen there.
        """
        from lego_pipeline.study.serve import StudyServer

        try:
            return StudyServer(self.output, key, self.host, self.port)
        except OSError as error:
            raise OSError(
                f"`--port` must be free at {self.host}, got {self.port}: {error}; choose another, 0 for any."
            ) from error
