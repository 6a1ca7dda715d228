"""Have a language model write the detailed descriptions of pairs, by worked examples in context (paper section 3.1).

    python train/curate_descriptions.py --data DATA --output-dir runs/described --model NAME \\
        --base-url http://127.0.0.1:8000/v1

Any server of the OpenAI chat protocol will do: a provider's, or your own (vLLM, llama.cpp, `transformers serve`). The
model gets label, boxes of hands and objects and the description of some worked examples, and then label and boxes of
the pair; it sees no pixels. `--examples` is a file of your own with one JSON object a line (`action`, `description`,
`boxes_0`, `boxes_1`), written for frames like yours; say there what label and boxes tell and no more, for what the
examples add, a colour or a grip, the model makes up for every pair. Those that come along are of the rendered kitchen.
`--dry-run` prints one whole prompt and what all that are still to be sent would cost.

An answer that doesn't name the object, has the wrong length, refuses, reads boxes aloud or repeats itself is asked for
once more, with the reason; a second such answer puts the row into quarantine.jsonl, and so does a server that answers
other rows and refuses this one. Rows that have a description keep it. Each answer is on disk as soon as it is there:
run the same line again, whatever stopped it, and only what is missing is asked for. One process does it, with
`--concurrency` requests at a time.

    output_dir/manifest          the pairs that have a description, for `train/tune_vlm.py --data`
    output_dir/llava             the same as the tuning file of LLaVA's own code, frames beside it
    output_dir/quarantine.jsonl  rows without a usable answer: reason and answers
    output_dir/report.json       counts that add up to the rows; tokens and price of all in answers.jsonl
    output_dir/answers.jsonl     all outcomes as they came

These files are made anew by every run, of its splits and rows; the manifest of a split that an earlier run was asked
for stays. The key comes from the environment variable that `--api-key-env` names; it is written nowhere.
"""

import asyncio
import ipaddress
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from lego_pipeline.atomic import write_text
from lego_pipeline.config import run
from lego_pipeline.curation.descriptions import (
    KITCHEN_EXAMPLES,
    WorkedExample,
    build_messages,
    estimate_tokens,
    has_boxes,
    read_examples,
)
from lego_pipeline.curation.descriptions_check import DescriptionRules
from lego_pipeline.curation.descriptions_export import write_llava, write_manifest
from lego_pipeline.curation.descriptions_journal import Journal, read_journal
from lego_pipeline.curation.descriptions_server import (
    Asked,
    Sampling,
    Server,
    ServerError,
    describe_all,
    row_key,
)
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.data.shards import content_key
from lego_pipeline.training import check_number
from lego_pipeline.vlm.base import DEFAULT_QUESTION, check_question

logger = logging.getLogger("curate_descriptions")

COLUMNS = ["id", "action", "noun", "description", "boxes_0", "boxes_1"]
JOURNAL = "answers.jsonl"
RESULTS = ("manifest", "llava", "quarantine.jsonl", "report.json")
Row = dict[str, Any]


@dataclass(kw_only=True)
class CurateDescriptionsConfig:
    data: Path  # manifest, of curate_frames.py for instance
    base_url: str  # of a server of the OpenAI chat protocol, with the version: http://127.0.0.1:8000/v1
    model: str  # name by which the server knows it
    output_dir: Path = Path("runs/described")
    split: tuple[str, ...] = ("train",)
    rows: int = 0  # of each split at most, drawn by their ids, so that more rows include fewer; 0 = all
    examples: Path | None = None  # file of worked examples; None: the kitchen's, which come along
    num_examples: int = 0  # the first of them; 0 = all
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key; unset for a server that wants none
    concurrency: int = 8  # requests at a time
    timeout_seconds: float = 60.0  # of a request
    retries: int = 6  # requests after a failed one, with growing pauses
    temperature: float | None = 0.3  # None leaves it to the server
    max_tokens: int = 160  # of an answer; more for models that think first
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # newer OpenAI models: the second
    seed: int | None = 0  # of the sampling; None leaves it to the server
    min_words: int = 6  # of new answers; those on disk are kept
    max_words: int = 60  # a CLIP text encoder reads no more
    retry_quarantined: bool = False  # ask for these again
    price_input: float = 0.0  # of a million prompt tokens, in whatever currency
    price_output: float = 0.0  # of a million tokens of answers
    llava: bool = True  # the tuning file for LLaVA's own code too
    question_template: str = DEFAULT_QUESTION  # in that file

    def __post_init__(self):
        check_question(self.question_template)
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username or address.password:
            raise ValueError(
                "`base_url` must be http://HOST:PORT/v1 or https://HOST/v1 without a user name or password; the key "
                "comes from the environment variable that `api_key_env` names."
            )
        if not self.split:
            raise ValueError("`split` must name at least one, got none.")
        if len(set(self.split)) < len(self.split):
            raise ValueError(f"`split` must name each split once, got {' '.join(self.split)}.")
        for name in ("concurrency", "max_tokens", "min_words"):
            check_number(self, name, 1)
        for name in ("rows", "num_examples", "retries", "temperature", "price_input", "price_output"):
            check_number(self, name, 0)
        check_number(self, "timeout_seconds", above=0)
        check_number(self, "max_words", self.min_words)

    def report(self) -> str:
        """One whole prompt and an estimate of what all of them cost, for --dry-run."""
        examples = read_examples(self.examples or KITCHEN_EXAMPLES, self.num_examples)
        rows = [row for _, _, part in read_splits(self) for row in part if not row["description"]]
        outcomes, waiting = asked_before(self, rows, examples)
        if not waiting:
            return "every row has a description or an answer"
        messages = [build_messages(row, examples) for row in waiting]
        prompt = sum(map(estimate_tokens, messages))
        answers = sum(len(example.description) for example in examples) // 4 * len(waiting) // len(examples)
        parts = [f"--- {message['role']}\n{message['content']}" for message in messages[0]]
        parts += [
            f"--- {len(waiting)} rows to ask for, {sum(map(has_boxes, waiting))} with boxes; about {prompt} tokens of "
            f"prompts and {answers} of answers (four letters to a token){self.price_of(prompt, answers)}; "
            f"{len(rows) - len(waiting)} rows were asked for before"
        ]
        return "\n".join(parts)

    def price_of(self, prompt_tokens: int, completion_tokens: int) -> str:
        """The price of so many tokens in words, nothing if none was named."""
        if not self.price_input and not self.price_output:
            return ""
        return f": {(prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6:.4g} in all"


