"""Pictures of single cases for the report: drawn by lot, and those in which a system gains most and least."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lego_pipeline.evaluation import results as views
from lego_pipeline.evaluation.metrics.base import Frame
from lego_pipeline.evaluation.report import encode_picture
from lego_pipeline.evaluation.results import Scores
from lego_pipeline.evaluation.rows import COPIED, TRUTH, Pairs, Row

MOST_SCORES = 4  # below a picture


class Cases:
    """Rows of pictures, input, systems, truth, with their scores.

    Args:
        pairs: of the table.
        systems: rows whose pictures are shown.
        scores: of the table.
        metrics: as in `results.json`.
    """

    def __init__(self, pairs: Pairs, systems: Sequence[Row], scores: Scores, metrics: Mapping[str, Mapping[str, Any]]):
        self.pairs, self.systems, self.scores, self.metrics = pairs, systems, scores, metrics
        self.shown = [name for name, metric in metrics.items() if metric["kind"] == "sample"]

    def grids(self, count: int, seed: int, system: str, metric: str | None) -> list[dict[str, Any]]:
        """What `write_report` shows.

        Args:
            count: cases of each kind.
            seed: of the lot.
            system: whose best and worst cases are shown.
            metric: that finds them by the gain over the copied input; None takes the first that scores single frames.
        """
        everything = range(len(self.pairs))
        lot = sorted(random.Random(seed).sample(everything, min(count, len(everything))))
        chosen = [("Cases drawn by lot", f"By seed {seed}, not by quality.", lot)]
        if self.shown:
            metric = metric or self.shown[0]
            order = views.rank(self.scores, system, metric, self.metrics[metric]["higher_is_better"])
            most = min(count, len(order) // 2)
            note = f"By what {system} gains over the input copied, in {self.metrics[metric]['label']}."
            chosen.append((f"Best cases of {system}", note, order[:most]))
            chosen.append((f"Worst cases of {system}", note, order[::-1][:most]))
        return [
            {"title": title, "note": note, "cases": [self._case(number) for number in numbers]}
            for title, note, numbers in chosen
            if numbers
        ]

    def _case(self, number: int) -> dict[str, Any]:
        cells = [("input", self.pairs.frame("image_0", number), COPIED)]
        for row in self.systems:
            read = row.pictures[number]
            cells.append((row.name, None if read is None else Frame(read()), row.name))
        cells.append(("truth", self.pairs.frame("image_1", number), TRUTH))
        row_id = self.pairs.ids[number]
        prompts = [row.facts.get("prompts", {}).get(row_id) for row in self.systems]
        return {
            "id": row_id,
            "action": self.pairs.actions[number].action,
            "description": next((prompt for prompt in prompts if prompt), ""),
            "cells": [
                {
                    "caption": caption,
                    "picture": None if frame is None else encode_picture(frame.image),
                    "scores": self._scores(row, number),
                }
                for caption, frame, row in cells
            ],
        }

    def _scores(self, row: str, number: int) -> str:
        """The scores that a picture has."""
        said = []
        for name in self.shown[:MOST_SCORES] if row in self.scores else ():
            values, metric = self.scores[row][name], self.metrics[name]
            if isinstance(values, np.ndarray) and not np.isnan(values[number]):
                said.append(f"{metric['label']} {views.number(values[number], metric)}")
        return ", ".join(said)
