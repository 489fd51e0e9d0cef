"""A process that judges, to be struck: `python -m tests.faults.judging URL CACHE VERDICTS QUESTIONS`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from penchant import stopping
from penchant.online.client import ChatClient
from penchant.online.judges import Question
from penchant.online.language_judge import LanguageJudge, question_text

PARALLEL = 4
_ROOT = Path(__file__).parents[2]


def questions(number: int) -> list[Question]:
    """Questions about two completions of different length."""
    return [Question(f"Say {n}.", (f"{n}" * (1 + n % 3), f"{n} or so")) for n in range(number)]


def begin(url: str, cache: Path, verdicts: Path, number: int) -> subprocess.Popen[str]:
    """A process that is just about to ask its first question."""
    words = [sys.executable, "-m", "tests.faults.judging", url, str(cache), str(verdicts), str(number)]
    process = subprocess.Popen(words, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def main(url: str, cache: str, verdicts: str, number: str) -> int:
    """Judges, and writes the verdicts; 128 and the number of the signal where one has stopped it."""
    with stopping.listening():
        client = ChatClient(url, "fake", parallel=PARALLEL, cache=Path(cache))
        judge = LanguageJudge(client, question_text(None))
        import openai  # noqa: F401  (its loading is no part of the judging)

        print("ready", flush=True)
        try:
            judged = judge.judge(questions(int(number)))
        except stopping.StopRequested as stop:
            return 128 + stop.signum
    Path(verdicts).write_text(json.dumps([verdict.wins for verdict in judged]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
