"""Names, files and configs: what loads, and what a user is told when something does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_util import PagedRunner, Row, hf_logits, hf_model, tiny_config
from safetensors.torch import load_file, save_file

import roofline.shapes
from llmlab.models import zoo
from llmlab.models.checkpoint import INDEX, save_random_model
from llmlab.models.hub import fetch
from llmlab.models.loader import LoadedModel, load_model
from llmlab.models.shapes import from_hf_config, to_hf_config
from llmlab.models.weights import RandomWeights, weight_shapes
from llmlab.models.zoo import SHAPES, find_shape, named_shape, resolve
from llmlab.types import ModelError

PROMPT = [5, 17, 3, 80, 44, 9, 1, 62, 30, 11, 95, 7]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    hf_model(tiny_config("llama")).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama directory that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_weights(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def our_logits(loaded: LoadedModel) -> torch.Tensor:
    return PagedRunner(loaded.model, 8, 4).step([Row()], [PROMPT])[0]


def refusal(path: Path | str, **options: Any) -> str:
    """The message with which loading fails."""
    with pytest.raises(ModelError) as caught:
        load_model(path, kernels="torch", **options)
    return str(caught.value)


# ------------------------------------------------------------------------------- files that load


def test_sharded_checkpoint(tmp_path: Path) -> None:
    reference = hf_model(tiny_config("llama"))
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.allclose(our_logits(load_model(tmp_path)), hf_logits(reference, PROMPT), atol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe-raw"])
def test_experts_stored_stacked(tmp_path: Path, case: str) -> None:
    """The layout that transformers 5 keeps in memory: all experts of a layer in one tensor."""
    reference = hf_model(tiny_config(case))
    reference.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert torch.allclose(our_logits(load_model(tmp_path)), hf_logits(reference, PROMPT), atol=1e-4)


def test_old_checkpoints_carry_redundant_tensors(copy: Path) -> None:
    edit_weights(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    assert load_model(copy).shape.family == "llama"


def test_tied_checkpoint_may_repeat_the_head(tmp_path: Path) -> None:
    hf_model(tiny_config("llama3-rope")).save_pretrained(tmp_path)
    before = our_logits(load_model(tmp_path))
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(our_logits(load_model(tmp_path)), before)


def test_shards_written_here_load_again(tmp_path: Path) -> None:
    from llmlab.models.checkpoint import save_checkpoint

    shape = from_hf_config(tiny_config("mixtral").to_dict() | {"architectures": ["MixtralForCausalLM"]})
    weights = RandomWeights(shape, seed=1)
    save_checkpoint(tmp_path, shape, weights, max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_model(tmp_path, kernels="torch")
    filled = load_model(tmp_path, kernels="torch", random_weights=True, seed=1)
    assert torch.equal(our_logits(loaded), our_logits(filled))


def test_eos_ids_come_from_the_generation_config_first(copy: Path) -> None:
    edit_config(copy, eos_token_id=7)
    (copy / "generation_config.json").unlink()
    assert load_model(copy).eos_token_ids == (7,)
    (copy / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load_model(copy).eos_token_ids == (3, 4)


def test_old_and_new_spelling_of_rope_and_dtype(copy: Path) -> None:
    new = find_shape(str(copy))
    edit_config(copy, rope_parameters="absent", rope_theta=10000.0, rope_scaling=None, dtype="absent")
    edit_config(copy, torch_dtype="float32")
    assert find_shape(str(copy)) == new


def test_architecture_may_be_told_by_model_type(copy: Path) -> None:
    edit_config(copy, architectures="absent")
    assert find_shape(str(copy)).family == "llama"


# ----------------------------------------------------------------------------------- bad weights


def test_truncated_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 100])
    message = refusal(copy)
    assert "model.safetensors" in message and f"{size:,}" in message and f"{size - 100:,}" in message


@pytest.mark.parametrize("keep", [0, 5, 300])
def test_file_cut_inside_the_header(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refusal(copy) and str(path) in refusal(copy)


def test_git_lfs_pointer(copy: Path) -> None:
    (copy / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "git lfs pull" in refusal(copy)


def test_header_of_garbage(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    assert "not a safetensors file" in refusal(copy)


def test_shape_mismatch_names_both_shapes(copy: Path) -> None:
    edit_config(copy, intermediate_size=96)
    message = refusal(copy)
    assert "model.layers.0.mlp" in message and "[128, 48]" in message and "[96, 48]" in message


def test_missing_tensor(copy: Path) -> None:
    edit_weights(copy, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    message = refusal(copy)
    assert "model.layers.1.self_attn.k_proj.weight" in message and "missing" in message


def test_leftover_tensors(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=2)
    message = refusal(copy)
    assert "model.layers.2." in message and "9 tensors" in message


def test_quantized_tensor(copy: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(copy, lambda t: t.update({name: t[name].to(torch.int8)}))
    assert name in refusal(copy) and "I8" in refusal(copy)


def test_quantization_config(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "gptq"})
    assert "gptq" in refusal(copy) and "unquantized" not in refusal(copy)


def test_missing_shard(tmp_path: Path) -> None:
    hf_model(tiny_config("llama")).save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path) and INDEX in refusal(tmp_path)


def test_several_files_without_an_index(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    shutil.copy(copy / "a.safetensors", copy / "b.safetensors")
    assert INDEX in refusal(copy)


def test_pickled_weights_only(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(copy) and "safe_serialization" in refusal(copy)


def test_value_too_large_for_float16(copy: Path) -> None:
    edit_weights(copy, lambda t: t["model.norm.weight"].fill_(1e5))
    assert "model.norm.weight" in refusal(copy, dtype="f16") and "bfloat16" in refusal(copy, dtype="f16")
    assert load_model(copy, dtype="bf16").dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ bad configs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"architectures": ["LamaForCausalLM"]},
            ["LamaForCausalLM", "nearest", "'LlamaForCausalLM'", "Qwen3Moe"],
        ),
        ({"architectures": ["BertModel"]}, ["BertModel", "FAMILIES"]),
        ({"hidden_size": "absent"}, ["hidden_size", "missing"]),
        ({"num_hidden_layers": -3}, ["num_hidden_layers", "-3"]),
        ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "4"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["dynamic", "yarn"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["spiral", "linear"]),
    ],
)
def test_bad_config(copy: Path, fields: dict[str, Any], words: list[str]) -> None:
    edit_config(copy, **fields)
    message = refusal(copy)
    assert all(word in message for word in words), message


def test_bad_json(copy: Path) -> None:
    (copy / "config.json").write_text('{"hidden_size": 48,')
    assert "config.json" in refusal(copy) and "line 1" in refusal(copy)


def test_directory_without_config(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    assert "config.json" in refusal(tmp_path) and "readme.txt" in refusal(tmp_path)


def test_unknown_dtype(llama: Path) -> None:
    assert "int4" in refusal(llama, dtype="int4") and "bf16" in refusal(llama, dtype="int4")


@pytest.mark.parametrize("length", [0, 257])
def test_max_model_len_out_of_range(llama: Path, length: int) -> None:
    assert str(length) in refusal(llama, max_model_len=length) and "256" in refusal(
        llama, max_model_len=length
    )


# ------------------------------------------------------------------------------------------ names


def test_unknown_name_suggests(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal("llama-2-7")
    assert "'llama-2-7b'" in message and "directory" in message


def test_no_such_directory() -> None:
    assert "no such directory" in refusal("./models/nothing-here")
    assert "no such directory" in refusal("/nowhere/at/all")


def test_shipped_models_are_found_in_a_checkout_and_in_a_wheel(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llmlab"
    for place in (
        package / "_data" / "models" / "lab-a",
        tmp_path / "site" / "datasets" / "models" / "lab-b",
    ):
        shutil.copytree(llama, place)
    monkeypatch.setattr(zoo.llmlab, "__path__", [str(package)])
    assert sorted(zoo.shipped_models()) == ["lab-a", "lab-b"]
    assert zoo.model_path("lab-a") == package / "_data" / "models" / "lab-a"
    assert load_model("lab-b", kernels="torch").name == "lab-b"
    assert "'lab-a'" in refusal("lab-aa")


def test_a_shape_needs_random_weights() -> None:
    message = refusal("llama-28m")
    assert "random_weights=True" in message and "executor" in message


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a fresh process, because huggingface_hub reads its environment once."""
    code = "from llmlab.models.hub import fetch; fetch('some-org/some-model')"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "some-org/some-model" in last and "hf download" in last and "shipped" in last


