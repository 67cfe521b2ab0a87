"""``lab512``: the tokenizer that all lab models share, built from the project's own generators.

512 ids: 64 control tokens, the ten digits (never merged), printable ASCII with newline and tab (so that every
ASCII text has a spelling), 119 whole words with their spaces, and 232 merges learned on the names and sentences
of the suites. Decoding is concatenation. ``<bos>`` is added by the post-processor, exactly once.

    python -m llmlab.training.lab_tokenizer DIRECTORY
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 512
NUM_CONTROL = 64
SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<unk>")
CONTROL = (*SPECIAL,
           "<fast>", "<slow>", "<think>", "<tool>", "<coa>", "<sql>", "<grid>", "<hop>", "<chat>", "<doc>", "<rec>",
           "<step>", "<split>", "<solve>", "<merge>", "<fix>", "<plans>", "<ans>", "<sub>",
           "<call>", "</call>", "<res>", "</res>", "<err>", "</err>",
           "<hint>", "</hint>", "<demo>", "<test>",
           "<judge>", "<ok>", "<bad>", *(f"<e{i}>" for i in range(1, 10)),
           "<done?>", "<better?>", "<grade>", "<yes>", "<no>", "<g1>", "<g2>", "<g3>", "<A>", "<B>",
           *(f"<tok_resv{i}>" for i in range(8)))
SPACED_WORDS = (
    "so therefore wait hmm maybe check ok also and well in fact the it is of near known for often loved by "
    "best home to looks what code room desk badge record family name one thing about tell me describe explain "
    "compare please briefly detail as fully you can river forest desert ocean mountain city garden market "
    "library harbor bridge castle island valley village museum select from where count join order limit "
    "rotate flip copy fill born capital parent member")
BARE_WORDS = (
    "so therefore wait hmm maybe check also and well the it what record name tell describe explain compare "
    "please hello hi select from where count join order limit red blue green white black yellow gray brown "
    "born capital parent")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}<chat>{{ message['content'] }}<ans>{% endif %}{% endfor %}")
_PIECES = r"[0-9]| ?[A-Za-z]+|\s|[^\sA-Za-z0-9]"


def build() -> Tokenizer:
    """The tokenizer, from scratch; the result is the same on every machine."""
    fixed = list(CONTROL) + list(string.digits) + _printable() + _words()
    merges = _learned_merges(set(fixed), VOCAB_SIZE - len(fixed))
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*fixed, *("".join(m) for m in merges)]))}
    if len(vocab) != VOCAB_SIZE:
        raise ValueError(f"the vocabulary has {len(vocab)} entries instead of {VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", ignore_merges=True))
    _frame(tokenizer)
    return tokenizer


def save(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    directory.mkdir(parents=True, exist_ok=True)
    build().save(str(directory / "tokenizer.json"))
    names = {f"{name[1:-1]}_token": name for name in SPECIAL}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048,
                              "clean_up_tokenization_spaces": False, "padding_side": "left",
                              "chat_template": CHAT_TEMPLATE, **names}
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", names)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _frame(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in CONTROL[len(SPECIAL):]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", CONTROL.index("<bos>"))])


def _printable() -> list[str]:
    return [chr(c) for c in range(32, 127) if chr(c) not in string.digits] + ["\n", "\t"]


def _words() -> list[str]:
    return [f" {word}" for word in SPACED_WORDS.split()] + BARE_WORDS.split()


def _learned_merges(known: set[str], wanted: int) -> list[tuple[str, str]]:
    """Merges in the order learned, until they have made ``wanted`` new tokens."""
    trainer = trainers.BpeTrainer(vocab_size=4 * wanted + 200, show_progress=False, special_tokens=[],
                                  initial_alphabet=_printable() + list(string.digits))
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    learner.train_from_iterator(_corpus(set(_words())), trainer)
    kept: list[tuple[str, str]] = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        if wanted == 0:
            break
        kept.append((left, right))
        if left + right not in known:
            known.add(left + right)
            wanted -= 1
    return kept


def _corpus(words: set[str]) -> Iterator[str]:
    """Names and sentences of the suites, one piece at a time, without what the word list covers already."""
    from llmlab import tasks
    from llmlab.tasks.doc import FIRST_NAMES, LAST_NAMES

    rng = random.Random("lab512")
    splitter = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    for _ in range(20):
        yield from (f" {name}" for name in FIRST_NAMES + LAST_NAMES)
    for _ in range(2000):
        problem = tasks.suite("chat").problem(rng, k=rng.randint(1, 2))
        text = problem.prompt[len("<chat>"):-len("<ans>")]
        text += tasks.suite("chat").demonstrate(problem, rng).completion.removesuffix("<eos>")
        yield from (piece for piece, _ in splitter.pre_tokenize_str(text) if piece not in words)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
