"""Loading and saving: the same numbers again, nothing random left on, one clear sentence where it cannot be done."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from penchant.errors import UserError
from penchant.layouts.padded import collate
from penchant.models import load
from penchant.models.adapters import add_lora
from penchant.models.fingerprints import weights_sha256
from penchant.models.load import disable_dropout, load_model_and_tokenizer
from penchant.models.logps import token_logps
from penchant.models.weights import load_weights, save_model
from penchant.types import Batch, TokenizedExample

BATCH = collate([TokenizedExample([5, 9, 2, 31], ([7, 60, 8],), 0), TokenizedExample([11], ([4, 4, 12, 30, 2],), 1)])


def logps(model: nn.Module, batch: Batch = BATCH) -> torch.Tensor:
    with torch.no_grad():
        return token_logps(model, batch).logps


def sentence_of(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model_and_tokenizer(str(name))
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    return message


def test_saved_model_loads_with_identical_log_probabilities(
    tiny_model: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    save_model(tiny_model, tokenizer, tmp_path / "out" / "final")
    loaded, loaded_tokenizer = load_model_and_tokenizer(str(tmp_path / "out" / "final"))
    assert torch.equal(logps(loaded), logps(tiny_model))
    assert weights_sha256(loaded) == weights_sha256(tiny_model)
    assert loaded_tokenizer("what is one").input_ids == tokenizer("what is one").input_ids
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert not list((tmp_path / "out" / "final").glob("*.bin"))


def test_model_with_tied_embeddings_comes_back_whole(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    save_model(model, tokenizer, tmp_path / "gpt2")
    assert torch.equal(logps(load_model_and_tokenizer(str(tmp_path / "gpt2"))[0]), logps(model))


def test_half_precision_weights_are_loaded_as_float32(tiny_model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    save_model(tiny_model.bfloat16(), tokenizer, tmp_path / "model")
    loaded, _ = load_model_and_tokenizer(str(tmp_path / "model"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


RANDOM_IN_TRAINING = {
    "gpt2": transformers.GPT2Config(
        vocab_size=320, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        attention_dropout=0.1,
    ),
    "opt": transformers.OPTConfig(
        vocab_size=320, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=16,
        dropout=0.1, attention_dropout=0.1, layerdrop=0.5,
    ),
    "mixtral": transformers.MixtralConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, attention_dropout=0.1, router_jitter_noise=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", RANDOM_IN_TRAINING)
def test_nothing_random_is_left_on_in_a_loaded_model(family: str, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_config(RANDOM_IN_TRAINING[family])
    fresh.train()
    assert not torch.equal(logps(fresh), logps(fresh))
    save_model(fresh, tokenizer, tmp_path / "model")
    model, _ = load_model_and_tokenizer(str(tmp_path / "model"))
    in_evaluation = logps(model.eval())
    model.train()
    assert torch.equal(logps(model), in_evaluation)
    assert torch.equal(logps(model), in_evaluation)


def test_dropout_is_off_in_plain_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5))
    disable_dropout(model.train())
    inputs = torch.randn(3, 4)
    assert torch.equal(model(inputs), model[0](inputs))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_adapter_folder_loads_merged_into_its_base(
    with_tokenizer: bool, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base, _ = load_model_and_tokenizer(str(model_folder))
    unadapted = logps(base)
    model = add_lora(base, rank=2, alpha=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if with_tokenizer:
        save_model(model, tokenizer, tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")
    loaded, loaded_tokenizer = load_model_and_tokenizer(str(tmp_path / "adapter"))
    assert not hasattr(loaded, "disable_adapter")
    torch.testing.assert_close(logps(loaded), logps(model), rtol=0, atol=1e-4)
    assert not torch.allclose(logps(loaded), unadapted, atol=1e-1)
    assert loaded_tokenizer.chat_template == tokenizer.chat_template


def test_model_of_an_adapter_can_be_trained(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    save_model(add_lora(load_model_and_tokenizer(str(model_folder))[0], 2, 4), tokenizer, tmp_path / "adapter")
    model, _ = load_model_and_tokenizer(str(tmp_path / "adapter"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_words_that_an_adapter_brings_along_have_a_place(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<|new {number}|>" for number in range(330 - len(tokenizer))])
    base, _ = load_model_and_tokenizer(str(model_folder))
    base.resize_token_embeddings(330)
    model = add_lora(base, 2, 4, ["q_proj"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    larger.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model_and_tokenizer(str(tmp_path / "adapter"))
    assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_adapter_on_an_adapter_is_refused(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_model(add_lora(load_model_and_tokenizer(str(model_folder))[0], 2, 4), tokenizer, tmp_path / name)
    settings_file = tmp_path / "two" / "adapter_config.json"
    settings = json.loads(settings_file.read_text())
    for base, sentence in ((str(tmp_path / "one"), "is an adapter, too"), (None, "names no base model")):
        settings_file.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        assert sentence in sentence_of(tmp_path / "two")


def test_adapter_whose_base_is_gone_is_told_in_one_sentence(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    save_model(add_lora(load_model_and_tokenizer(str(model_folder))[0], 2, 4), tokenizer, tmp_path / "adapter")
    settings_file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**settings, "base_model_name_or_path": "nobody/gone"}))
    assert "'nobody/gone' is no local folder" in sentence_of(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["./missing", "missing/deep/inside", "/missing", "~/missing/model"])
def test_missing_folder_is_named(name: str) -> None:
    assert sentence_of(name) == f"model: there is no folder '{name}'."


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_hub_id_that_cannot_be_reached_is_told_at_once(name: str) -> None:
    started = time.monotonic()
    sentence = sentence_of(name)
    assert time.monotonic() - started < 5
    assert sentence == f"model: '{name}' is no local folder, and the hub cannot be reached to ask there."


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub with one model in it, `someone/tiny`; gives the folder of its files."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(model_folder, repository / "snapshots" / "0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return repository / "snapshots" / "0123abc"


def test_model_of_the_hub_that_was_fetched_before_needs_no_network(hub: Path, model_folder: Path) -> None:
    loaded, _ = load_model_and_tokenizer("someone/tiny")
    assert torch.equal(logps(loaded), logps(load_model_and_tokenizer(str(model_folder))[0]))


def test_model_of_the_hub_is_looked_at_like_any_folder(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    assert "holds its weights as pytorch_model.bin, a pickle" in sentence_of("someone/tiny")


def test_neither_pickles_nor_python_are_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    offered = [path.name for path in hub.iterdir()]
    offered += [
        "pytorch_model.bin",
        "modeling_tiny.py",
        "training_args.bin",
        "original/model.safetensors",
        "optimizer.pt",
    ]
    fetched: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        fetched.extend(filter_repo_objects(offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_model_and_tokenizer("someone/tiny")
    assert sorted(fetched) == sorted(path.name for path in hub.iterdir())


def test_file_is_no_model(model_folder: Path) -> None:
    assert "is a file; give the folder" in sentence_of(model_folder / "config.json")
    assert "there is no file" in sentence_of(model_folder / "missing.gguf")


def test_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    assert "holds no config.json" in sentence_of(tmp_path)


@pytest.fixture
def damaged(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "damaged"))


def test_cut_off_weights_are_told_in_one_sentence(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in sentence_of(damaged)


def test_config_of_another_shape_is_told_in_one_sentence(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "cannot be loaded" in sentence_of(damaged)


def test_weights_that_are_missing_are_not_made_up(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(damaged / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    assert sentence_of(damaged).endswith("It lacks 1 of the weights of LlamaForCausalLM, such as lm_head.weight.")


def test_model_that_sees_later_tokens_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    bert = transformers.BertLMHeadModel(config)
    nn.init.normal_(bert.bert.embeddings.word_embeddings.weight)
    save_model(bert, tokenizer, tmp_path / "bert")
    assert "no causal language model" in sentence_of(tmp_path / "bert")


def test_model_without_an_end_token_is_refused(damaged: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(damaged)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(damaged)
    assert "has no end-of-sequence token" in sentence_of(damaged)


def test_end_token_fills_up_where_there_is_no_padding_token(damaged: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(damaged)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(damaged)
    assert load_model_and_tokenizer(str(damaged))[1].pad_token == "<|im_end|>"


def test_saving_replaces_a_folder(tiny_model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "stale.txt").write_text("of another model")
    save_model(tiny_model, tokenizer, folder)
    assert not (folder / "stale.txt").exists()
    assert torch.equal(logps(load_model_and_tokenizer(str(folder))[0]), logps(tiny_model))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("with_lora", [False, True])
def test_weights_to_go_on_with_are_looked_at_too(
    with_lora: bool, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model, _ = load_model_and_tokenizer(str(model_folder))
    if with_lora:
        model = add_lora(model, 2, 4)
    save_model(model, tokenizer, tmp_path / "step-1")
    load_weights(model, tmp_path / "step-1")
    (weights,) = (tmp_path / "step-1").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="a pickle"):
        load_weights(model, tmp_path / "step-1")


def test_saving_that_fails_leaves_what_was_there(
    tiny_model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError("no space left on device")

    save_model(tiny_model, tokenizer, tmp_path / "best")
    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk, raising=False)
    for name in ("best", "new"):
        with pytest.raises(OSError, match="no space left"):
            save_model(tiny_model, tokenizer, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert torch.equal(logps(load_model_and_tokenizer(str(tmp_path / "best"))[0]), logps(tiny_model))


def test_saved_files_are_readable_by_others(tiny_model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    save_model(tiny_model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "model").iterdir())


def write_gguf(file: Path, model: nn.Module, tokenizer: Any) -> None:
    """A Llama in the layout of llama.cpp: its names of tensors, its order of the rows of queries and keys."""
    import gguf

    config, weights = model.config, {name: each.numpy() for name, each in model.state_dict().items()}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    bpe = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [*sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)]
    tokens += [f"<|unused_{number}|>" for number in range(config.vocab_size - len(tokens))]
    is_special = [token.startswith("<|") for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if each else gguf.TokenType.NORMAL for each in is_special])
    writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    def permuted(rows: Any, num_heads: int) -> Any:
        return rows.reshape(num_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        writer.add_tensor(f"{theirs}.weight", weights[f"{ours}.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = permuted(weight, heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_converted_once_and_keeps_its_numbers(
    tiny_model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", tiny_model, tokenizer)
    model, loaded_tokenizer = load_model_and_tokenizer(str(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(logps(model), logps(tiny_model), rtol=0, atol=1e-4)
    assert loaded_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    text = "what is the capital of France<|im_end|>"
    assert loaded_tokenizer(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids

    (folder,) = (tmp_path / "cache" / "gguf").iterdir()
    assert folder.name.startswith("tiny-")
    monkeypatch.setattr(load, "save_model", lambda *_: pytest.fail("converted a second time"))
    again, _ = load_model_and_tokenizer(str(tmp_path / "tiny.gguf"))
    assert torch.equal(logps(again), logps(model))


def test_file_that_only_bears_the_name_gguf_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    assert "cannot be loaded" in sentence_of(tmp_path / "junk.gguf")
    assert not list(tmp_path.glob("cache/gguf/*"))
