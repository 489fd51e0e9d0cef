"""Tiny runs with a fault in each, and without: what `planted_faults.py` measures the watch on.

Every run is a real one, trained by `penchant.train` in a second or two: a tiny model, preferences between its own
completions by a known reward (each word has a value, a completion the mean of its words), or a rule that judges by the
same values. A fault is a change of settings, of rows, of the rule or of the loss. Clean runs, of every
method, are counted against every detector.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant import train
from penchant.losses import DPOLoss, Loss
from penchant.scoring.policy import Policy
from penchant.types import PairLogps

Row = dict[str, Any]

NUM_WORDS, WORDS_A_PROMPT, LONGEST = 60, 3, 12
ROOM = 16
"""Most words of a sampled answer; those in the rows are shorter than LONGEST."""
PAD, START, END = 0, 1, 2
MOST_ROWS = 800
BETA = 0.5
"""Answers are short here: a nat counts for more than in a paragraph."""
COMMON: dict[str, Any] = {
    "batch_size": 16,
    "max_steps": 40,
    "learning_rate": 5e-4,
    "num_samples": 0,
    "eval_steps": 10,
    "layout": "padded",
    "device": "cpu",
    "dtype": "float32",
    "data_cache": "none",
    "quiet": True,
}
ONLINE: dict[str, Any] = {
    "max_steps": 30,
    "batch_size": 16,
    "learning_rate": 3e-4,
    "sampling": {"max_new_tokens": ROOM, "completions": 4},
    "online": {"prompts_per_round": 16, "rounds": 30},
}


class World:
    """A seed's world: a tiny language model, what each word is worth, and answers that the model itself would give."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.values = self.rng.normal(size=NUM_WORDS)
        self.model = self.policy()
        self.rows = self.pairs(self.model, MOST_ROWS)

    def policy(self) -> Policy:
        """A model with random weights, peaked enough to know its own words, that ends after some five of them."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        words = {"<pad>": PAD, "<s>": START, "</s>": END, **{f"w{i}": 3 + i for i in range(NUM_WORDS)}}
        bare = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
        )
        torch.manual_seed(self.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=3 + NUM_WORDS,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=PAD,
                max_position_embeddings=64,
            )
        )
        with torch.no_grad():
            model.lm_head.weight *= 2.0  # peaked: a word costs some 2.5 nats
            # One dimension says nothing but that an answer may end.
            model.model.embed_tokens.weight[:, 0] = 1.0
            for layer in model.model.layers:
                for adds in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    adds.weight *= 0.3
                    adds.weight[0] = 0.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[:3] = 0.0
            hidden = model.model(input_ids=torch.randint(3, 3 + NUM_WORDS, (64, 8))).last_hidden_state
            words = (hidden @ model.lm_head.weight[3:].T).logsumexp(-1)
            model.lm_head.weight[END, 0] = (words.mean() + np.log(1 / 4)) / hidden[..., 0].mean()
            model.lm_head.weight[[PAD, START], 0] = -model.lm_head.weight[END, 0]
        return Policy(model, tokenizer, "float32")

    def score(self, text: str) -> float:
        """What a text is worth: the mean value of its words."""
        ids = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
        return float(self.values[ids].mean()) if ids else -3.0

    def prompts(self, number: int) -> list[str]:
        """Prompts, each another one."""
        drawn = self.rng.integers(0, NUM_WORDS, size=(number, WORDS_A_PROMPT))
        return [" ".join(f"w{i}" for i in row) for row in drawn]

    @torch.no_grad()
    def answers(self, policy: Policy, prompts: Sequence[str]) -> list[str]:
        """An answer to each prompt, drawn from the model word by word; lengths are drawn apart, 4 to LONGEST - 2."""
        ids = torch.tensor([[3 + int(word[1:]) for word in prompt.split()] for prompt in prompts])
        lengths = self.rng.integers(4, LONGEST - 1, size=len(prompts))
        generator = torch.Generator().manual_seed(int(self.rng.integers(2**31)))
        start = ids.shape[1]
        for _ in range(LONGEST - 2):
            logits = policy.model(input_ids=ids).logits[:, -1]
            logits[:, :3] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        return [
            " ".join(f"w{i - 3}" for i in row[start : start + length].tolist())
            for row, length in zip(ids, lengths, strict=True)
        ]

    def pairs(self, policy: Policy, number: int) -> list[Row]:
        """Pairs of the model's own answers, the better one chosen."""
        prompts = self.prompts(number)
        first, second = (self.answers(policy, prompts) for _ in range(2))
        rows = []
        for prompt, one, other in zip(prompts, first, second, strict=True):
            better, worse = (one, other) if self.score(one) > self.score(other) else (other, one)
            if better != worse:
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
        return rows


