"""One side of `against_trl.py` at work, in a process of its own: Penchant, TRL, or the bare matrix products.

Both train the same model folder on the same rows with the same AdamW and note the same moments of their work. Penchant
is what `penchant train` runs (`penchant.training.run.execute`), with its defaults but for what both must have in
common; the log that it writes to listens. TRL is its `DPOTrainer`, with the settings that make it fastest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LEARNING_RATE, BETA, MAX_GRAD_NORM, SEED = 1e-6, 0.1, 1.0, 0


@dataclass(frozen=True)
class Job:
    """What a process has to do. `pairs` is a .jsonl file of prompt, chosen and rejected as plain text."""

    side: str
    """`penchant`, `trl` or `products`."""
    model: str
    pairs: str
    device: str
    precision: str
    """`float32` or `bf16`, which is autocast over float32 weights on both sides."""
    threads: int
    max_length: int
    batch_size: int
    epochs: int = 1
    max_steps: int | None = None
    microbatch: int = 1
    """Pairs that TRL computes at once; Penchant goes by its own default, a number of tokens."""
    in_order: bool = False
    """Whether TRL takes the rows in the order in which Penchant draws them, so that the losses can be compared."""
    trl: dict[str, Any] = field(default_factory=dict)
    """Further settings of TRL's `DPOConfig`."""


@dataclass
class Notes:
    """What a side notes of its work; times are seconds since its process was started."""

    reference_s: float = 0.0
    """How long the pass of the reference over the pairs took."""
    training_at: float = 0.0
    step_at: list[float] = field(default_factory=list)
    """When each step was done."""
    losses: list[float] = field(default_factory=list)
    setup_peak_bytes: int = 0
    """Most memory held until training began."""
    peak_bytes: int = 0

    @property
    def first_step_s(self) -> float:
        """From the start of the process until the first step was done, the reference's pass left out."""
        return self.step_at[0] - self.reference_s

    @property
    def setup_s(self) -> float:
        """From the start of the process until training began, the reference's pass left out."""
        return self.training_at - self.reference_s

    def training_s(self, steps: int | None = None) -> float:
        """How long the first `steps` steps took, or all of them."""
        return self.step_at[-1 if steps is None else steps - 1] - self.training_at


def measure(job: Job) -> dict[str, Any]:
    """Does a job in a process of its own and returns what it noted.

    Raises:
        SystemExit: the process failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="against-trl-") as scratch:
        # No cache survives its process: numbers of the reference that are found would not be measured.
        caches = {"HF_HOME": f"{scratch}/hf", "PENCHANT_CACHE": f"{scratch}/penchant"}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        environment = {**os.environ, **caches, **quiet, **one_gpu, "OMP_NUM_THREADS": str(job.threads)}
        order = json.dumps({"job": asdict(job), "scratch": scratch, "started": time.monotonic()})
        done = subprocess.run([sys.executable, __file__, order], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{job.side} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(scratch, "result.json").read_text(encoding="utf-8"))


def penchant_notes(job: Job, scratch: Path, clock: Clock) -> Notes:
    """Trains with Penchant."""
    from penchant.config import config_from
    from penchant.training.logger import Meter, RunLog
    from penchant.training.run import execute

    class Listener(RunLog):
        """A run's log that notes when things are said."""

        @contextmanager
        def progress(self, label: str, total: int, stays: bool = False) -> Iterator[Meter]:
            began = clock.now()
            if label == "training":
                clock.begin_training()
            with super().progress(label, total, stays) as meter:
                yield meter
            if label == "reference":
                clock.notes.reference_s += clock.now() - began

        def metrics(self, record: dict[str, Any]) -> None:
            clock.end_step(record["loss"])
            clock.notes.peak_bytes = clock.peak_bytes()
            super().metrics(record)

    settings = {
        "model": job.model,
        "data": job.pairs,
        "eval_size": 0,
        "num_samples": 0,
        "output_dir": str(scratch / "run"),
        "loss": {"beta": BETA},
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": SEED,
        "batch_size": job.batch_size,
        "num_train_epochs": job.epochs,
        "max_steps": job.max_steps,
        "max_length": job.max_length,
        "device": job.device,
        "dtype": job.precision,
        "save_minutes": 10.0**6,
    }
    execute(config_from(settings), log=Listener(quiet=True))
    return clock.notes


