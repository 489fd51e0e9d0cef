"""Files by strangers: none of them runs code, and those that would need to are refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file

from penchant.cli import main
from penchant.data import chat
from penchant.models.load import load_model_and_tokenizer
from penchant.models.weights import save_model

from ..training.test_run import rows, write_rows

pytestmark = pytest.mark.fault(19, "a file by a stranger")

ASK = [{"role": "user", "content": "what is one"}]


class Harm:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that harm leaves behind: after every test of this file it must not be there."""
    yield tmp_path / "harm-was-done"
    assert not (tmp_path / "harm-was-done").exists()


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A model's folder that the test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path, tokenizer: Any) -> Path:
    """An adapter's folder that the test may change; its base is sound."""
    from penchant.models.adapters import add_lora

    save_model(add_lora(load_model_and_tokenizer(str(model_folder))[0], 2, 4), tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`penchant train` of one step; gives the exit code and what was said."""
    plain = write_rows(tmp_path / "pairs.jsonl", rows(6))

    def train(model: Path, **settings: Any) -> tuple[int, str]:
        words = {"data": plain, "max_steps": 1, "batch_size": 2, "eval_size": 0, "num_samples": 0} | settings
        words = {"output_dir": tmp_path / "run", "max_length": 256} | words
        line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        code = main(["train", "--model", str(model), *line])
        return code, capsys.readouterr().err

    return train


def change(file: Path, **settings: Any) -> None:
    """Adds settings to a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def write_harm(file: Path, marker: Path) -> None:
    """Python that leaves the mark when it is imported, and has every class that could be asked for."""
    classes = "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Words"))
    file.write_text(f"open({str(marker)!r}, 'w').close()\n{classes}def generate(**_): pass\n")


def refused(answer: tuple[int, str], words: str, tmp_path: Path) -> None:
    code, said = answer
    assert code == 2, said
    assert "Traceback" not in said
    _, found, sentence = said.partition("error: ")
    assert found
    assert words in sentence
    assert not (tmp_path / "run" / "model").exists()


