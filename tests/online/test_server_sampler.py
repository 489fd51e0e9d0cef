"""Samples from a model behind a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.errors import UserError
from penchant.examples import Answer
from penchant.models.generation import Sampling
from penchant.online.client import ChatClient
from penchant.online.server_sampler import ServerSampler

from .fake_server import FakeServer, Handler, reply_to, status


def told(request: dict[str, Any]) -> str:
    text = request["prompt"] if "prompt" in request else request["messages"][-1]["content"]
    return f" {text}, seed {request['seed']}\n"


def sampler(server: FakeServer, cache: Path) -> ServerSampler:
    return ServerSampler(ChatClient(server.url, "fake", cache=cache, retries=0, parallel=1))


def test_samples_differ_by_seed_and_number_and_their_text_is_exactly_what_came(tmp_path: Path) -> None:
    advanced: list[int] = []
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}]
    with FakeServer(told) as server:
        sampling = Sampling(temperature=0.7, top_p=0.9, top_k=40, max_new_tokens=12)
        answers = sampler(server, tmp_path / "answers.jsonl").sample(["a", chat], sampling, 3, [5, 6], advanced.append)
    assert [len(own) for own in answers] == [3, 3]
    seeds = [request["seed"] for request in server.requests]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert [answer for own in answers for answer in own] == [Answer(told(request)) for request in server.requests]
    assert server.paths == ["/v1/completions"] * 3 + ["/v1/chat/completions"] * 3
    assert server.requests[3]["messages"] == chat
    for request in server.requests:
        asked = [request[name] for name in ("temperature", "top_p", "top_k", "max_tokens")]
        assert asked == [0.7, 0.9, 40, 12]
    assert sum(advanced) == 6


def test_a_sample_depends_on_its_prompt_seed_and_number_alone(tmp_path: Path) -> None:
    with FakeServer(told) as server:
        together = sampler(server, tmp_path / "one.jsonl").sample(["a", "b"], Sampling(), 2, [7, 8])
        (alone,) = sampler(server, tmp_path / "other.jsonl").sample(["b"], Sampling(), 3, [8])
        assert alone[:2] == together[1]
        num_requests = len(server.requests)
        assert sampler(server, tmp_path / "one.jsonl").sample(["b"], Sampling(), 2, [8]) == [alone[:2]]
        assert len(server.requests) == num_requests


def test_what_was_cut_at_the_limit_is_not_finished(tmp_path: Path) -> None:
    def cut(handler: Handler) -> None:
        handler.send(200, json.dumps(reply_to({}, "and so", finish="length")).encode())

    with FakeServer(told, [cut]) as server:
        ((first, second),) = sampler(server, tmp_path / "answers.jsonl").sample(["a"], Sampling(), 2)
    assert first == Answer("and so", is_finished=False)
    assert second.is_finished


def test_a_sample_that_cannot_be_had_is_an_error_and_the_others_are_kept(tmp_path: Path) -> None:
    with FakeServer(told, [status(503)]) as server:
        with pytest.raises(UserError, match=r"failed on a sample: .*503"):
            sampler(server, tmp_path / "answers.jsonl").sample(["a", "b", "c"], Sampling())
        assert len(server.requests) == 3
        sampler(server, tmp_path / "answers.jsonl").sample(["a", "b", "c"], Sampling())
        assert len(server.requests) == 4
