"""What is trained in the frontier's experiment: tokenizer, policy, pairs, and the runs of every method."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reviews import Review, Scorer, read_reviews

from penchant import train
from penchant.disk import write_json, write_json_lines
from penchant.models.generation import Sampling
from penchant.scoring.policy import Policy

SAMPLES = 4
"""Completions of each prefix, which make 6 pairs."""

LEARNING_RATE = 2e-4
"""Of every method alike. With 5e-4 a strong beta still lets DPO go 11 nats; with 1e-4 nobody gets far in one epoch."""

REWARD_LEARNING_RATE = 5e-4
"""Of the reward model: with 1e-4 it is right about 54% of held-out pairs after an epoch, and not about 60%."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    vocabulary: int
    hidden: int
    layers: int
    reviews: int
    """That the policy learns to write."""
    prefixes: int
    """That pairs are made of."""
    test_prefixes: int
    max_new_tokens: int
    rounds: int
    """Of PPO, each as many prefixes as it has steps of 32."""
    epochs: int
    """Over the pairs."""


FULL = Size(4096, 256, 4, 20_000, 1024, 256, 40, 24, 1)
SMOKE = Size(512, 32, 1, 400, 16, 8, 8, 1, 1)


@dataclass
class World:
    """What all runs have in common: the scorers, the first policy, and the files in `folder`."""

    folder: Path
    size: Size
    labeller: Scorer
    """Labels the pairs, and is the true reward."""
    gold: Scorer
    """Never seen in training: what the other one is fooled about shows here."""

    @property
    def start(self) -> str:
        """The policy that all runs begin with, and their reference."""
        return str(self.folder / "sft" / "model")

    @property
    def pairs(self) -> str:
        """The labelled pairs."""
        return str(self.folder / "pairs.jsonl")

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn, from the policy as it is."""
        return Sampling(max_new_tokens=self.size.max_new_tokens)

    def prefixes(self, name: str) -> list[str]:
        """The prefixes to train on, or those to test with."""
        lines = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    def reward(self, prompt: Any, completions: Sequence[str]) -> list[float]:
        """The true reward of completions: the chance that prefix and completion together are positive."""
        return self.labeller([prompt + completion for completion in completions]).tolist()


def prepare(folder: Path, size: Size) -> World:
    """Scorers, the policy that writes reviews, and labelled pairs of its completions; what is there is not redone."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = read_reviews()
    held_out, known = reviews[:4000], reviews[4000:]
    half = len(known) // 2 if size is FULL else 1000
    labeller, gold = Scorer("words").learn(known[:half]), Scorer("letters").learn(known[half : 2 * half])
    told = {"labeller": labeller.accuracy(held_out[:2000]), "gold": gold.accuracy(held_out[:2000])}
    print(f"scorers    right about held-out sentences: labeller {told['labeller']:.3f}, gold {told['gold']:.3f}")
    write_json(folder / "scorers.json", told)
    world = World(folder, size, labeller, gold)
    if not (folder / "test.jsonl").exists():
        _write_texts(world, known, held_out)
    _learn_to_write(world)
    if not (folder / "pairs.jsonl").exists():
        _make_pairs(world)
    return world


def _write_texts(world: World, known: Sequence[Review], held_out: Sequence[Review]) -> None:
    """The openings that the policy learns, cut into prefix and rest, and prefixes of other reviews."""
    rng, size = np.random.default_rng(0), world.size

    def cut(reviews: Sequence[Review], number: int) -> list[dict[str, str]]:
        openings = [review.opening for review in reviews]
        rows = []
        for words in [opening.split() for opening in openings if opening][:number]:
            place = int(rng.integers(2, min(8, len(words) - 2) + 1))
            rows.append({"prompt": " ".join(words[:place]), "completion": " " + " ".join(words[place:])})
        return rows

    write_json_lines(world.folder / "openings.jsonl", cut(known, size.reviews))
    write_json_lines(world.folder / "train.jsonl", cut(held_out[:2500], size.prefixes))
    write_json_lines(world.folder / "test.jsonl", cut(held_out[2500:], size.test_prefixes))