_opened: list[str] | None = None


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_note_opening)


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """The names of all files that Python opens within it."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


# That these tests can fail.


def test_harm_is_real(tmp_path: Path) -> None:
    for number, do in enumerate((by_pickle, by_torch, by_import, by_template)):
        marker = tmp_path / f"mark-{number}"
        do(tmp_path, marker)
        assert marker.exists(), do.__name__


def by_pickle(folder: Path, marker: Path) -> None:
    pickle.loads(pickle.dumps(Harm(marker)))


def by_torch(folder: Path, marker: Path) -> None:
    torch.save({"weight": Harm(marker)}, folder / "harm.bin")
    torch.load(folder / "harm.bin", weights_only=False)


def by_import(folder: Path, marker: Path) -> None:
    write_harm(folder / "harm.py", marker)
    spec = importlib.util.spec_from_file_location("harm", folder / "harm.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def by_template(folder: Path, marker: Path) -> None:
    jinja2.Environment().from_string(injection(marker)).render()


def injection(marker: Path) -> str:
    """A template that leaves the mark where templates are not kept in a sandbox."""
    return "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}".replace("MARKER", str(marker))


# Pickles.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "consolidated.00.pth"])
def test_weights_that_are_only_a_pickle_are_refused_unread(
    name: str, model: Path, marker: Path, train: Any, tmp_path: Path
) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm(marker)}, model / name)
    with files_opened() as opened:
        refused(train(model), f"holds its weights as {name}, a pickle", tmp_path)
    assert not any(path.endswith(name) for path in opened)


def test_the_refusal_says_how_to_convert(model: Path, train: Any, tmp_path: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm(marker)}, model / "pytorch_model.bin")
    refused(train(model), ".save_pretrained('NEW')", tmp_path)


def test_distributed_checkpoint_is_no_model(model: Path, marker: Path, train: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / ".metadata").write_bytes(pickle.dumps(Harm(marker)))
    (model / "__0_0.distcp").write_bytes(pickle.dumps(Harm(marker)))
    refused(train(model), "holds no weights (*.safetensors)", tmp_path)


def test_index_cannot_name_a_pickle(model: Path, marker: Path, train: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    torch.save({"lm_head.weight": Harm(marker)}, model / "more.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "more.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(train(model), "names 'more.bin', which is no .safetensors file in its folder", tmp_path)


def test_index_cannot_lead_out_of_the_folder(model: Path, train: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "private.safetensors")
    shutil.copy(tmp_path / "private.safetensors", model / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../private.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(train(model), "names '../private.safetensors'", tmp_path)


def test_settings_cannot_name_a_pickle_as_the_weights(model: Path, marker: Path, train: Any, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": Harm(marker)}, model / "adapter_model.bin")
    change(model / "config.json", transformers_weights="adapter_model.bin")
    refused(train(model), "transformers_weights", tmp_path)


BESIDE = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", ".metadata"]


def test_pickles_beside_sound_weights_are_never_opened(model: Path, marker: Path, train: Any) -> None:
    for name in BESIDE:
        (model / name).write_bytes(pickle.dumps(Harm(marker)))
    with files_opened() as opened:
        code, said = train(model)
    assert code == 0, said
    assert any(path.endswith("config.json") for path in opened)
    assert not [path for path in opened if path.endswith(tuple(BESIDE))]


@pytest.mark.parametrize("lora", [0, 2])
def test_nothing_that_a_run_writes_is_a_pickle(lora: int, model: Path, train: Any, tmp_path: Path) -> None:
    code, said = train(model, max_steps=2, save_steps=1, **{"lora.rank": lora})
    assert code == 0, said
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in written if path.suffix == ".safetensors"]
    assert [path for path in written if path.parent.parent.name == "checkpoints"]
    for path in written:
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            path.read_text(encoding="utf-8")  # no pickle is text, nor is the archive in which torch keeps one


def test_adapter_that_is_a_pickle_is_refused(adapter: Path, marker: Path, train: Any, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Harm(marker)}, adapter / "adapter_model.bin")
    refused(train(adapter), "holds its weights as adapter_model.bin, a pickle", tmp_path)


def test_base_of_an_adapter_comes_in_by_the_same_door(
    adapter: Path, model: Path, marker: Path, train: Any, tmp_path: Path
) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    torch.save({"lm_head.weight": Harm(marker)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(train(adapter), f"'{model}' holds its weights as pytorch_model.bin", tmp_path)


def test_reference_comes_in_by_the_same_door(
    model: Path, model_folder: Path, marker: Path, train: Any, tmp_path: Path
) -> None:
    torch.save({"lm_head.weight": Harm(marker)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    answer = train(model_folder, **{"reference.model": model})
    refused(answer, f"'{model}' holds its weights as pytorch_model.bin", tmp_path)


def test_data_that_are_a_pickle_are_refused(model: Path, marker: Path, train: Any, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps([Harm(marker)]))
        refused(train(model, data=tmp_path / name), name, tmp_path)


def test_weights_with_an_endless_header_are_refused(model: Path, train: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(train(model), "cannot be loaded", tmp_path)


# Code that a model asks for.


def test_python_beside_a_known_kind_of_model_is_left_alone(model: Path, marker: Path, train: Any) -> None:
    write_harm(model / "harm.py", marker)
    (model / "custom_generate").mkdir()
    write_harm(model / "custom_generate" / "generate.py", marker)
    auto_map = {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model", "AutoTokenizer": "harm.Words"}
    change(model / "config.json", auto_map=auto_map)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["harm.Words", "harm.Words"]})
    code, said = train(model, num_samples=1)
    assert code == 0, said


@pytest.mark.parametrize("where", ["harm", "someone/elsewhere--harm"])
def test_model_that_needs_python_of_its_own_is_refused(
    where: str, model: Path, marker: Path, train: Any, tmp_path: Path
) -> None:
    write_harm(model / "harm.py", marker)
    change(model / "config.json", model_type="harm", auto_map={"AutoConfig": f"{where}.Config"})
    refused(train(model), "runs no code from strangers", tmp_path)


def test_tokenizer_that_needs_python_of_its_own_is_refused(
    model: Path, marker: Path, train: Any, tmp_path: Path
) -> None:
    write_harm(model / "harm.py", marker)
    import transformers

    # A kind of model for which transformers knows no tokenizer.
    config = transformers.CpmAntConfig(
        hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=16, num_hidden_layers=1
    )
    config.save_pretrained(model)
    change(model / "tokenizer_config.json", tokenizer_class="Words", auto_map={"AutoTokenizer": ["harm.Words", None]})
    code, said = train(model)
    assert code == 2, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "settings",
    [
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel@main:attention"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"_experts_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
        {"_attn_implementation": {"": "eager", "vision_config": "someone/kernel"}},
    ],
)
def test_compiled_code_from_the_hub_is_refused(
    settings: dict[str, Any], model: Path, train: Any, tmp_path: Path
) -> None:
    change(model / "config.json", **settings)
    refused(train(model), "fetches compiled code from the hub; take the line out", tmp_path)


def test_quantized_weights_are_refused(model: Path, train: Any, tmp_path: Path) -> None:
    change(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(train(model), "quantized (gptq)", tmp_path)


def test_adapter_cannot_choose_a_module_to_import(
    adapter: Path, marker: Path, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_harm(tmp_path / "harm.py", marker)
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Model", "parent_library": "harm"}
    change(adapter / "adapter_config.json", task_type=None, auto_mapping=mapping)
    code, said = train(adapter)
    assert code == 0, said
    change(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="harm")
    shutil.rmtree(tmp_path / "run")
    refused(train(adapter), "megatron_config", tmp_path)


# Chat templates.


def test_templates_are_kept_in_a_sandbox(tokenizer: Any) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    assert isinstance(_compile_jinja_template(tokenizer.chat_template).environment, ImmutableSandboxedEnvironment)


ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "formatting": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "filter": "{{ (messages | attr('__class__'))() }}",
    "changing": "{{ messages.clear() }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "run file"])
def test_template_cannot_leave_its_sandbox(
    escape: str, place: str, model: Path, marker: Path, train: Any, tmp_path: Path
) -> None:
    template = ESCAPES[escape].replace("MARKER", str(marker))
    more: dict[str, Any] = {}
    (model / "chat_template.jinja").unlink()
    if place == "tokenizer_config.json":
        change(model / place, chat_template=template)
    elif place == "chat_template.jinja":
        (model / place).write_text(template)
    else:
        (tmp_path / "mine.jinja").write_text(template)
        more = {"chat_template": tmp_path / "mine.jinja"}
    refused(train(model, **more), "the chat template refuses the messages", tmp_path)


def test_templates_in_the_data_are_only_text(model: Path, marker: Path, train: Any, tokenizer: Any) -> None:
    text = injection(marker) + "{% for i in range(9) %}{{ ''.__class__ }}{% endfor %}"
    some = [
        {
            "prompt": [{"role": "user", "content": f"{number} {text}"}],
            "chosen": [{"role": "assistant", "content": f"the cat {text}"}],
            "rejected": [{"role": "assistant", "content": f"a dog {text}"}],
        }
        for number in range(4)
    ]
    prompt, (chosen,) = chat.render(tokenizer, some[0]["prompt"], [some[0]["chosen"]])
    assert f"0 {text}<|im_end|>" in prompt
    assert chosen.startswith(f"the cat {text}<|im_end|>")
    code, said = train(model, data=write_rows(marker.parent / "templates.jsonl", some), max_length=1024)
    assert code == 0, said


@pytest.mark.parametrize(
    "template", ["{{ range(10 ** 12) | list }}", "{{ 1 // 0 }}", "{{ messages.nothing.at_all }}", "{% endless %}"]
)
def test_template_that_fails_is_told_in_one_sentence(template: str, model: Path, train: Any, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(template)
    refused(train(model), "the chat template refuses the messages", tmp_path)


def test_template_that_never_ends_is_stopped(
    model: Path, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.2)
    loops = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    (model / "chat_template.jinja").write_text(loops)
    refused(train(model), "the chat template takes more than 0.2 s for this conversation", tmp_path)


# Links and paths.


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "added_tokens.json"])
def test_model_with_a_link_that_leads_out_is_refused(name: str, model: Path, train: Any, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../private")
    refused(train(model), f"{name}' is a link that leads out of its folder", tmp_path)


def test_folder_of_templates_cannot_be_a_link_that_leads_out(model: Path, train: Any, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to("../private")
    refused(train(model), "key.jinja' is a link that leads out of its folder", tmp_path)


def test_links_within_a_model_and_within_the_cache_of_the_hub_are_sound(
    model: Path, train: Any, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(model.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "README.md").symlink_to("config.json")
    code, said = train(snapshot)
    assert code == 0, said


def test_folder_of_data_cannot_lead_out(model: Path, train: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "pairs.jsonl", rows(4))
    write_rows(tmp_path / "private.jsonl", rows(4, seed=1))
    (tmp_path / "data" / "more.jsonl").symlink_to("../private.jsonl")
    refused(train(model, data=tmp_path / "data"), "more.jsonl", tmp_path)


def test_output_that_leads_up_spares_what_is_there(model: Path, train: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id").write_text("mine")
    refused(train(model, output_dir=tmp_path / "run" / ".." / "keys"), "is no run directory", tmp_path)
    assert (tmp_path / "keys" / "id").read_text() == "mine"


# Run files.


def test_run_file_runs_no_python(marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        harm = f"{tag} ['touch {marker}']"
        (tmp_path / "run.yaml").write_text(f"model: {harm}\ndata: pairs.jsonl\n")
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
        assert "is not YAML: could not determine a constructor" in capsys.readouterr().err
        assert main(["train", "--model", "m", "--data", "d", "--seed", harm]) == 2
        assert "could not determine a constructor" in capsys.readouterr().err
