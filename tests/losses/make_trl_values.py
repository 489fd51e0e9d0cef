"""Makes trl_values.json: what the trainers of TRL 1.16.0 give as the loss of the inputs of values.json.

    pip install trl==1.16.0
    python tests/losses/make_trl_values.py

TRL's own code runs, on stand-ins for a model that answer with prepared log-probabilities; only the trainers'
constructors, which want real models and data, are left out. float64, but for the rows that say float32.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

FOLDER = Path(__file__).parent
PATH = FOLDER / "trl_values.json"
INPUTS = json.loads((FOLDER / "values.json").read_text())["inputs"]
FAR = {
    "chosen_lengths": [10, 10],
    "rejected_lengths": [10, 10],
    "policy_chosen": [-1100.0, -100.0],
    "ref_chosen": [-100.0, -100.0],
    "policy_rejected": [-100.0, -100.0],
    "ref_rejected": [-1100.0, -100.0],
}
"""The first pair has h = -2000."""
KL_LOG_RATIOS = {
    "above": [6.0, -2.5, 11.0, 0.5, 3.0, -1.0, 2.0, 1.0],
    "below": [-6.0, 2.5, -1.0, 0.5, -3.0, 1.0, 0, 1.0],
}
"""Log-ratios of mismatched completions whose mean is above or below 0."""


class Model(torch.nn.Module):
    """Answers with what was prepared for the first token id of its input."""

    is_gradient_checkpointing = False

    def __init__(self, **answers: SimpleNamespace) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return self.answers["main" if input_ids[0, 0] == 1 else "kl"]


def trainer_of(kind: type, **settings: Any) -> Any:
    """A trainer on one process, past its constructor."""
    trainer = object.__new__(kind)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda values: values, gather_for_metrics=lambda values: values
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None, **settings.pop("args", {}))
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.aux_loss_enabled = trainer.precompute_ref_logps = trainer.is_encoder_decoder = False
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def answer(logps: Tensor, collisions: Tensor | None = None) -> SimpleNamespace:
    """What TRL's fused head returns."""
    return SimpleNamespace(
        log_probs=logps,
        log_sum_sq_probs=collisions,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
    )


def token_rows(
    batch: dict, column: str, sides: tuple[str, ...], dtype: torch.dtype, even: bool = False
) -> list[Tensor]:
    """Log-probabilities token by token; where the inputs have sums only, all at the first token or all alike."""
    rows = []
    for side in sides:
        tokens = batch.get(f"{column}_{side}_tokens")
        for n, length in enumerate(batch[f"{side}_lengths"]):
            row = torch.zeros(length, dtype=dtype)
            if tokens is not None:
                row[:] = torch.tensor(tokens[n], dtype=dtype)
            elif even:
                row[:] = batch[f"{column}_{side}"][n] / length
            else:
                row[0] = batch[f"{column}_{side}"][n]
            rows.append(row)
    return rows


def dpo_loss(batch: dict, loss_type: Any = "sigmoid", dtype: torch.dtype = torch.float64, **given: Any) -> dict:
    """`DPOTrainer._compute_loss`, and the rewards that it logs; prompts are of two tokens."""
    sides = ("chosen", "rejected")
    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_weights": [1.0],
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "args": {"discopop_tau": given.pop("discopop_tau", 0.05)},
    } | given
    loss_types = loss_type if isinstance(loss_type, list) else [loss_type]

    def behind_the_prompt(rows: list[Tensor]) -> Tensor:
        return pad_sequence([torch.cat([torch.zeros(1, dtype=row.dtype), row]) for row in rows], batch_first=True)

    policy, ref = (behind_the_prompt(token_rows(batch, model, sides, dtype)) for model in ("policy", "ref"))
    collisions = None
    if "chosen_log_collisions" in batch:
        rows = [torch.tensor(row, dtype=dtype) for side in sides for row in batch[f"{side}_log_collisions"]]
        collisions = behind_the_prompt(rows)
    lengths = torch.tensor([length for side in sides for length in batch[f"{side}_lengths"]])
    places = torch.arange(policy.shape[1] + 1)
    mask = ((places >= 2) & (places < 2 + lengths[:, None])).long()
    model = Model(main=answer(policy, collisions))
    trainer = trainer_of(DPOTrainer, model=model, ref_model=Model(main=answer(ref)), loss_types=loss_types, **settings)
    ids = torch.ones_like(mask)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}
    loss = trainer._compute_loss(model, inputs, return_outputs=False).item()
    logged = {name: trainer._metrics["train"][f"rewards/{name}"][0] for name in (*sides, "accuracies")}
    return {"loss": loss if math.isfinite(loss) else None, "logged": logged}


