"""`lego study-report`: what the votes of a `lego study` say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(kw_only=True)
class StudyReport:
    """Count the votes of a study: shares with intervals, exact tests, agreement of raters.

    Every file is checked first; one that was changed, or is of another study, is refused with the reason.
    """

    votes: tyro.conf.Positional[tuple[Path, ...]]
    """Files that raters downloaded, or folders of them such as study/votes."""
    key: Path
    """The study's key.json."""
    output: Path
    """Folder of report.html, report.md and results.json."""
    attention: float = 0.75
    """Raters who answer a smaller share of the attention checks right are left out."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Write the report; 0 when it is written."""
        if not self.votes:
            raise ValueError("`votes` must be at least one file or folder, got none; name what raters sent.")
        if not 0 <= self.attention <= 1:
            raise ValueError(f"`--attention` must be from 0 to 1, got {self.attention}.")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"`--output` must be a folder, but {self.output} is a file.")
        try:
            import scipy  # noqa: F401
        except ImportError as error:
            raise ImportError('the tests are scipy\'s; run `pip install "lego-pipeline[eval]"`.') from error

        from lego_pipeline.study.page import Key
        from lego_pipeline.study.report import headline, markdown, write_report
        from lego_pipeline.study.tally import tally
        from lego_pipeline.study.votes import read_votes

        key = Key.read(self.key)
        result = tally(key, read_votes(self.votes, key), self.attention)
        write_report(self.output, result)
        if self.json:
            print(json.dumps({"ok": True, "output": str(self.output), **result}))
        else:
            print(f"{markdown(result)}\n{self.output / 'report.html'}: {headline(result)}")
        return 0