def read_splits(config: CurateDescriptionsConfig) -> list[tuple[str, Dataset, list[Row]]]:
    """Each split with its rows, and what is asked about them.

    Raises:
        FileNotFoundError, ValueError: see `read_manifest`.
    """
    found = []
    for split in config.split:
        try:
            rows = read_manifest(config.data, split)
        except FileNotFoundError as error:
            raise FileNotFoundError(str(error).replace("`path`", "`data`")) from error
        if 0 < config.rows < len(rows):
            ids = rows["id"][:]
            chosen = sorted(range(len(ids)), key=lambda number, ids=ids: content_key("draw", ids[number]))
            rows = rows.select(sorted(chosen[: config.rows]))
        found.append((split, rows, rows.select_columns(COLUMNS).to_list()))
    return found


def sampling_of(config: CurateDescriptionsConfig) -> Sampling:
    """How the model is asked to write."""
    return Sampling(
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        max_tokens_name=config.max_tokens_name,
        seed=config.seed,
    )


def settle(outcomes: dict[str, Asked]) -> dict[str, Asked]:
    """Refused rows as answered ones, for quarantine, once the server has answered others: the settings are right."""
    if not any(outcome.is_answered for outcome in outcomes.values()):
        return outcomes
    return {
        row_id: replace(outcome, is_answered=True) if outcome.is_refused else outcome
        for row_id, outcome in outcomes.items()
    }


def asked_before(
    config: CurateDescriptionsConfig, rows: Sequence[Row], examples: Sequence[WorkedExample]
) -> tuple[dict[str, Asked], list[Row]]:
    """What the journal has of these rows, by id, and the rows to ask for, first those that never were."""
    sampling = sampling_of(config)
    known = {(outcome.id, outcome.key): outcome for outcome in read_journal(config.output_dir / JOURNAL)}
    outcomes = {}
    for row in rows:
        key = row_key(build_messages(row, examples), config.model, sampling.fields(row["id"]))
        if (row["id"], key) in known:
            outcomes[row["id"]] = known[row["id"], key]
    outcomes = settle(outcomes)

    def is_wanted(row: Row) -> bool:
        outcome = outcomes.get(row["id"])
        if outcome is None or not outcome.is_answered:
            return True
        return outcome.description is None and config.retry_quarantined

    return outcomes, sorted(filter(is_wanted, rows), key=lambda row: row["id"] in outcomes)


def warn_of_open_key(config: CurateDescriptionsConfig, key: str | None) -> None:
    """Says so where a key would travel without encryption."""
    address = urlsplit(config.base_url)
    host = str(address.hostname)
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    if key and address.scheme == "http" and not is_here:
        logger.warning("the key in %s is sent to %s without encryption (http)", config.api_key_env, host)


def ask_for_all(
    config: CurateDescriptionsConfig,
    rows: Sequence[Row],
    examples: Sequence[WorkedExample],
    outcomes: dict[str, Asked],
) -> None:
    """Asks for these rows; each outcome is put into the journal and into `outcomes`, by id.

    Raises:
        ServerError: the server can't be used.
        ValueError: the key can't be sent.
    """
    key = (os.environ.get(config.api_key_env) or "").strip() or None
    warn_of_open_key(config, key)
    server = Server(config.base_url, config.model, key, config.timeout_seconds, config.retries)
    has_answered = any(outcome.is_answered for outcome in outcomes.values())
    rules = DescriptionRules(config.min_words, config.max_words)
    journal = Journal(config.output_dir / JOURNAL)
    with tqdm(total=len(rows), desc="describe", unit="row", mininterval=1) as bar:

        def keep(outcome: Asked) -> None:
            journal.keep(outcome)
            outcomes[outcome.id] = outcome
            bar.update()

        sampling = sampling_of(config)
        try:
            asyncio.run(describe_all(server, rows, examples, rules, sampling, config.concurrency, keep, has_answered))
        finally:
            journal.close()


