"""The same run on a CUDA device: it learns, its numbers are the CPU's, the offloaded reference travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .test_run import metrics_of, ranked_rows, single_rows, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "kto", "data": single_rows()},
        {"method": "kto", "data": single_rows(), "lora": {"rank": 4}},
        {"method": "pl-dpo", "data": ranked_rows(), "eval_data": ranked_rows(4, 1)},
        {"method": "wpo", "reference": {"kind": "copy"}},
        {"method": "aot", "microbatch_tokens": 40},
        {"loss": {"dpo": {}, "orpo": {"nll_on_prompt": True}}},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_float32_losses_on_the_gpu_are_those_of_the_cpu(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    whole = {"max_steps": 6, **settings}
    on_cpu, _ = metrics_of(train(model_folder, tmp_path / "cpu", device="cpu", **whole).run_dir)
    on_gpu, _ = metrics_of(train(model_folder, tmp_path / "gpu", device="cuda", dtype="float32", **whole).run_dir)
    assert [r["loss"] for r in on_gpu] == pytest.approx([r["loss"] for r in on_cpu], abs=1e-3)


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_bf16_with_an_offloaded_reference_learns(layout: str, model_folder: Path, tmp_path: Path) -> None:
    settings = {"device": "cuda", "dtype": "bf16", "layout": layout, "reference": {"kind": "copy", "offload": True}}
    result = train(model_folder, tmp_path, **settings)
    trained, evaluated = metrics_of(result.run_dir)
    assert trained[0]["loss"] == pytest.approx(0.6931, abs=2e-2)
    assert evaluated[-1]["eval_rewards/accuracies"] == 1.0
    assert result.summary["dtype"] == "bf16"
