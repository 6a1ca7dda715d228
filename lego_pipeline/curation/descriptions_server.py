"""Descriptions from any server that speaks the OpenAI chat protocol, many at a time, each answer kept at once.

The `openai` package waits and asks again on 408, 409, 429, 5xx, broken connections and time-outs, doubling its pause
up to 8 seconds, or as long as the server asks for, up to two minutes; here stands what a row's answer has to be, and
what is kept of it.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lego_pipeline.curation.descriptions import FRAMES, Message, WorkedExample, ask_again, build_messages
from lego_pipeline.curation.descriptions_check import DescriptionRules, clean_answer, find_objection, one_line
from lego_pipeline.data.shards import content_key

NEEDS_OPENAI = 'Asking a language model needs openai; run `pip install "lego-pipeline[train]"`.'
NO_KEY = "none"  # sent to servers that want no key; the client insists on one
USELESS = (401, 402, 403, 404, 405)  # status codes that the next row would get too
BUSY = (408, 409, 429)  # status codes below 500 after which it is asked again
LONGEST_PAUSE = 120.0  # seconds, which the openai package waits where a server says so
GIVE_UP = 10  # rows in a row without an answer, after which the server is taken to be gone
SHORTEST_SECRET = 8  # letters of a key; servers that want none are given words such as "none"
FILTERED = "was stopped by the server's filter"
PROTOCOL = "the server's answer is not of the chat protocol"


class ServerError(OSError):
    """The server can't be used at all: the run ends, and what it has got is kept."""


class NoAnswerError(Exception):
    """A conversation got no answer; the next run asks again.

    Attributes:
        is_refusal: the server is there, and refuses this request.
    """

    def __init__(self, message: str, is_refusal: bool = False):
        super().__init__(message)
        self.is_refusal = is_refusal


@dataclass(frozen=True)
class Answer:
    """What the server said: text, whether it stopped at its limit of tokens or by its filter, and what that cost."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Asked:
    """What came of a row: a description; or answers that can't be used; or no answer.

    Attributes:
        id, key: of the row, and of what was asked about it (`row_key`).
        description: None if there is none.
        reason: why there is none.
        is_answered: False if the next run is to ask again.
        answers: those that can't be used.
        requests, prompt_tokens, completion_tokens: of all answers, as the server counts them.
        is_refused: there is no answer as the server refuses the request, too long a one for instance.
    """

    id: str
    key: str
    description: str | None
    reason: str | None
    is_answered: bool
    answers: tuple[str, ...]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    is_refused: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model writes; None leaves a field out of the request, for models that refuse it.

    Attributes:
        temperature: 0 takes the likeliest words.
        max_tokens: at which the server cuts an answer off.
        max_tokens_name: the field's name: newer models of OpenAI want `max_completion_tokens`.
        seed: each row's own is made of it.
    """

    temperature: float | None = 0.3
    max_tokens: int = 160
    max_tokens_name: str = "max_tokens"
    seed: int | None = 0

    def fields(self, row_id: str) -> dict[str, Any]:
        """Of a row's request."""
        fields: dict[str, Any] = {self.max_tokens_name: self.max_tokens}
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.seed is not None:
            fields["seed"] = int(content_key("description", self.seed, row_id)[:8], 16)
        return fields


def row_key(messages: Sequence[Message], model: str, fields: Mapping[str, Any]) -> str:
    """Short key of what is asked about a row; another prompt, model or setting gives another."""
    return content_key(list(messages), model, dict(fields))


class Server:
    """A server of chat completions.

    Args:
        base_url: such as "http://127.0.0.1:8000/v1".
        model: its name there.
        api_key: never logged or written; None for servers that want none.
        timeout_seconds: of one request.
        retries: requests that may follow a failed one.

    Raises:
        ImportError: openai is missing.
        ValueError: the key can't be sent.
    """

    def __init__(self, base_url: str, model: str, api_key: str | None, timeout_seconds: float, retries: int):
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise ImportError(NEEDS_OPENAI) from error
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError(
                "`api_key_env` must name a variable that holds printable ASCII without blanks; set that variable anew."
            )
        for name in ("httpx", "httpx2", "openai"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a line a request
        self.base_url, self.model, self._key = base_url, model, api_key
        self._whole_seconds = (retries + 1) * (timeout_seconds + LONGEST_PAUSE)  # of a server that drips, too
        self._client = AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or NO_KEY,
            timeout=timeout_seconds,
            max_retries=retries,
            # On a connection that is used again, a second reply to one request would be taken for the next row's.
            default_headers={"Connection": "close"},
        )

    async def ask(self, messages: Sequence[Message], fields: Mapping[str, Any]) -> Answer:
        """One answer.

        Raises:
            ServerError: key, address or model are wrong.
            NoAnswerError: failures until the last retry, a request that the server refuses, or a reply that isn't one.
        """
        import openai

        conversation: Any = list(messages)
        try:
            async with asyncio.timeout(self._whole_seconds):
                reply = await self._client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=conversation,
                    **fields,
                )
        except openai.APIStatusError as error:
            if error.code == "content_filter":
                return Answer("", "content_filter", 0, 0)
            if error.status_code in USELESS:
                raise ServerError(self._advice(error.status_code)) from None
            is_refusal = error.status_code < 500 and error.status_code not in BUSY
            told = f"the server says {error.status_code} ({self._told(error.message)})"
            raise NoAnswerError(told, is_refusal) from None
        except openai.APITimeoutError:
            raise NoAnswerError("the server did not answer in time") from None
        except openai.APIConnectionError as error:
            raise NoAnswerError(f"no connection ({self._told(str(error.__cause__ or error))})") from None
        except TimeoutError:
            raise NoAnswerError("the server did not finish its answer in time") from None
        answer = read_answer(self._without_key(reply.http_response.text))
        return replace(answer, text=self._without_key(answer.text))  # JSON may have spelt it otherwise

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _advice(self, status: int) -> str:
        rule = {401: "the API key is missing or wrong", 402: "the account has no credit", 403: "access is forbidden"}
        what = rule.get(status, f"it knows no model {self.model!r}, or no chat completions under this address")
        return (
            f"`base_url` must be a server that answers, got {self.base_url}, which says {status}: {what}; set the "
            "variable that `api_key_env` names, `base_url` or `model`. What was answered before is kept."
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "...") if self._key and len(self._key) >= SHORTEST_SECRET else text

    def _told(self, text: str) -> str:
        """A message of the server or the network, in one short line and without the key."""
        return one_line(self._without_key(text))[:200]