def _learn_to_write(world: World) -> None:
    """A small Llama, made from nothing and trained on the openings by SFT."""
    if Path(world.start, "config.json").exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size, rows = world.size, (world.folder / "openings.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, rows)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size.vocabulary,
            special_tokens=["<|end|>", "<|begin|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", bos_token="<|begin|>", pad_token="<|begin|>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.hidden // 64),
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=0,
        )
    )
    model.save_pretrained(world.folder / "untrained")
    tokenizer.save_pretrained(world.folder / "untrained")
    _finish(
        str(world.folder / "untrained"),
        str(world.folder / "openings.jsonl"),
        method="sft",
        output_dir=str(world.folder / "sft"),
        learning_rate=2e-3,
        lr_scheduler="cosine",
        batch_size=64,
        num_train_epochs=3 if size is FULL else 1,
        microbatch_tokens=4096,
        eval_size=200 if size is FULL else 20,
        logging_steps=20,
        num_samples=2,
        sample_max_new_tokens=size.max_new_tokens,
    )


def _finish(model: str, data: str, **settings: Any) -> None:
    """Trains, or ends the program where training was stopped."""
    if train(model, data, **settings).summary["status"] == "interrupted":
        raise SystemExit("stopped; the same command goes on")


def _make_pairs(world: World) -> None:
    """Completions of the training prefixes, each two of a prefix as a pair, the better one by the labeller."""
    prefixes = world.prefixes("train")
    policy = Policy.from_pretrained(world.start)
    samples = policy.sample(prefixes, world.sampling, SAMPLES, seeds=range(len(prefixes)), max_rows=256)
    rows = []
    for prefix, answers in zip(prefixes, samples, strict=True):
        scores = world.reward(prefix, [answer.text for answer in answers])
        for one, other in combinations(range(SAMPLES), 2):
            if scores[one] == scores[other] or not (answers[one].text.strip() and answers[other].text.strip()):
                continue
            better, worse = (one, other) if scores[one] > scores[other] else (other, one)
            rows.append(
                {
                    "prompt": prefix,
                    "chosen": answers[better].text,
                    "rejected": answers[worse].text,
                    "chosen_finished": answers[better].is_finished,
                    "rejected_finished": answers[worse].is_finished,
                }
            )
    print(f"pairs      {len(rows)} of {len(prefixes)} prefixes")
    write_json_lines(world.folder / "pairs.jsonl", rows)


def offline_runs() -> dict[str, dict[str, Any]]:
    """The methods over pairs, at strengths that the paper tries."""
    return {
        **{f"dpo beta {beta:g}": {"method": "dpo", "loss": {"beta": beta}} for beta in (0.05, 0.1, 1.0)},
        **{f"ipo beta {beta:g}": {"method": "ipo", "loss": {"beta": beta}} for beta in (0.1, 1.0)},
        "unlikelihood alpha 0.5": {"method": "unlikelihood", "loss": {"alpha": 0.5}},
        "preferred-ft": {"method": "sft"},
    }


def online_runs(world: World) -> dict[str, dict[str, Any]]:
    """PPO, with the reward that was learned from the pairs and with the true one."""
    rounds = {"rounds": world.size.rounds, "prompts_per_round": 128}
    ppo = {
        "method": "ppo",
        "batch_size": 32,
        "online": rounds,
        "num_train_epochs": 2,
        "sampling": {"max_new_tokens": world.size.max_new_tokens, "batch_size": 128},
    }
    return {
        f"{name} kl {weight:g}": {**ppo, "advantage": {"kl_weight": weight, "value_learning_rate": 1e-3}}
        for name in ("ppo", "ppo-gt")
        for weight in (0.05, 0.005)
    }


def train_reward_model(world: World, seed: int) -> str:
    """The reward model that PPO learns from, trained on the same pairs."""
    folder = world.folder / f"reward-{seed}"
    if not (folder / "model" / "config.json").exists():
        _finish(world.start, world.pairs, output_dir=str(folder), **reward_settings(world, seed))
    return str(folder / "model")


def reward_settings(world: World, seed: int) -> dict[str, Any]:
    """How the reward model is trained."""
    return {
        **common(world, seed),
        "method": "reward",
        "learning_rate": REWARD_LEARNING_RATE,
        "num_train_epochs": 2,
        "lr_scheduler": "linear",
        "weight_decay": 0.1,
        "eval_size": 0.1,
        "save_steps": None,
    }


def common(world: World, seed: int) -> dict[str, Any]:
    """What all runs on pairs have in common."""
    rows = len(Path(world.pairs).read_text(encoding="utf-8").splitlines())
    steps = math.ceil(rows * world.size.epochs / 64)
    return {
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "batch_size": 64,
        "num_train_epochs": world.size.epochs,
        "microbatch_tokens": 4096,
        "eval_size": 0,
        "num_samples": 0,
        "save_steps": max(1, steps // 4),
        "keep_checkpoints": 10**6,
        "seed": seed,
    }
