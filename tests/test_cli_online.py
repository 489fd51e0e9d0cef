"""`penchant sample`, `penchant judge` and `penchant pair` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main
from penchant.data.formats import read_examples
from penchant.examples import Pair, Unpaired
from penchant.online.samples import read_samples

from .architecture.test_house import HEAVY
from .online.fake_server import FakeServer
from .training.test_run import rows, single_rows, write_rows

RULE = """
def cats(prompt, completions):
    return [text.count("cat") - text.count("dog") for text in completions]

def length(prompt, completions):
    return [len(text) for text in completions]

def same(prompt, completions):
    return [0 for text in completions]
"""

JUDGED = [
    {"prompt": f"q{n}", "completions": ["worst", "best", f"middle {n}"], "finished": [True, False, True],
     "scores": [0.0, 2.0, 0.5 + n]}
    for n in range(2)
] + [{"prompt": "tie", "completions": ["a", "b"], "scores": [1.0, 1.0]}]  # fmt: skip


@pytest.fixture
def rule(tmp_path: Path) -> str:
    (tmp_path / "rules.py").write_text(RULE)
    return str(tmp_path / "rules.py")


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """The exit code of a command, and what it wrote to standard output and standard error."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def judge(capsys: pytest.CaptureFixture[str], data: str | Path, output: Path, rule: str, *more: str) -> dict[str, Any]:
    words = ("judge", "--data", data, "--output", output, "--judge.name", "rule", "--judge.function", rule)
    code, out, err = said(capsys, *words, "--json", *more)
    assert code == 0, err
    return dict(json.loads(out))