def read_answer(text: str) -> Answer:
    """The first choice of a chat completion.

    Raises:
        NoAnswerError: the text is something else.
    """
    try:
        content = json.loads(text)
        choice = content["choices"][0]
        said = choice["message"].get("content") or choice["message"].get("refusal") or ""
        usage = content.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(said, str):
            raise TypeError("the content is no text")
        return Answer(said, str(choice.get("finish_reason")), *tokens)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        raise NoAnswerError(f"{PROTOCOL}: {one_line(text)[:100]!r}") from None


async def describe(
    server: Server,
    row: Mapping[str, Any],
    examples: Sequence[WorkedExample],
    rules: DescriptionRules,
    sampling: Sampling,
) -> Asked:
    """Asks for a row's description, and once more where the answer can't be used.

    Args:
        server: see there.
        row: of a manifest: id, action, noun, boxes.
        examples, rules, sampling: see there.

    Raises:
        ServerError: see `Server.ask`.
    """
    fields = sampling.fields(row["id"])
    messages = build_messages(row, examples)
    key = row_key(messages, server.model, fields)
    copied = {example.description for example in examples if example.action != row["action"]}
    boxes = {str(box["name"]) for name, _ in FRAMES for box in row.get(name) or ()}
    answers: list[str] = []
    tokens, requests, reason, failure, is_refused = [0, 0], 0, None, None, False
    for _ in range(2):
        requests += 1
        try:
            answer = await server.ask(messages, fields)
        except NoAnswerError as error:
            failure, is_refused = str(error), error.is_refusal
            if failure.startswith(PROTOCOL):
                continue
            break
        failure = None
        tokens = [tokens[0] + answer.prompt_tokens, tokens[1] + answer.completion_tokens]
        text = clean_answer(answer.text)
        is_cut_off = answer.finish_reason == "length"
        reason = find_objection(text, row["action"], row.get("noun"), rules, copied, is_cut_off, boxes)
        if answer.finish_reason == "content_filter":
            reason = FILTERED
        if reason is None:
            return Asked(row["id"], key, text, None, True, tuple(answers), requests, *tokens)
        answers.append(text)
        messages = ask_again(messages, text, reason)
    is_answered = failure is None
    return Asked(row["id"], key, None, failure or reason, is_answered, tuple(answers), requests, *tokens, is_refused)


async def describe_all(
    server: Server,
    rows: Iterable[Mapping[str, Any]],
    examples: Sequence[WorkedExample],
    rules: DescriptionRules,
    sampling: Sampling,
    concurrency: int,
    keep: Callable[[Asked], None],
    has_answered: bool = False,
) -> None:
    """Asks for the descriptions of all rows, so many at a time; `keep` gets each outcome as soon as it is there.

    Args:
        has_answered: whether the server has answered with these settings before. One that has is not taken to be gone
            because it refuses some rows; one that hasn't may refuse the settings.

    Raises:
        ServerError: see `Server.ask`; or the last rows were all without an answer.
    """
    waiting = iter(rows)
    silent = 0

    async def work() -> None:
        nonlocal silent, has_answered
        for row in waiting:
            outcome = await describe(server, row, examples, rules, sampling)
            keep(outcome)
            has_answered |= outcome.is_answered
            if outcome.is_answered:
                silent = 0
            elif not (outcome.is_refused and has_answered):
                silent += 1
            if silent >= GIVE_UP:
                raise ServerError(
                    f"`base_url` must be a server that answers, got {server.base_url} and no answer to the last "
                    f"{silent} rows ({outcome.reason}); run the same line again when it does."
                )

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await server.close()
