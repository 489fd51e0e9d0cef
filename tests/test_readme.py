"""What the README shows runs, word for word."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import penchant

from .conftest import make_tiny_model
from .training.test_run import rows

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_with(words: str) -> str:
    (block,) = [block for block in BLOCKS if words in block]
    return block


def test_the_token_tensor_snippet_trains() -> None:
    model = make_tiny_model()
    start = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "model": model,
        "ref_model": copy.deepcopy(model),
        "prompt_ids": torch.randint(3, 320, (4, 5)),
        "chosen_ids": torch.randint(3, 320, (4, 6)),
        "rejected_ids": torch.randint(3, 320, (4, 3)),
    }
    code = block_with("train_step")
    assert "DPO(model=model, ref_model=ref_model, beta=0.1, learning_rate=1e-4, max_grad_norm=1.0)" in code
    exec(code, names)
    assert names["metrics"]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert names["metrics"]["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert any(not torch.equal(start[name], value) for name, value in model.state_dict().items())
    exec(code.replace("from penchant", "pass  # from penchant").replace("trainer = ", "_ = "), names)
    assert names["metrics"]["loss"] < 0.693147


def test_the_three_lines_of_text_equation_and_run(model_folder: Path, tmp_path: Path) -> None:
    lines = block_with("policy.log_prob(prompts, completions)").splitlines()
    policy = penchant.Policy.from_pretrained(str(model_folder))
    values = eval(
        lines[0].split("#")[0], {"policy": policy, "prompts": ["the cat", "a dog"], "completions": ["sat", "ran on"]}
    )
    assert values.shape == (2,)
    assert values.requires_grad
    logps = penchant.types.PairLogps(
        policy_chosen_logps=torch.tensor([-1.0]),
        policy_rejected_logps=torch.tensor([-4.0]),
        ref_chosen_logps=torch.tensor([-2.0]),
        ref_rejected_logps=torch.tensor([-3.0]),
        chosen_lengths=torch.tensor([3]),
        rejected_lengths=torch.tensor([5]),
    )
    losses = eval(lines[1].split("#")[0], {"penchant": penchant, "logps": logps})
    assert losses.item() == pytest.approx(0.598139)  # log(1 + exp(-0.1 * 2))

    call = lines[2].split("#")[0]
    assert call.strip() == "penchant.train(model=..., data=..., loss=...)"
    for argument in ("policy", "data", "loss"):
        call = call.replace("...", argument, 1)
    call = call.replace(")", f", output_dir={str(tmp_path / 'run')!r}, max_steps=1, num_samples=0, quiet=True)")
    result = eval(call, {"penchant": penchant, "policy": policy, "data": rows(), "loss": penchant.losses.IPOLoss()})
    assert result.summary["status"] == "finished"
    assert result.summary["loss"]["name"] == "ipo"


def test_dpo_by_hand_from_log_prob_is_the_loss_of_the_library(model_folder: Path) -> None:
    prompts, chosen, rejected = ["the cat", "a dog"], ["sat on the mat", "ran"], ["ran under a tree", "yes no"]
    names: dict[str, Any] = {"model": str(model_folder), "prompts": prompts, "chosen": chosen, "rejected": rejected}
    exec(block_with("ref_margin"), names)
    assert names["loss"].item() == pytest.approx(0.693147, abs=1e-5)
    gradient = names["policy"].model.lm_head.weight.grad.clone()

    policy, ref_policy = names["policy"], names["ref_policy"]
    policy.model.zero_grad()
    with torch.no_grad():
        ref_chosen, ref_rejected = ref_policy.log_prob(prompts, chosen), ref_policy.log_prob(prompts, rejected)
    logps = penchant.types.PairLogps(
        policy.log_prob(prompts, chosen), policy.log_prob(prompts, rejected), ref_chosen, ref_rejected,
        torch.tensor([1, 1]), torch.tensor([1, 1]),
    )  # fmt: skip
    penchant.losses.DPOLoss(beta=0.1)(logps).mean().backward()
    torch.testing.assert_close(policy.model.lm_head.weight.grad, gradient)


def test_the_run_file_in_the_readme_is_valid() -> None:
    import yaml

    from penchant.config import config_from

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    config = config_from(yaml.safe_load(text))
    assert config.lora.rank == 16


def test_files_that_the_readme_names_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