def summarise(
    config: CurateDescriptionsConfig, rows: Sequence[Row], had: dict[str, str], outcomes: dict[str, Asked]
) -> dict[str, Any]:
    """The counts of report.json: `kept`, `described`, `quarantined` and `unanswered` add up to `rows`.

    Tokens are those of all answers in the journal: of earlier attempts, prompts and models too.
    """
    quarantined = [outcome for outcome in outcomes.values() if outcome.is_answered and outcome.description is None]
    unanswered = [outcome for outcome in outcomes.values() if not outcome.is_answered]
    journal = read_journal(config.output_dir / JOURNAL)
    tokens = [sum(getattr(outcome, name) for outcome in journal) for name in ("prompt_tokens", "completion_tokens")]

    def reasons(group: Sequence[Asked]) -> dict[str, int]:
        return dict(Counter(str(outcome.reason).partition(" (")[0] for outcome in group).most_common())

    return {
        "rows": len(rows),
        "kept": len(had),
        "described": sum(outcome.description is not None for outcome in outcomes.values()),
        "quarantined": len(quarantined),
        "quarantined_by_reason": reasons(quarantined),
        "unanswered": len(unanswered),
        "unanswered_by_reason": reasons(unanswered),
        "asked_without_boxes": sum(row["id"] in outcomes and not has_boxes(row) for row in rows),
        "asked_twice": sum(outcome.requests > 1 for outcome in outcomes.values()),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "price": (tokens[0] * config.price_input + tokens[1] * config.price_output) / 1e6,
    }


def write_results(
    config: CurateDescriptionsConfig, found: list[tuple[str, Dataset, list[Row]]], outcomes: dict[str, Asked]
) -> dict[str, Any]:
    """Writes manifest, LLaVA file, quarantine and report; returns the report."""
    rows = [row for _, _, part in found for row in part]
    had = {row["id"]: row["description"] for row in rows if row["description"]}
    descriptions = had | {o.id: o.description for o in outcomes.values() if o.description is not None}
    for split, dataset, _ in found:
        count = write_manifest(config.output_dir / "manifest", dataset, split, descriptions)
        if config.llava:
            write_llava(config.output_dir / "llava", dataset, split, descriptions, config.question_template)
        logger.info("%s: %d of %d rows have a description", split, count, len(dataset))
    lines = []
    for row in rows:
        outcome = outcomes.get(row["id"])
        if outcome is not None and outcome.is_answered and outcome.description is None:
            line = {"id": row["id"], "action": row["action"], "reason": outcome.reason, "answers": outcome.answers}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(config.output_dir / "quarantine.jsonl", "".join(lines))
    report = summarise(config, rows, had, outcomes)
    write_text(config.output_dir / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def check_output(config: CurateDescriptionsConfig) -> None:
    """That nothing is written over what this script hasn't made.

    Raises:
        ValueError: it would be.
    """
    folder, source = config.output_dir, config.data.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {folder}; name another one.")
    for name in ("manifest", "llava"):
        target = (folder / name).resolve()
        if target == source or target in source.parents or source in target.parents:
            raise ValueError(
                f"`output_dir` must lie apart from `data`, got {folder} and {config.data}; name another folder."
            )
    others = [name for name in RESULTS if (folder / name).exists()]
    if others and not (folder / JOURNAL).exists():
        raise ValueError(
            f"`output_dir` must be new or that of an earlier run, got {folder} with {', '.join(others)} of something "
            "else; name another folder."
        )


def main(config: CurateDescriptionsConfig) -> None:
    check_output(config)
    examples = read_examples(config.examples or KITCHEN_EXAMPLES, config.num_examples)
    found = read_splits(config)
    rows = [row for _, _, part in found for row in part if not row["description"]]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(config.output_dir / ".lock", timeout=0):
            Journal(config.output_dir / JOURNAL).close()  # there from the start: it marks the folder as this script's
            outcomes, waiting = asked_before(config, rows, examples)
            try:
                if waiting:
                    ask_for_all(config, waiting, examples, outcomes)
            except ServerError:
                if len(outcomes) == len(rows):  # all were asked for: some get no answer, the others are of use
                    write_results(config, found, settle(outcomes))
                raise
            report = write_results(config, found, settle(outcomes))
    except Timeout:
        raise ValueError(
            f"`output_dir` must be used by one run at a time, got {config.output_dir}, where another is at work."
        ) from None
    logger.info(
        "%d rows: %d kept their description, %d described, %d in quarantine, %d without an answer; %d + %d tokens%s",
        *(report[name] for name in ("rows", "kept", "described", "quarantined", "unanswered", "prompt_tokens")),
        *(report["completion_tokens"], config.price_of(report["prompt_tokens"], report["completion_tokens"])),
    )
    if report["unanswered"]:
        raise OSError(
            f"{report['unanswered']} rows have no answer yet (report.json says why); run the same line again to "
            "ask for them."
        )


if __name__ == "__main__":
    run(main, CurateDescriptionsConfig, __doc__)
