"""Asking a server that fails, stalls, truncates, answers twice and talks rubbish: nothing is lost or mixed up."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lego_pipeline.curation.descriptions import WorkedExample
from lego_pipeline.curation.descriptions_check import DescriptionRules
from lego_pipeline.curation.descriptions_server import (
    GIVE_UP,
    Answer,
    Asked,
    NoAnswerError,
    Sampling,
    Server,
    ServerError,
    describe_all,
    read_answer,
)
from tests.curation.chat_server import ChatServer, Reply, completion, failure, sentence

EXAMPLES = [WorkedExample("wipe counter", "I wipe the counter with the cloth in my right hand.")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests to this machine go to no proxy, and an abandoned connection is no warning."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield


def rows_of(*actions: str) -> list[dict[str, Any]]:
    return [{"id": f"pair-{action}", "action": action, "noun": action.split()[-1]} for action in actions]


def ask(
    server: ChatServer, *actions: str, concurrency: int = 1, key: str | None = None, **options: Any
) -> list[Asked]:
    """Outcomes of these labels, in the order in which they came."""
    kept: list[Asked] = []
    client = Server(server.url, "m", key, options.pop("timeout", 5.0), options.pop("retries", 3))
    sampling = Sampling(**options)
    asyncio.run(
        describe_all(client, rows_of(*actions), EXAMPLES, DescriptionRules(), sampling, concurrency, kept.append)
    )
    return kept


@pytest.mark.parametrize(
    "bad",
    [
        failure(429),
        failure(500),
        failure(503),
        failure(408),
        Reply({}, is_truncated=True),
        Reply({"a": 1}),
        Reply("<p>"),
    ]
    + [Reply({"choices": []}), Reply({"choices": [{"message": {"content": ["?"]}}]})]
    + [Reply('{"choices": [{"message": {"content": "I"}}], "usage": {"prompt_tokens": 1e999}}'), Reply("[" * 200_000)],
    ids=[
        "429",
        "500",
        "503",
        "408",
        "truncated",
        "no choices",
        "a web page",
        "empty choices",
        "content of another kind",
        "endless tokens",
        "endless brackets",
    ],
)
def test_a_failure_is_followed_by_another_request(bad: Reply) -> None:
    with ChatServer(lambda action, before, _: completion(sentence(action)) if before else bad) as server:
        [outcome] = ask(server, "take cup")
    assert outcome.description == sentence("take cup") and outcome.is_answered
    assert server.actions == ["take cup"] * 2


def test_a_stall_ends_at_the_time_out() -> None:
    replies = [Reply({}, stall=3), completion(sentence("take cup"))]
    with ChatServer(lambda action, before, _: replies[before]) as server:
        start = time.monotonic()
        [outcome] = ask(server, "take cup", timeout=0.2)
    assert outcome.description == sentence("take cup")
    assert time.monotonic() - start < 2.5


def test_the_pause_that_the_server_asks_for_is_kept() -> None:
    slow = failure(429, **{"retry-after-ms": "400"})
    with ChatServer(lambda action, before, _: completion(sentence(action)) if before else slow) as server:
        start = time.monotonic()
        ask(server, "take cup")
    assert time.monotonic() - start >= 0.4


def test_the_time_for_an_answer_has_room_for_the_longest_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, limits = [], []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    def limit(seconds: float) -> asyncio.Timeout:
        limits.append(seconds)
        return asyncio.timeout_at(None)

    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    monkeypatch.setattr("lego_pipeline.curation.descriptions_server.asyncio.timeout", limit)
    slow = Reply({"error": {"message": "wait"}}, 429, {"retry-after": "120"})
    with ChatServer(lambda action, before, _: completion(sentence(action)) if before == 3 else slow) as server:
        [outcome] = ask(server, "take cup")
    assert outcome.is_answered and pauses == [120.0] * 3
    assert sum(pauses) < limits[0]


def test_half_an_emoji_is_dropped() -> None:
    with ChatServer(lambda action, *_: completion(sentence(action) + "\ud83d\0")) as server:
        [outcome] = ask(server, "take cup")
    assert outcome.description == sentence("take cup")


def test_two_answers_to_one_request_leave_the_next_rows_alone() -> None:
    actions = ["take cup", "put bowl", "open drawer", "wash pan"]

    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        reply = completion(sentence(action), sentence("take everything"))
        reply.is_doubled = True
        return reply

    with ChatServer(script) as server:
        outcomes = ask(server, *actions)
    assert [outcome.description for outcome in outcomes] == [sentence(action) for action in actions]


def test_rubbish_is_asked_for_once_more_with_the_reason() -> None:
    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        return completion(sentence(action) if before else "Sure!")

    with ChatServer(script) as server:
        [outcome] = ask(server, "take cup")
    assert outcome.description == sentence("take cup")
    assert (outcome.answers, outcome.requests) == (("Sure!",), 2)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (200, 40)
    first, second = (body["messages"] for body in server.bodies)
    assert second[:-2] == first and "too short" in second[-1]["content"]


@pytest.mark.parametrize(
    "reply, reason",
    [
        (completion("lorem " * 30), "repeats itself"),
        (completion(sentence("take jar")), "does not name the object (cup)"),
        (completion(EXAMPLES[0].description), "is the description of an example"),
        (completion(None), "has no words"),
        (completion(sentence("take cup"), finish_reason="length"), "is too long"),
        (completion("", finish_reason="content_filter"), "was stopped by the server's filter"),
        (Reply({"error": {"message": "no", "code": "content_filter"}}, 400), "was stopped by the server's filter"),
    ],
    ids=["rubbish", "another object", "copied", "empty", "cut off", "filtered", "filtered with status 400"],
)
def test_a_second_bad_answer_puts_the_row_into_quarantine(reply: Reply, reason: str) -> None:
    with ChatServer(lambda *_: reply) as server:
        [outcome] = ask(server, "take cup")
    assert outcome.description is None and outcome.is_answered and len(outcome.answers) == 2
    assert str(outcome.reason).startswith(reason)
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "reply, requests",
    [(failure(500), 4), (failure(422, "no field seed"), 1), (Reply("<p>"), 2)],
    ids=["down", "refused", "a web page"],
)
def test_a_row_without_an_answer_is_left_for_the_next_run(reply: Reply, requests: int) -> None:
    with ChatServer(lambda action, *_: reply if action == "take cup" else completion(sentence(action))) as server:
        cup, bowl = ask(server, "take cup", "put bowl")
    assert not cup.is_answered and cup.description is None and "server" in str(cup.reason)
    assert bowl.description == sentence("put bowl")
    assert server.actions.count("take cup") == requests


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_address_or_model_ends_the_run_without_showing_the_key(status: int) -> None:
    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        return failure(status, "wrong key sk-secret") if action == "put bowl" else completion(sentence(action))

    with ChatServer(script) as server, pytest.raises(ServerError, match=f"`base_url`.*{status}") as caught:
        ask(server, "take cup", "put bowl", "open drawer", key="sk-secret")
    assert "sk-secret" not in str(caught.value)
    assert server.actions == ["take cup", "put bowl"]
    assert server.keys[0] == "Bearer sk-secret"


def test_a_servers_message_is_kept_without_the_key() -> None:
    with ChatServer(lambda *_: failure(400, "bad request by sk-secret")) as server:
        [outcome] = ask(server, "take cup", key="sk-secret")
    assert outcome.reason is not None and "bad request by ..." in outcome.reason


def test_a_key_that_an_answer_repeats_is_not_kept() -> None:
    echo = completion(sentence("take cup") + " sk-secret/1").content
    replies = [Reply("Authorization: Bearer sk-secret/1"), Reply(json.dumps(echo).replace("/1", "\\/1"))]
    with ChatServer(lambda action, before, _: replies[before]) as server:
        [outcome] = ask(server, "take cup", key="sk-secret/1")
    assert outcome.description == sentence("take cup") + " ..."
    with ChatServer(lambda *_: replies[0]) as server:
        [outcome] = ask(server, "take cup", key="sk-secret/1")
    assert "Authorization: Bearer ..." in str(outcome.reason)


def test_a_word_in_place_of_a_key_changes_no_answer() -> None:
    with ChatServer() as server:
        [outcome] = ask(server, "take cup", key="hand")
    assert outcome.description == sentence("take cup") and server.keys == ["Bearer hand"]


@pytest.mark.parametrize("key", ["sk-secret\r", "sk secret", "sk-sécret", "sk-secret\n", ""])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="`api_key_env` must") as caught:
        Server("http://127.0.0.1:9/v1", "m", key, 1.0, 0)
    assert "secret" not in repr(caught.value) and "cret" not in str(caught.value)


@pytest.mark.parametrize("before, is_ended", [(False, True), (True, False)])
def test_refusals_end_a_run_only_where_nothing_was_answered(before: bool, is_ended: bool) -> None:
    kept: list[Asked] = []
    actions = [f"take cup {i}" for i in range(GIVE_UP + 5)]
    with ChatServer(lambda *_: failure(400, "too long")) as server:
        client, rows = Server(server.url, "m", None, 5.0, 0), rows_of(*actions)
        arguments = (client, rows, EXAMPLES, DescriptionRules(), Sampling(), 1, kept.append, before)
        if is_ended:
            with pytest.raises(ServerError, match="too long"):
                asyncio.run(describe_all(*arguments))
        else:
            asyncio.run(describe_all(*arguments))
    assert len(kept) == (GIVE_UP if is_ended else len(actions))
    assert all(outcome.is_refused and not outcome.is_answered for outcome in kept)


def test_a_server_that_is_gone_ends_the_run_after_some_rows() -> None:
    kept: list[Asked] = []
    client = Server("http://127.0.0.1:9/v1", "m", None, 1.0, 0)
    rows = rows_of(*(f"take cup {i}" for i in range(40)))
    with pytest.raises(ServerError, match="no connection"):
        asyncio.run(describe_all(client, rows, EXAMPLES, DescriptionRules(), Sampling(), 4, kept.append))
    assert GIVE_UP <= len(kept) < GIVE_UP + 4 and not any(outcome.is_answered for outcome in kept)


def test_so_many_requests_run_at_a_time_and_each_row_is_asked_for_once() -> None:
    actions = [f"take cup {letter}" for letter in "abcdefghijklmnopqr"]

    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        reply = completion(sentence(action))
        reply.stall = 0.02
        return reply

    with ChatServer(script) as server:
        outcomes = ask(server, *actions, concurrency=6)
    assert 3 <= server.most_at_once <= 6
    assert sorted(server.actions) == actions
    assert {outcome.id: outcome.description for outcome in outcomes} == {f"pair-{a}": sentence(a) for a in actions}


def test_fields_of_a_request_are_the_settings_and_the_rows_own_seed() -> None:
    with ChatServer() as server:
        ask(server, "take cup", "put bowl", temperature=0.5, max_tokens_name="max_completion_tokens", max_tokens=9)
        ask(server, "take cup", temperature=None, seed=None)
    first, second, bare = ({k: v for k, v in body.items() if k != "messages"} for body in server.bodies)
    assert first.pop("seed") != second.pop("seed")
    assert first == second == {"model": "m", "temperature": 0.5, "max_completion_tokens": 9}
    assert bare == {"model": "m", "max_tokens": 160}


def test_an_answer_without_counts_or_with_a_refusal_is_read() -> None:
    choice = {"message": {"content": None, "refusal": "I won't."}, "finish_reason": "stop"}
    assert read_answer(json.dumps({"choices": [choice]})) == Answer("I won't.", "stop", 0, 0)
    with pytest.raises(NoAnswerError, match="chat protocol"):
        read_answer("[]")
