"""Tokenizers from a directory, chat templates, and text that streams in whole characters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmlab.models.tokenizer import HFTokenizer, IncrementalDecoder, NoTokenizer, load_tokenizer
from llmlab.types import ModelError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café 東京 🙂 schön",
    "1 + 1 = 2, of course",
] * 20


def _byte_level() -> object:
    """GPT-2 and Llama 3 style: bytes as letters, merges learned on a small text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return tokenizer


def _byte_fallback() -> object:
    """Llama 2 style: pieces with a leading space, unknown characters as bytes, first space stripped."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [
        "<unk>",
        *SPECIAL,
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "▁th",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS: dict[str, Callable[[], object]] = {"byte-level": _byte_level, "byte-fallback": _byte_fallback}


def _write(directory: Path, kind: str, **config: object) -> Path:
    KINDS[kind]().save(str(directory / "tokenizer.json"))  # type: ignore[attr-defined]
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    loaded = load_tokenizer(_write(tmp_path_factory.mktemp("tok"), request.param))
    assert isinstance(loaded, HFTokenizer)
    return loaded


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_same_ids_as_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(_write(tmp_path, kind))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in [*CORPUS[:3], "", "  two  spaces ", "<|user|>hi<|end|>"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("where", ["config", "file"])
def test_chat_template(where: str, tmp_path: Path) -> None:
    _write(tmp_path, "byte-level", **({"chat_template": TEMPLATE} if where == "config" else {}))
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HFTokenizer) and tokenizer.has_chat_template
    ids = tokenizer.encode_chat([{"role": "user", "content": "the fox"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>the fox<|end|><|assistant|>"
    assert tokenizer.decode(ids) == "the fox"
    with pytest.raises(ModelError, match="role"):
        tokenizer.encode_chat(["not a message"])  # type: ignore[list-item]


def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_write(tmp_path, "byte-level"))
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, NoTokenizer) and tokenizer.eos_token_ids == ()
    with pytest.raises(ModelError, match=r"'hello'.*token ids.*tokenizer\.json"):
        tokenizer.encode("hello")
    decoder = tokenizer.incremental()
    assert (
        decoder.push([4]) + decoder.push([17, 3]) + decoder.flush()
        == tokenizer.decode([4, 17, 3])
        == "4 17 3 "
    )


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_encoding_needs_no_transformers(tmp_path: Path) -> None:
    _write(tmp_path, "byte-level")
    code = (
        "import sys, pathlib; from llmlab.models.tokenizer import load_tokenizer;"
        f"load_tokenizer(pathlib.Path({str(tmp_path)!r})).encode('the fox');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- streaming

TEXT = st.text(
    alphabet=st.one_of(st.characters(codec="utf-8", exclude_characters="\ufffd"), st.sampled_from("the🙂東 "))
)


@given(text=TEXT, cuts=st.lists(st.integers(1, 5)))
@example(text="🙂", cuts=[1, 1, 1, 1])
@example(text="the 🙂🙂 the 東京", cuts=[])
def test_streamed_text_is_whole_and_complete(tokenizer: HFTokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text)
    decoder, pieces, at = tokenizer.incremental(), [], 0
    for n in [*cuts, *[1] * len(ids)]:
        pieces.append(decoder.push(ids[at : at + n]))
        at += n
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_text_is_released_as_soon_as_it_is_whole(tokenizer: HFTokenizer) -> None:
    decoder = tokenizer.incremental()
    ids = tokenizer.encode("q🙂z", add_special_tokens=False)
    pieces = [decoder.push([i]) for i in ids]
    assert [p for p in pieces if p.strip()] == ["q", "🙂", "z"]
    assert decoder.flush() == ""


def test_a_broken_character_comes_with_the_flush(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode("the 🦊", add_special_tokens=False)[:-1]  # no merge knows this one
    decoder = tokenizer.incremental()
    assert decoder.push(ids).rstrip() == "the"
    assert "\ufffd" in decoder.flush()
    assert decoder.flush() == ""


def test_noise_is_not_held_back_for_ever() -> None:
    decoder = IncrementalDecoder(lambda ids: "\ufffd" * len(ids))
    text = "".join(decoder.push([0]) for _ in range(1000))
    assert 900 < len(text) <= 1000 and len(text + decoder.flush()) == 1000