def with_logits(batch: dict) -> tuple[Model, dict[str, Tensor]]:
    """A model over two tokens whose logits give token 1 the prepared log-probabilities, prompt and all."""
    sides = ("chosen", "rejected")
    prompts = token_rows(batch, "policy", ("prompt",), torch.float64, even=True)
    rows = [
        torch.cat([prompt, row])
        for prompt, row in zip(prompts * 2, token_rows(batch, "policy", sides, torch.float64, even=True), strict=True)
    ]
    logps = pad_sequence([torch.cat([row, row[:1]]) for row in rows], batch_first=True, padding_value=-1.0)
    logits = torch.stack([torch.log(-torch.expm1(logps)), logps], dim=-1)
    inputs = {}
    for side in sides:
        num_prompt = torch.tensor(batch["prompt_lengths"])[:, None] + 1  # nothing predicts the first token
        num = num_prompt + torch.tensor(batch[f"{side}_lengths"])[:, None]
        places = torch.arange(int(num.max()))
        inputs[f"{side}_input_ids"] = torch.ones(len(num), len(places), dtype=torch.long)
        inputs[f"{side}_attention_mask"] = (places < num).long()
        inputs[f"{side}_labels"] = torch.where((places >= num_prompt) & (places < num), 1, -100)

    class LogitModel(Model):
        def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=logits[:, : input_ids.shape[1]])

    return LogitModel(), inputs


def cpo_loss(batch: dict, **settings: Any) -> dict:
    """`CPOTrainer.get_batch_loss_metrics`."""
    defaults = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0}
    model, inputs = with_logits(batch)
    trainer = trainer_of(CPOTrainer, pad_token_id=0, label_smoothing=0.0, **(defaults | settings))
    return {"loss": trainer.get_batch_loss_metrics(model, inputs)[0].item()}


def orpo_loss(batch: dict, beta: float) -> dict:
    """`ORPOTrainer.get_batch_loss_metrics`."""
    model, inputs = with_logits(batch)
    return {"loss": trainer_of(ORPOTrainer, padding_value=0, beta=beta).get_batch_loss_metrics(model, inputs)[0].item()}


def kto_loss(batch: dict, loss_type: str, kl: str | None = None, **settings: Any) -> dict:
    """`KTOTrainer._compute_loss`; every completion is one token."""

    def one_token(values: list[float]) -> SimpleNamespace:
        return answer(torch.tensor(values, dtype=torch.float64)[:, None])

    num = len(batch["policy"])
    policy = Model(main=one_token(batch["policy"]), kl=one_token(KL_LOG_RATIOS[kl or "above"]))
    ref = Model(main=one_token(batch["ref"]), kl=one_token([0.0] * num))
    ids, mask = torch.ones(num, 2, dtype=torch.long), torch.tensor([[0, 1]] * num)
    inputs = {"label": torch.tensor(batch["is_desirable"])}
    inputs |= {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}
    inputs |= {"KL_input_ids": ids + 1, "KL_attention_mask": ids, "KL_completion_mask": mask}
    trainer = trainer_of(
        KTOTrainer, model=policy, ref_model=ref, loss_type=loss_type, calculate_KL=kl is not None, **settings
    )
    loss = trainer._compute_loss(policy, inputs, return_outputs=False).item()
    return {"loss": loss, "kl": trainer._metrics["train"]["kl"][0]}


def first_pairs(batch: dict, number: int) -> dict:
    """The pairs at the beginning of a batch."""
    return {name: column[:number] for name, column in batch.items()}