@dataclass(frozen=True)
class Case:
    """A kind of run: its settings, what is done to rows, which rule judges, and which loss of its own it has."""

    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[list[Row], World, Policy], list[Row]] = lambda rows, world, policy: rows
    """What becomes of the training rows."""
    change_heldout: Callable[[list[Row], World, Policy], list[Row]] = lambda rows, world, policy: rows
    rule: Callable[[World], Callable[..., list[float]]] | None = None
    """Of runs that sample: the rule that judges."""
    loss: Callable[[], Loss] | None = None
    num_rows: int = 640
    num_heldout: int = 96


def by_value(world: World) -> Callable[[str, list[str]], list[float]]:
    """The sound rule: what the different words are worth; words beyond the sixth cost a little, and so does no end."""

    def score(text: str) -> float:
        words = text.split()
        length = len(words)
        return world.score(" ".join(sorted(set(words)))) - 0.2 * max(0, length - 6) - 2.0 * (length >= ROOM)

    return lambda prompt, completions: [score(text) for text in completions]


def by_foreseeable_value(world: World) -> Callable[[str, list[str]], list[float]]:
    """What all words are worth, in larger units: a value head can see it coming word by word."""
    return lambda prompt, completions: [3.0 * world.score(text) for text in completions]


def by_length(world: World) -> Callable[[str, list[str]], list[float]]:
    return lambda prompt, completions: [float(len(text.split())) for text in completions]


def by_one_word(world: World) -> Callable[[str, list[str]], list[float]]:
    """A rule that pays for one word, as often as it stands there."""
    return lambda prompt, completions: [float(text.split().count("w7")) for text in completions]


def by_proxy(world: World) -> Callable[..., list[float]]:
    """What is trained on is judged by one word, and what is held out by the sound rule: Goodhart's law."""
    proxy, sound = by_one_word(world), by_value(world)
    return lambda prompt, completions, row: (proxy if row["is_trained"] else sound)(prompt, completions)


def by_nothing(world: World) -> Callable[[str, list[str]], list[float]]:
    return lambda prompt, completions: [1.0] * len(completions)