def test_from_prompts_to_pairs_that_train(
    model_folder: Path, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", rows(5))
    samples, judged, pairs = (tmp_path / f"{name}.jsonl" for name in ("samples", "judged", "pairs"))
    code, out, err = said(
        capsys, "sample", "--model", model_folder, "--data", data, "--output", samples, "--sampling.completions", "4",
        "--sampling.max-new-tokens", "6", "--seed", "3", "--limit", "4", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert (told["prompts"], told["completions"]) == (4, 16)
    assert 1 <= told["mean_tokens"] <= 6
    sampled = read_samples(samples)
    assert [one.prompt for one in sampled] == [row["prompt"] for row in rows(4)]
    assert sum(answer.is_finished for one in sampled for answer in one.answers) == told["finished"] * 16

    summary = judge(capsys, samples, judged, f"{rule}:length")
    lengths = [len(answer.text) for one in sampled for answer in one.answers]
    assert summary["mean_score"] == pytest.approx(sum(lengths) / 16)
    assert summary["agreement"] is None

    code, out, err = said(capsys, "pair", "--data", judged, "--output", pairs, "--json")
    assert code == 0, err
    found = read_examples(pairs)
    assert found.problems == []
    assert len(found.examples) == json.loads(out)["rows"]
    for pair in found.examples:
        assert isinstance(pair, Pair)
        texts = [turns[0]["content"] for turns in pair.completions if not isinstance(turns, str)]
        assert pair.margin == len(texts[0]) - len(texts[1]) > 0


def test_the_same_command_again_changes_nothing_and_other_settings_are_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_rows(tmp_path / "prompts.jsonl", rows(3)), tmp_path / "samples.jsonl"
    words = ["sample", "--model", model_folder, "--data", data, "--output", output, "--sampling.max_new_tokens", "3"]
    assert said(capsys, *words)[0] == 0
    before = output.read_bytes()
    code, _, err = said(capsys, *words, "--sampling.batch_size", "2")
    assert (code, output.read_bytes()) == (0, before)
    assert "samples.jsonl holds 3 of 3 prompts" in err
    code, _, err = said(capsys, *words, "--sampling.temperature", "0.5", "--seed", "1")
    assert code == 2
    assert "seed: 0 then, 1 now\n  sampling.temperature: 1.0 then, 0.5 now\n" in err
    assert output.read_bytes() == before
    assert said(capsys, *words, "--sampling.temperature", "0.5", "--overwrite")[0] == 0
    assert output.read_bytes() != before


def test_a_template_that_refuses_a_prompt_leaves_it_out(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [{"prompt": [{"role": role, "content": "hi"}]} for role in ("user", "system")]
    data, template = write_rows(tmp_path / "prompts.jsonl", prompts), tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}{{ message.content }}{% endfor %}"
    )
    output = tmp_path / "samples.jsonl"
    words = ["sample", "--model", model_folder, "--data", data, "--output", output, "--chat_template", template]
    code, _, err = said(capsys, *words, "--sampling.max_new_tokens", "2")
    assert code == 0
    assert f"{data}:2: [T02] the chat template refuses the messages: no system here" in err
    assert [one.prompt for one in read_samples(output)] == [prompts[0]["prompt"]]


def test_temperature_and_template_reach_the_model(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, template = write_rows(tmp_path / "prompts.jsonl", rows(3)), tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}")

    def sampled(name: str, *more: str | Path) -> list[list[str]]:
        output = tmp_path / name
        words = ("sample", "--model", model_folder, "--data", data, "--output", output, "--sampling.completions", "3")
        assert said(capsys, *words, "--sampling.max_new_tokens", "5", *more)[0] == 0
        return [[answer.text for answer in one.answers] for one in read_samples(output)]

    greedy = sampled("greedy.jsonl", "--sampling.temperature", "0")
    assert all(len(set(texts)) == 1 for texts in greedy)
    assert any(len(set(texts)) > 1 for texts in sampled("drawn.jsonl"))
    assert sampled("other.jsonl", "--sampling.temperature", "0", "--chat_template", template) != greedy


def test_a_judge_is_checked_on_labelled_pairs(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows(8))  # chosen speak of cats, rejected of dogs
    assert judge(capsys, data, tmp_path / "a.jsonl", f"{rule}:cats")["agreement"]["share"] == 1
    tied = judge(capsys, data, tmp_path / "b.jsonl", f"{rule}:same")
    assert tied["agreement"] == {"share": 0.5, "pairs": 8, "interval": pytest.approx([0.215, 0.785], abs=1e-3)}
    assert (tied["ties"], tied["invalid"], tied["completions"]) == (8, 0, 16)
    _, _, err = said(
        capsys, "judge", "--data", data, "--output", tmp_path / "c.jsonl", "--judge.name", "rule",
        "--judge.function", f"{rule}:cats",
    )  # fmt: skip
    assert "agrees with the labels of 100.0% of 8 pairs (95% interval 67.6% to 100.0%)" in err


def test_single_completions_can_be_judged(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "single.jsonl", single_rows(4))
    told = judge(capsys, data, tmp_path / "judged.jsonl", f"{rule}:cats")
    assert (told["completions"], told["ties"], told["agreement"]) == (4, 0, None)


def test_rows_that_cannot_be_judged_are_named_and_left_out(
    rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [JUDGED[0], {"prompt": "q", "completions": []}, {"x": 1}])
    words = ("--judge.name", "rule", "--judge.function", f"{rule}:cats")
    code, _, err = said(capsys, "judge", "--data", data, "--output", tmp_path / "judged.jsonl", *words)
    assert code == 0
    assert f"{data}:2: [D20] completions is empty" in err
    assert f"{data}: 2 rows left out" in err
    assert len(read_samples(tmp_path / "judged.jsonl")) == 1


def pairs_of(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> tuple[dict[str, Any], list[Any]]:
    data = write_rows(folder / "judged.jsonl", JUDGED)
    output = folder / "pairs.jsonl"
    code, out, err = said(capsys, "pair", "--data", data, "--output", output, "--overwrite", "--json", *more)
    assert code == 0, err
    return dict(json.loads(out)), read_examples(output).examples


def test_pairs_carry_margins_and_ties_make_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, pairs = pairs_of(capsys, tmp_path)
    assert (told["rows"], told["used"], told["ties"], told["prompts"]) == (2, 2, 1, 3)
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [("best", "worst", 2.0)] * 2
    assert "accepted" in told


@pytest.mark.parametrize(("gap", "left"), [("0", 6), ("0.5", 4), ("1.5", 2)])
def test_pairs_that_differ_too_little_are_left_out(
    gap: str, left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The gaps are 2, 1.5 and 0.5 for the first prompt, and 2, 0.5 and 1.5 for the second.
    told, pairs = pairs_of(capsys, tmp_path, "--online.pairs", "all", "--online.min-gap", gap)
    assert told["rows"] == len(pairs) == left
    assert all(pair.margin > float(gap) for pair in pairs)


def test_accepted_completions_alone_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, pairs = pairs_of(
        capsys, tmp_path, "--online.pairs", "all", "--online.accept", "2", "--online.accept_beta", "1e-6"
    )
    assert (told["scored"], told["accepted"]) == (8, 6)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("best", "middle 0"), ("best", "middle 1")]


def test_the_best_alone_are_labelled_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, singles = pairs_of(capsys, tmp_path, "--online.pairs", "best")
    assert all(isinstance(single, Unpaired) and single.is_desirable for single in singles)
    assert [single.completion for single in singles] == ["best", "best", "a"]


def test_random_pairs_depend_on_the_seed_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [
        [(pair.chosen, pair.rejected) for pair in pairs_of(capsys, tmp_path, "--online.pairs", "random", *more)[1]]
        for more in ((), (), *(("--seed", str(seed)) for seed in range(1, 9)))
    ]
    assert drawn[0] == drawn[1]
    assert any(other != drawn[0] for other in drawn[2:])


def test_completions_that_no_pair_can_hold_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(
        tmp_path / "judged.jsonl",
        [
            {"prompt": "q", "completions": ["best", " "], "scores": [1, 0]},
            {"prompt": "q", "completions": ["same", "same "], "scores": [1, 0]},
            {"prompt": "q", "completions": ["a\x00", "b"], "scores": [1, 0]},
            JUDGED[0],
        ],
    )
    code, out, err = said(capsys, "pair", "--data", data, "--output", tmp_path / "pairs.jsonl", "--json")
    assert code == 0
    assert (json.loads(out)["rows"], json.loads(out)["left_out"]) == (1, 3)
    for place, reason in enumerate(("[D06] rejected is empty", "[D05]", "[D12]"), start=1):
        assert f"{data}:{place}: {reason}" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "--data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["sample", "--data", "bad.jsonl"], "bad.jsonl: holds no prompt that can be used"),
        (["sample", "--data", "judged.jsonl", "--limit", "0"], "--limit: must be at least 1, got 0"),
        (["sample", "--data", "judged.jsonl", "--seed", "-1"], "seed: input should be greater than or equal to 0"),
        (["sample", "--data", "judged.jsonl", "--sampling.top_p", "2"], "sampling.top_p: input should be less than"),
        (["sample", "--data", "judged.jsonl", "--device", "abacus"], "device: 'abacus' is not usable here"),
        (["sample", "--data", "judged.jsonl", "--chat_template", "no.j"], "chat_template: 'no.j' cannot be read"),
        (["sample", "--data", "judged.jsonl", "--key_from", "KEY"], "--key_from: has no effect without --url"),
        (
            ["sample", "--data", "judged.jsonl", "--url", "http://127.0.0.1:9/v1", "--dtype", "bf16"],
            "--dtype: has no effect with --url",
        ),
        (["sample", "--data", "judged.jsonl", "--output", "."], ".: is a folder"),
        (["sample", "--data", "judged.jsonl", "--output", "tied.jsonl"], "tied.jsonl: is there already, and no"),
        (
            ["sample", "--data", "judged.jsonl", "--output", "./judged.jsonl", "--overwrite"],
            "--output: is the file that --data names",
        ),
        (
            ["judge", "--data", "judged.jsonl", "--output", "judged.jsonl", "--overwrite"],
            "--output: is the file that --data names",
        ),
        (
            ["pair", "--data", "judged.jsonl", "--output", "judged.jsonl", "--overwrite"],
            "--output: is the file that --data names",
        ),
        (["judge"], "--data: is missing"),
        (["judge", "--data", "judged.jsonl", "--output", "x"], "rule, reward, implicit or server"),
        (["judge", "--data", "bad.jsonl", "--judge.name", "rule"], "judge.function: is missing"),
        (["judge", "--data", "bad.jsonl", "--judge.name", "oracle"], "judge.name: input should be 'rule', 'reward'"),
        (["judge", "--data", "bad.jsonl"], "bad.jsonl: holds no completion that can be judged"),
        (["judge", "--data", "judged.jsonl", "--device", "cpu"], "--device: has no effect"),
        (["pair", "--data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["pair", "--data", "unjudged.jsonl"], "unjudged.jsonl: holds no scores; have it judged"),
        (["pair", "--data", "tied.jsonl"], "tied.jsonl: gives no pair"),
        (["pair", "--data", "judged.jsonl", "--output", "bad.jsonl"], "bad.jsonl: is there already"),
        (["pair", "--data", "judged.jsonl", "--output", "pairs.txt"], "pairs.txt: rows are written to files that end"),
        (["pair", "--data", "judged.jsonl", "--online.accept_beta", "1"], "online.accept_beta: has no effect without"),
        (["pair", "--data", "judged.jsonl", "--online.rounds", "1"], "there is no option '--online.rounds'"),
    ],
)  # fmt: skip
def test_mistakes_end_with_two_and_a_sentence(
    words: list[str],
    told: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "judged.jsonl", JUDGED)
    write_rows(tmp_path / "tied.jsonl", JUDGED[2:])
    write_rows(tmp_path / "unjudged.jsonl", [{"prompt": "q", "completions": ["a", "b"]}])
    write_rows(tmp_path / "bad.jsonl", [{"x": 1}])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if "--output" not in words and words != ["judge"]:
        words = [*words, "--output", "out.jsonl"]
    code, _, err = said(capsys, *words, *(["--model", model_folder] if words[0] == "sample" else []))
    assert code == 2, err
    assert told in err
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert there == before


def test_an_unfinished_file_is_not_judged(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = write_rows(tmp_path / "pairs.jsonl", rows(3)), tmp_path / "judged.jsonl"
    judge(capsys, data, output, f"{rule}:cats")
    output.write_bytes(output.read_bytes().splitlines(keepends=True)[0])
    code, _, err = said(capsys, "pair", "--data", output, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert "holds 1 of 3 records; give the command that makes it again, and it goes on" in err


def test_the_question_that_a_server_is_asked_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "judge", "--show-question")
    assert code == 0
    assert all(place in out for place in ("{prompt}", "{first}", "{second}"))


def test_a_server_can_sample_and_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"q{n}"} for n in range(3)])
    samples, judged = tmp_path / "samples.jsonl", tmp_path / "judged.jsonl"
    with FakeServer(lambda request: f"{request['prompt']} {request['seed']}") as server:
        words = ("sample", "--model", "fake", "--url", server.url, "--data", data, "--output", samples)
        code, _, err = said(capsys, *words, "--sampling.completions", "2")
    assert code == 0, err
    assert all(answer.text.startswith(f"{one.prompt} ") for one in read_samples(samples) for answer in one.answers)
    with FakeServer(lambda request: "The first is better.\nA") as server:
        words = ("judge", "--data", samples, "--output", judged, "--judge.name", "server", "--judge.url", server.url)
        code, _, err = said(capsys, *words, "--judge.model", "fake")
    assert code == 0, err
    assert "3 prompts with equal scores, 0 completions without a verdict" in err  # whatever stands first wins
    assert "order disagreement 1" in err
    assert all(one.verdict and one.verdict.scores == (0.5, 0.5) for one in read_samples(judged))


@pytest.mark.parametrize("verb", ["sample", "judge", "pair"])
def test_help_loads_nothing_heavy(verb: str) -> None:
    code = (
        "import sys; from penchant.cli import main\n"
        f"try: main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(any(name in sys.modules for name in {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--output OUT" in done.stdout
