"""Files for other evaluation tools: AlpacaEval's model outputs, and a task for the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from penchant.data.chat import render
from penchant.disk import make_folder, write_json, write_json_lines, write_text
from penchant.examples import Answer, Pair, Text, plain_text


def write_alpaca_eval(
    path: Path, prompts: Sequence[Text], answers: Sequence[Answer], generator: str, dataset: str
) -> None:
    """Writes AlpacaEval's file of model outputs: `alpaca_eval --model_outputs FILE` judges them.

    It is a list of `{instruction, output, generator, dataset}`. An instruction is a prompt as `readable` tells it.
    """
    records = [
        {"instruction": plain_text(prompt), "output": answer.text, "generator": generator, "dataset": dataset}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    write_json(path, records)


def write_lm_eval_task(folder: Path, name: str, pairs: Sequence[Pair], tokenizer: Any) -> None:
    """Writes a task of pairs: `lm_eval --include_path FOLDER --tasks NAME` says how often chosen is the likelier one.

    Likelihood alone, without a reference: `acc` by the sum over the completion's tokens, `acc_norm` by the sum per
    character; white space at the end of a prompt counts as part of both completions. Messages are written as the
    model's chat template renders them, so `--apply_chat_template` must not be given; plain text stands as it is and has
    no end token. The task names its data by an absolute path, for that is how the harness finds them: a folder that was
    moved has to be written again.
    """
    make_folder(folder)
    data = folder.absolute() / f"{name}.jsonl"
    write_json_lines(data, (_as_choices(pair, tokenizer) for pair in pairs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    write_text(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False, allow_unicode=True))


def _as_choices(pair: Pair, tokenizer: Any) -> dict[str, Any]:
    """A row of the task. Which place chosen has alternates with the content, for ties go to the first one."""
    prompt, (chosen, rejected) = render(tokenizer, pair.prompt, pair.completions)
    is_second = chosen > rejected
    return {
        "prompt": prompt,
        "choices": [rejected, chosen] if is_second else [chosen, rejected],
        "label": int(is_second),
    }
