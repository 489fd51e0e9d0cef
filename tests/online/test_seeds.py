"""Seeds of prompts: the same for the same prompt, and nothing else counts."""

from __future__ import annotations

from penchant.online.seeds import prompt_seed


def test_a_seed_depends_on_the_content_of_the_prompt_and_on_the_seed() -> None:
    message = {"role": "user", "content": "what"}
    turned = {"content": "what", "role": "user"}
    assert prompt_seed(0, [message]) == prompt_seed(0, (turned,))
    seeds = {
        prompt_seed(seed, prompt) for seed in (0, 1) for prompt in ("what", "what ", [message], [message, message])
    }
    assert len(seeds) == 8


def test_seeds_fill_63_bits() -> None:
    seeds = [prompt_seed(0, str(number)) for number in range(2000)]
    assert len(set(seeds)) == 2000
    assert 0 <= min(seeds) < 2**54
    assert 2**62 < max(seeds) < 2**63


def test_a_seed_stays_what_it_is() -> None:
    """Files of samples are gone on with by later versions, so this number must never change."""
    assert prompt_seed(7, "what is one") == 1721621107353542001
