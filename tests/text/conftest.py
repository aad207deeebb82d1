"""Tiny tokenizers trained on the spot, and their GGUF metadata as llama.cpp's converter writes it."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from thermocline.text.splits import split_rule

CORPUS = """
The lake is warm above and cold below; the thermocline is where the two meet, some ten metres down.
In summer the upper water doesn't mix with the lower: it's lighter, and the wind can't reach so deep.
def fire(neurons, threshold=0.5):
    return [n for n in neurons if n.value > threshold]  # 1234567 of them, 42 at a time
Straße, naïve café, jalapeño; Ελλάδα, Россия, Україна; 水は冷たい。湖の水温は深さで変わる。 你好，世界！ 안녕하세요
مرحبا بالعالم — "quoted" 'single' … 3.14159 + 2.71828 = 5.85987; e-mail: lake@example.org, https://example.org/a?b=c&d=e
I'll go, you've been, she'd stay, they're LOUD: WE'LL SHOUT, DON'T WE? HTTPServer parseJSON snake_case camelCase
\tindented with a tab
        indented with eight spaces
for (int i = 0; i < n; ++i) { total += values[i] * weights[i]; } /* ... */ return total / n;
""".strip("\n").split("\n")

AWKWARD = {
    "empty": "",
    "space": " ",
    "spaces": "     ",
    "leading space": " the lake",
    "two leading spaces": "  the lake",
    "trailing space": "the lake ",
    "space runs": "a  b   c    d        e                f",
    "tabs and newlines": "\t\ta\n\nb\r\nc \n d\t \n",
    "newlines only": "\n\n\n",
    "no-break and wide spaces": "a\u00a0b\u2003c\u3000d\u200be",
    "accents": "Straße naïve café",
    "combining": "e\u0301 a\u0308o\u0302\u0323 \u0301",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺",
    "cjk": "你好，世界！水は冷たい。안녕하세요",
    "right to left": "مرحبا بالعالم שלום \u200fabc\u200e",
    "numbers": "0 12 123 1234 12345678901234567890 3.14 1,000,000 ½ ² Ⅷ ٣٤٥",
    "contractions": "I'll you've she'd they're don't I'M WE'LL 'tis ''s",
    "code": "def f(x):\n    return x**2  # ok\n\tif (a&&b||!c){i++;}",
    "punctuation": "...!?--==>>>///***~~~```$^+|<>(){}[]",
    "case": "HTTPServer parseJSON snake_case ÄÖÜäöü ǅ",
    "special spelled": "a <|im_start|>user<|im_end|> </s> <s> <unk> <0x41> b",
    "control characters": "a\x00b\x01\x1b[31m\x7f\x85",
    "plane 1 to 16": "𝔘𝔫𝔦 𐍈 \U0010ffff \ufffd \ufeff",
    "long": "the water is cold " * 200,
    "one letter": "a" * 1000,
    "all Latin-1": "".join(map(chr, range(256))),
}


@pytest.fixture(params=AWKWARD.values(), ids=AWKWARD.keys())
def awkward(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def spm() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model with the settings of Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture
def spm_metadata(spm: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What convert_hf_to_gguf.py writes for a tokenizer.model."""
    size = spm.get_piece_size()

    def kind(i: int) -> int:
        return 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def pre_tokenizer_of_its_makers(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer in the tokenizer.json of a model of that name, where the library has steps for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "starcoder":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return split_rule(name).pre_tokenizer()


@functools.cache
def _trained(name: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=split_rule(name).ignore_merges))
    backend.pre_tokenizer = pre_tokenizer_of_its_makers(name)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Tokenizer]:
    """A byte-level BPE trained with the words of a `tokenizer.ggml.pre` name."""
    return _trained


@pytest.fixture(scope="session")
def bpe_metadata() -> Callable[[str], dict[str, Any]]:
    """What convert_hf_to_gguf.py writes for that tokenizer's tokenizer.json."""

    def build(name: str) -> dict[str, Any]:
        model = json.loads(_trained(name).to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
            "tokenizer.ggml.eos_token_id": 0,
        }

    return build