def make_values() -> dict[str, dict]:
    """Rows by name."""
    values = {}
    for inputs in ("pairs", "token pairs"):
        batch = INPUTS[inputs]
        rows = {
            "sigmoid 0.1": {},
            "sigmoid 0.5": {"beta": 0.5},
            "sigmoid 0.1, label_smoothing 0.2": {"label_smoothing": 0.2},
            "hinge 0.05": {"loss_type": "hinge", "beta": 0.05},
            "ipo 0.1": {"loss_type": "ipo"},
            "exo_pair 0.1, label_smoothing 0.001": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
            "nca_pair 0.1": {"loss_type": "nca_pair"},
            "robust 0.1, label_smoothing 0.1": {"loss_type": "robust", "label_smoothing": 0.1},
            "bco_pair 0.1": {"loss_type": "bco_pair"},
            "sppo_hard 0.001": {"loss_type": "sppo_hard", "beta": 0.001},
            "sppo_hard 0.05": {"loss_type": "sppo_hard", "beta": 0.05},
            "aot 0.1": {"loss_type": "aot"},
            "aot 0.1, label_smoothing 0.2": {"loss_type": "aot", "label_smoothing": 0.2},
            "aot_unpaired 0.1, label_smoothing 0.2": {"loss_type": "aot_unpaired", "label_smoothing": 0.2},
            "apo_zero 0.1": {"loss_type": "apo_zero"},
            "apo_down 0.1": {"loss_type": "apo_down"},
            "discopop 0.05, tau 0.05": {"loss_type": "discopop", "beta": 0.05},
            "discopop 0.1, tau 0.5": {"loss_type": "discopop", "discopop_tau": 0.5},
            "sft": {"loss_type": "sft"},
            "sigmoid_norm 5": {"loss_type": "sigmoid_norm", "beta": 5.0},
            "sigmoid 0.1 + 0.2 sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            "forward_kl 0.1": {"f_divergence_type": "forward_kl"},
            "js_divergence 0.1": {"f_divergence_type": "js_divergence"},
            "alpha_divergence 0.1, coef 0.3, float32": {
                "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "dtype": torch.float32
            },
        }  # fmt: skip
        if inputs == "token pairs":
            rows["use_weighting 0.1"] = {"use_weighting": True}
            rows["ld_alpha 0.3, 0.1"] = {"ld_alpha": 0.3}
        values |= {f"dpo: {name}: {inputs}": dpo_loss(batch, **row) for name, row in rows.items()}
    for name, row in {
        "sigmoid 0.1": {},
        "discopop 0.05, tau 0.05": {"loss_type": "discopop", "beta": 0.05},
        "forward_kl 0.1": {"f_divergence_type": "forward_kl"},
    }.items():
        values[f"dpo: {name}: far pairs, float32"] = dpo_loss(FAR, dtype=torch.float32, **row)
    for number in (1, 8):
        batch = first_pairs(INPUTS["pairs"], number)
        rows = {
            "sigmoid 0.1, cpo_alpha 1": {},
            "sigmoid 0.02, cpo_alpha 0": {"beta": 0.02, "cpo_alpha": 0.0},
            "hinge 0.05, cpo_alpha 0": {"loss_type": "hinge", "beta": 0.05, "cpo_alpha": 0.0},
            "simpo 2, gamma 1, cpo_alpha 0": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
            "simpo 2, gamma 1, cpo_alpha 1": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
        }
        values |= {f"cpo: {name}: first {number}": cpo_loss(batch, **row) for name, row in rows.items()}
        values[f"orpo: 0.1: first {number}"] = orpo_loss(batch, beta=0.1)
    batch = INPUTS["sequences"]
    for kl in KL_LOG_RATIOS:
        values[f"kto: 0.1, 1, 1: kl {kl}"] = kto_loss(
            batch, "kto", kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
        )
        values[f"kto: 0.5, 1.33, 0.4: kl {kl}"] = kto_loss(
            batch, "kto", kl, beta=0.5, desirable_weight=1.33, undesirable_weight=0.4
        )
    values["kto: apo_zero_unpaired 0.1"] = kto_loss(
        batch, "apo_zero_unpaired", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
    )
    return values


def as_json(values: dict[str, dict]) -> str:
    """One row a line."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in values.items())
    return f'{{"trl": "{trl.__version__}", "far pairs": {json.dumps(FAR)}, "rows": {{\n{rows}}}}}\n'


if __name__ == "__main__":
    PATH.write_text(as_json(make_values()))
