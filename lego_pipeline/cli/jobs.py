"""Pictures on their way: what each depends on, what became of it, and calls of which one bad sample is left out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lego_pipeline.cli.samples import Sample

STATUSES = ("written", "skipped", "failed")


@dataclass(kw_only=True)
class Job:
    """A sample on its way: where its picture goes, what it depends on, and what became of it."""

    sample: Sample
    path: Path
    request: dict[str, Any]  # settings and content of the input; equal requests give equal pictures
    status: str = "failed"  # or "written", or "skipped": it was there already
    error: str | None = None
    record: dict[str, Any] | None = None

    def fail(self, error: Exception | str) -> None:
        """Note a failure and say it in one line."""
        self.error = " ".join(str(error).split())
        print(f"lego: {self.sample.id}: {self.error}", file=sys.stderr)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        sample = self.sample
        return {
            "id": sample.id,
            "image": str(sample.image),
            "action": sample.action,
            "description": self.record["description"] if self.record else sample.description,
            "seed": sample.seed,
            "status": self.status,
            "path": str(self.path) if self.record else None,
            "error": self.error,
        }


def texts_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """`action` and `description` of jobs for one call of the pipeline; all have one or none has."""
    return {
        "action": None if jobs[0].sample.action is None else [job.sample.action for job in jobs],
        "description": None if jobs[0].sample.description is None else [job.sample.description for job in jobs],
    }


def call_or_report(call: Callable[[Sequence[Job]], None], batch: Sequence[Job]) -> None:
    """One call; if the pipeline refuses it, one call for each sample, so that only the bad ones fail."""
    try:
        call(batch)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if len(batch) == 1:
            batch[0].fail(error)
            return
        for job in batch:
            call_or_report(call, [job])


def print_counts(results: Sequence[dict[str, Any]], output: Path, *, as_json: bool) -> int:
    """Print what became of all jobs, each as `Job.as_dict` has it; the exit code, 1 if one failed."""
    counts = Counter(result["status"] for result in results)
    if as_json:
        numbers = {status: counts[status] for status in STATUSES}
        print(json.dumps({"ok": not counts["failed"], **numbers, "samples": list(results)}))
    else:
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        print(f"{output}: {counts['written']} written, {counts['skipped']} there already{failed}")
    return 1 if counts["failed"] else 0