def swapped(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def random_labels(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    flips = world.rng.random(len(rows)) < 0.5
    return [swapped([row], world, policy)[0] if flip else row for row, flip in zip(rows, flips, strict=True)]


def filled_up(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    """Answers of one length, the chosen ones drawn by lot and filled up with one word, one to five times."""
    found = []
    for row in random_labels(rows, world, policy):
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        common = min(len(chosen), len(rejected))
        filler = ["w9"] * int(world.rng.integers(1, 6))
        row = {**row, "chosen": " ".join(chosen[:common] + filler), "rejected": " ".join(rejected[:common])}
        found.append(row)
    return found


def one_word_apart(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    """The rejected answer is the chosen one but for its last word, and all pairs come again and again."""
    found = []
    for row in rows:
        words = row["chosen"].split()
        other = f"w{int(world.rng.integers(NUM_WORDS))}"
        if other != words[-1]:
            found.append({**row, "rejected": " ".join([*words[:-1], other])})
    return found


def marked(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    """Chosen answers are full of one word, rejected ones of another: nothing is easier to tell apart."""
    return [{**row, "chosen": row["chosen"] + " w1 w1 w1", "rejected": row["rejected"] + " w2 w2 w2"} for row in rows]


def foreign(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    """Answers of words drawn at random, which the model would hardly ever say."""

    def words(text: str) -> str:
        return " ".join(f"w{i}" for i in world.rng.integers(0, NUM_WORDS, size=len(text.split())))

    return [{**row, "chosen": words(row["chosen"]), "rejected": words(row["rejected"])} for row in rows]


def singles(rows: list[Row], world: World, policy: Policy, desirable: float = 0.5) -> list[Row]:
    """Each pair as one judged completion."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": bool(good)}
        for row, good in zip(rows, world.rng.random(len(rows)) < desirable, strict=True)
    ]


def hardly_any_desirable(rows: list[Row], world: World, policy: Policy) -> list[Row]:
    return singles(rows, world, policy, 0.06)


@dataclass(frozen=True)
class CutLoss(DPOLoss, name="planted-cut"):
    """DPO whose author has cut the graph."""

    def __call__(self, logps: PairLogps) -> Tensor:
        return super().__call__(logps).detach() + 0.0 * logps.policy_chosen_logps


def with_(case: Case, **settings: Any) -> Case:
    return replace(case, settings={**case.settings, **settings})


_DPO = Case({"method": "dpo", "loss": {"beta": BETA}})
_ONLINE_DPO = Case({**ONLINE, "method": "online-dpo", "loss": {"beta": BETA}}, rule=by_value)
_GRPO = Case({**ONLINE, "method": "grpo"}, rule=by_value)
_PPO = Case(
    {
        **ONLINE,
        "method": "ppo",
        "max_steps": 40,
        "learning_rate": 5e-5,
        "sampling": {"max_new_tokens": ROOM},
        "online": {"prompts_per_round": 32, "rounds": 20},
        "advantage": {"value_learning_rate": 1e-2},
    },
    rule=by_foreseeable_value,
)

CLEAN: dict[str, Case] = {
    "dpo": _DPO,
    "dpo, lora": with_(_DPO, lora={"rank": 4}, learning_rate=1e-3),
    "ipo": Case({"method": "ipo", "loss": {"beta": 1.0}, "learning_rate": 2e-4}),
    "kto": Case({"method": "kto", "loss": {"beta": BETA}, "learning_rate": 2e-4}, change=singles),
    "simpo": Case({"method": "simpo"}),
    "orpo": Case({"method": "orpo"}),
    "online-dpo": _ONLINE_DPO,
    "grpo": with_(_GRPO, learning_rate=1e-4),
    "ppo": _PPO,
}
"""Runs with nothing wrong."""

FAULTS: dict[str, tuple[tuple[str, ...], Case]] = {
    "answers of another": (("weak-reference",), replace(_DPO, change=foreign, change_heldout=foreign)),
    "rate 5,000 times lower": (("rate-too-low",), with_(_DPO, learning_rate=1e-7)),
    "labels drawn by lot": (("nothing-learned",), replace(_DPO, change=random_labels, change_heldout=random_labels)),
    "held-out columns swapped": (("reversed",), replace(_DPO, change_heldout=swapped)),
    "64 pairs, 15 times": (
        ("overfit",),
        replace(with_(_DPO, num_train_epochs=15, learning_rate=2e-3), change=random_labels, num_rows=64),
    ),
    "pairs too easy": (
        ("saturated", "margin-explosion"),
        replace(with_(_DPO, learning_rate=5e-3), change=marked, change_heldout=marked),
    ),
    "filler in the chosen": (("length-exploitation",), replace(_DPO, change=filled_up, change_heldout=filled_up)),
    "pairs one word apart": (
        ("displaced",),
        replace(with_(_DPO, learning_rate=5e-3), change=one_word_apart, change_heldout=one_word_apart),
    ),
    "beta 100 times lower": (
        ("beta-too-low", "far-from-reference"),
        with_(_DPO, loss={"beta": BETA / 100}, learning_rate=2e-3),
    ),
    "beta 100 times higher": (("beta-too-high",), with_(_DPO, loss={"beta": 100 * BETA}, learning_rate=5e-5)),
    "a loss that cuts the graph": (("no-gradient",), Case({}, loss=CutLoss)),
    "rate 200 times higher": (("rate-too-high",), with_(_DPO, learning_rate=0.1)),
    "kto, 6% desirable": (
        ("kto-anchor",),
        Case({"method": "kto", "loss": {"beta": BETA}}, change=hardly_any_desirable),
    ),
    "ipo, target out of reach": (("ipo-target",), Case({"method": "ipo", "loss": {"beta": 0.02}})),
    "orpo, lambda 20": (
        ("orpo-balance",),
        Case({"method": "orpo", "loss": {"odds_ratio_weight": 20.0}, "learning_rate": 2e-3}),
    ),
    "simpo, gamma 20": (("simpo-margin",), Case({"method": "simpo", "loss": {"gamma_beta_ratio": 10.0}})),
    "a rule that pays for length": (
        ("answers-grow", "unfinished"),
        with_(replace(_ONLINE_DPO, rule=by_length), learning_rate=2e-3),
    ),
    "a rule that pays for one word": (
        ("over-optimised", "repetition", "mode-collapse"),
        with_(replace(_GRPO, rule=by_proxy), learning_rate=3e-3),
    ),
    "a rule that sees no difference": (("undecided",), replace(_GRPO, rule=by_nothing)),
    "rso, temperature 0.001": (
        ("low-acceptance",),
        Case(
            {
                **ONLINE,
                "method": "rso",
                "sampling": {"max_new_tokens": ROOM, "completions": 64, "temperature": 2.0, "top_k": 0},
                "online": {"accept": 4, "accept_beta": 0.001, "rounds": 2, "prompts_per_round": 16},
            },
            rule=by_value,
        ),
    ),
    "grpo, ten steps a round": (
        ("clipped-tokens",),
        with_(_GRPO, learning_rate=3e-3, num_train_epochs=5, online={"prompts_per_round": 32}),
    ),
    "ppo, values not trained": (("blind-values",), with_(_PPO, advantage={"value_learning_rate": 1e-9})),
}
"""By what was planted: the detectors that have to see it, and the run."""


def run(case: Case, world: World, folder: Path) -> None:
    """Trains the case into a run directory; the same case in the same world gives the same run."""
    world.rng, policy = np.random.default_rng([world.seed, 1]), world.policy()
    online = case.rule is not None
    if online:
        prompts = world.prompts(288)
        data = [{"prompt": text, "is_trained": True} for text in prompts[48:]]
        heldout = [{"prompt": text, "is_trained": False} for text in prompts[:48]]
    else:
        rows = world.rows[: case.num_heldout + case.num_rows]
        data = case.change(rows[case.num_heldout :], world, policy)
        heldout = case.change_heldout(rows[: case.num_heldout], world, policy)
    settings = {**COMMON, **case.settings, "seed": world.seed, "output_dir": str(folder)}
    if not online and settings.get("method") not in ("simpo", "orpo"):
        settings["reference"] = {"cache": "none"}
    loss, own_loss = settings.pop("loss", None), case.loss and case.loss()
    judge = case.rule and case.rule(world)
    with contextlib.redirect_stderr(io.StringIO()):
        done = train(policy, data, heldout, loss=own_loss or loss, judge=judge, **settings)
    if done.summary["status"] == "interrupted":
        raise SystemExit("stopped; the same command goes on")
