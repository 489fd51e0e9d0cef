"""Writes the logs of two TRL runs with a trouble in them: trl/NAME/trainer_state.json beside this file.

    python tests/doctor/make_trl_log.py          # needs trl 1.16.0, which Penchant itself does not

`rate_too_low`: DPO at a learning rate of 1e-9. `swapped`: the held-out rows have chosen and rejected swapped. The pairs
are of words of two kinds (chosen has more of the first), the model is tiny.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "trl"
WORDS = [f"w{i}" for i in range(40)]
RUNS: dict[str, dict[str, Any]] = {"rate_too_low": {"learning_rate": 1e-9}, "swapped": {"learning_rate": 2e-3}}


def rows(number: int, seed: int) -> list[dict[str, str]]:
    """Pairs: chosen has words from the first half of the list, rejected from the second."""
    drawn = random.Random(seed)

    def words(of: list[str]) -> str:
        return " " + " ".join(drawn.choices(of, k=6))

    return [
        {"prompt": " ".join(drawn.choices(WORDS, k=3)), "chosen": words(WORDS[:25]), "rejected": words(WORDS[15:])}
        for _ in range(number)
    ]


def train(name: str, folder: Path) -> None:
    """Trains one of the runs with TRL; its folder then holds trainer_state.json."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *WORDS])}, "<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    heldout = rows(64, 1)
    if name == "swapped":
        heldout = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in heldout]
    settings = DPOConfig(
        output_dir=str(folder),
        beta=0.1,
        per_device_train_batch_size=16,
        max_steps=40,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=40,
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=0,
        **RUNS[name],
    )
    for part in (LlamaForCausalLM(config), tokenizer):  # the reference is loaded from there a second time
        part.save_pretrained(folder / "start")
    trainer = DPOTrainer(
        model=str(folder / "start"),
        args=settings,
        train_dataset=Dataset.from_list(rows(640, 0)),
        eval_dataset=Dataset.from_list(heldout),
        processing_class=tokenizer,
    )
    trainer.train()


def main() -> None:
    """Writes both logs, without what changes from run to run (times, speeds)."""
    for name in RUNS:
        with tempfile.TemporaryDirectory() as place:
            train(name, Path(place))
            (state,) = Path(place).glob("checkpoint-*/trainer_state.json")
            kept = json.loads(state.read_text(encoding="utf-8"))
        for entry in kept["log_history"]:
            for key in [key for key in entry if "runtime" in key or "per_second" in key or key == "step_time"]:
                del entry[key]
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        (FOLDER / name).mkdir(parents=True)
        (FOLDER / name / "trainer_state.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