def trl_notes(job: Job, scratch: Path, clock: Clock) -> Notes:
    """Trains with TRL.

    It groups rows of like length, scores the reference once and before training, keeps all activations, and its head
    builds no logits (there it has no choice). Its rows come sorted by length, so that the reference's pass fills up
    little as well. Padding-free batches it does not have in this version. Everything else is its default.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Listener(TrainerCallback):
        """Notes when things happen."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin_training()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.notes.peak_bytes = clock.peak_bytes()

    class Trainer(DPOTrainer):
        """TRL's trainer, with the lengths that it can group rows by, and with its reference's pass noted."""

        def _prepare_dataset(self, *arguments: Any) -> Any:
            dataset = super()._prepare_dataset(*arguments)
            if job.in_order:
                return dataset
            columns = zip(dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
            lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in columns]
            return dataset.add_column("length", lengths).sort("length", reverse=True)

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            began = clock.now()
            dataset = super()._precompute_ref_logps(*arguments)
            clock.notes.reference_s += clock.now() - began
            return dataset

    config = DPOConfig(
        output_dir=str(scratch / "run"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        seed=SEED,
        per_device_train_batch_size=job.microbatch,
        gradient_accumulation_steps=job.batch_size // job.microbatch,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        max_length=job.max_length,
        precompute_ref_log_probs=True,
        **{
            "precompute_ref_batch_size": 2 * job.microbatch,
            "train_sampling_strategy": "sequential" if job.in_order else "group_by_length",
            "remove_unused_columns": False,  # the lengths are no argument of the model, and would go
            "gradient_checkpointing": False,
            "bf16": job.precision == "bf16",
            "use_cpu": job.device == "cpu",
            "dataloader_pin_memory": job.device != "cpu",
            "logging_steps": 1 if job.in_order else 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **job.trl,
        },
    )
    rows = [json.loads(line) for line in Path(job.pairs).read_text(encoding="utf-8").splitlines()]
    if job.in_order:
        from penchant.data.loader import epoch_order

        rows = [rows[place] for place in epoch_order(len(rows), SEED, epoch=0)]
    trainer = Trainer(model=job.model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Listener()])
    trainer.train()
    clock.notes.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.notes


class Clock:
    """Takes the notes of a side, after the device has done its work."""

    def __init__(self, started: float, device: str) -> None:
        self.notes = Notes()
        self._started, self._device = started, device

    def now(self) -> float:
        """Seconds since the process was started."""
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()
        return time.monotonic() - self._started

    def begin_training(self) -> None:
        """The first step is next."""
        self.notes.training_at = self.now()
        self.notes.setup_peak_bytes = self.peak_bytes()

    def end_step(self, *losses: float) -> None:
        """A step is done; its loss, if it is known by now."""
        self.notes.step_at.append(self.now())
        self.notes.losses += losses

    def peak_bytes(self) -> int:
        """Most memory held so far: on the device, or resident on the host."""
        import torch

        from penchant.training.hardware import peak_memory_bytes

        return peak_memory_bytes(torch.device(self._device))


def main() -> None:
    """Does the job on the command line and writes what was noted to `result.json` in its scratch folder."""
    order = json.loads(sys.argv[1])
    job, scratch = Job(**order["job"]), Path(order["scratch"])
    import torch

    torch.set_num_threads(job.threads)
    if job.side == "products":
        from against_trl_flops import measure_products

        result = measure_products(job)
    else:
        take_notes = penchant_notes if job.side == "penchant" else trl_notes
        result = asdict(take_notes(job, scratch, Clock(order["started"], job.device)))
    (scratch / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