def test_hub_id_in_the_cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    folder = tmp_path / "models--some-org--tiny"
    shutil.copytree(llama, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("some-org/tiny").hub_id == "some-org/tiny"
    assert fetch("some-org/tiny") == folder / "snapshots" / commit


# ----------------------------------------------------------------------------------------- shapes

# Parameter counts as the model cards and safetensors indices give them.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes(name: str) -> None:
    assert named_shape(name).num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_agree_with_roofline_and_survive_a_config_file(name: str) -> None:
    shape = named_shape(name)
    assert from_hf_config(json.loads(json.dumps(to_hf_config(shape)))) == shape
    if name in roofline.shapes.names():
        floor = roofline.shapes.get(name)
        assert shape.num_parameters() == floor.num_params()
        assert shape.num_parameters(active=True) == floor.num_params(active=True)
        assert shape.kv_bytes_per_token("float16") == floor.kv_bytes_per_token("fp16")


def test_shapes_load_no_torch() -> None:
    code = "import sys, llmlab.models.zoo as z; z.find_shape('llama-2-7b'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------- random weights


def test_random_weights_are_a_function_of_seed_and_name() -> None:
    shape = named_shape("llama-28m")
    a, b = RandomWeights(shape, seed=4), RandomWeights(shape, seed=4)
    name = "layers.3.down.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], RandomWeights(shape, seed=5)[name])
    assert not torch.equal(a[name], a["layers.4.down.weight"])
    assert torch.equal(a[name].bfloat16(), RandomWeights(shape, 4, torch.bfloat16)[name])
    assert {n: tuple(a[n].shape) for n in a} == weight_shapes(shape)
    assert 27e6 < shape.num_parameters() < 29e6


def test_random_model_on_disk_is_the_random_model_in_memory(tmp_path: Path) -> None:
    from models_util import load_hf

    shape = from_hf_config(tiny_config("gemma3").to_dict() | {"architectures": ["Gemma3ForCausalLM"]})
    save_random_model(shape, tmp_path, seed=2)
    on_disk = load_model(tmp_path, kernels="torch")
    assert on_disk.shape == shape and on_disk.directory == tmp_path
    assert torch.allclose(our_logits(on_disk), hf_logits(load_hf(tmp_path), PROMPT), atol=1e-5)
    in_memory = load_model(tmp_path, kernels="torch", random_weights=True, seed=2)
    assert torch.equal(our_logits(on_disk), our_logits(in_memory))


def test_random_shape_runs_and_takes_ids_only() -> None:
    loaded = load_model("llama-28m", random_weights=True, max_model_len=64)
    assert loaded.directory is None and loaded.max_model_len == 64
    assert our_logits(loaded).isfinite().all()
    with pytest.raises(ModelError, match="token ids"):
        loaded.tokenizer.encode("hello")
