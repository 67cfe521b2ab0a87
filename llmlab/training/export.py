"""Write a training state as a directory that ``transformers`` loads.

    python -m llmlab.training.export lab-s datasets/models/lab-s
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmlab.training import lab_tokenizer
from llmlab.training.cards import Card, Phase, Recipe, save_card
from llmlab.training.data import BROAD, FOCUS
from llmlab.training.net import Shape, shape_of, to_llama
from llmlab.training.pretrain import Plan, Progress, Training

ROLES = {"lab-xs": "The smallest lab model: a draft for speculation, an edge model, the small end of a router.",
         "lab-s": "The default lab model of lessons and of the tour.",
         "lab-m": "The largest lab model of this release, for reasoning and for tensor parallelism.",
         "lab-moe": "A mixture of experts (8 a layer, each token takes 2), for studies of expert offload."}


def write_model(shape: Shape, weights: dict[str, Tensor], directory: Path) -> None:
    """config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 400}
    for name, data in (("config.json", shape.llama_config()), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(data, indent=2) + "\n")
    narrow = {name: w.to(torch.bfloat16) for name, w in weights.items()}
    save_file(narrow, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)          # safetensors writes it for its owner alone
    lab_tokenizer.save(directory)


def export(state_dir: Path, directory: Path, machine: str) -> Card:
    """Write the averaged weights of a training state, with a card that has no gates yet."""
    state = torch.load(state_dir / "state.pt", weights_only=True)
    plan = Plan(**state["plan"])
    training = Training(plan, started=0.0)
    training.restore(state_dir)
    shape = shape_of(plan.name)
    write_model(shape, to_llama(training.averaged()), directory)
    card = _card(plan, training.progress, shape, _last_log(state_dir), machine, directory)
    save_card(card, directory)
    return card


def _last_log(state_dir: Path) -> dict[str, float]:
    last: dict[str, float] = json.loads((state_dir / "log.jsonl").read_text().splitlines()[-1])
    return last


def _card(plan: Plan, done: Progress, shape: Shape, log: dict[str, float], machine: str, directory: Path) -> Card:
    final_rate = plan.learning_rate * plan.final_rate_share
    return Card(
        name=plan.name, role=ROLES[plan.name], parameters=shape.num_params,
        shape={"hidden": shape.hidden_size, "layers": shape.num_layers, "heads": shape.num_heads,
               "kv_heads": shape.num_kv_heads, "feed_forward": shape.intermediate_size, "vocabulary": shape.vocab_size, **({"experts": shape.num_experts, "top_k": shape.top_k} if shape.num_experts else {})},
        seed=plan.seed, steps=done.step, tokens=done.tokens, learned_tokens=done.learned_tokens,
        minutes=round(log["seconds"] / 60, 1), loss=log["loss"], machine=machine, recipe=_recipe(plan),
        phases=_phases(plan, done),
        sha256={name: _sha256(directory / name) for name in ("model.safetensors", "tokenizer.json")},
        finished=log["rate"] <= 1.5 * final_rate)


def _recipe(plan: Plan) -> str:
    return (f"AdamW (0.9, 0.95), weight decay {plan.weight_decay}, learning rate {plan.learning_rate} with "
            f"{plan.warmup_steps} steps of warm-up and a linear fall to {plan.final_rate_share:.0%}, clip {plan.clip}, "
            "bfloat16 compute with float32 masters, loss on completions only, "
            f"one document per row; the weights are a running average (decay {plan.average_decay}).")


def _phases(plan: Plan, done: Progress) -> list[Phase]:
    """The phases that the run has gone through, with the number of pools (of 4,096 documents) of each."""
    broad = min(plan.focus_from_pool, done.pool)
    parts = ((broad, BROAD), (done.pool - broad, FOCUS))
    return [Phase(pools, phase.batch_tokens, [Recipe(r.suite, r.k, r.style, r.share) for r in phase.mixture])
            for pools, phase in parts if pools > 0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a training state as a model directory.")
    parser.add_argument("name", choices=sorted(ROLES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--machine", default="a 2-core AVX-512 CPU (one thread, shared with other work)")
    args = parser.parse_args()
    card = export(Path("build/training") / args.name, args.directory, args.machine)
    print(f"{card.name}: step {card.steps}, {card.tokens / 1e6:.1f} M tokens, loss {card.loss}")


if __name__ == "__main__":
    main()
