"""Small tokenizers of every make, by name: what real ones do with spaces, bytes and borders."""

from __future__ import annotations

from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Marie Curie was born in Warsaw; Zoë (née Müller) likes the cat, doesn't she?",
    "In {x}: France has {0} and more!? The end.\n\nQ: What is it?\nA: 42",
    "東京は日本の首都です。北京是中国的首都。",
    "cafe\u0301 na\u00efve ﬁne ① 👩\u200d👩 🙂🙂 שלום עולם مرحبا",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>"]
LLAMA3 = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_DECODERS = (decoders.ByteFallback(), decoders.Fuse())


def _byte_level(trim: bool = True, prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    _train(made, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return made


def _split_as_llama3() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(LLAMA3, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    _train(made, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return made


def _unsplit() -> Tokenizer:
    """Byte-level BPE that merges over words: "of France" may be one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    _train(made, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return made


def _metaspace(model: str, scheme: str, *, split: bool = True) -> Tokenizer:
    made = Tokenizer(models.Unigram() if model == "unigram" else models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if model == "unigram":
        _train(made, trainers.UnigramTrainer, unk_token="<unk>")
    else:
        _train(made, trainers.BpeTrainer)
    return made


def _llama(*, legacy: bool) -> Tokenizer:
    """SentencePiece's BPE with byte fallback; legacy: the space before is a normalizer's."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = {"special_tokens": [*SPECIAL, *BYTES], "limit_alphabet": 60, "vocab_size": 420}
    _train(words, trainers.BpeTrainer, **trainer)
    made = Tokenizer.from_str(
        words.to_str().replace('"byte_fallback":false', '"byte_fallback":true')
    )
    if legacy:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.pre_tokenizer = None
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    space = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([space, *BYTE_DECODERS, decoders.Strip(" ", 1, 0)])
    return made


def _collapsed() -> Tokenizer:
    """As T5: NFKC, spaces at the end dropped, several made one."""
    made = _metaspace("unigram", "always")
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    return made


def _end_of_word() -> Tokenizer:
    """As GPT-1: lower case, and a token that ends a word says so."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder()
    _train(made, trainers.BpeTrainer, end_of_word_suffix="</w>")
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    _train(made, trainers.WordPieceTrainer)
    return made


def _words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    _train(made, trainers.WordLevelTrainer)
    return made


def _normalized(*steps: normalizers.Normalizer) -> Tokenizer:
    made = _byte_level()
    made.normalizer = normalizers.Sequence(list(steps))
    return made


def _with_added(made: Tokenizer) -> Tokenizer:
    """Tokens added within words, and one that takes the spaces around it."""
    made.add_tokens(["capi", "ran", "京", AddedToken("<x>", lstrip=True, rstrip=True)])
    made.add_special_tokens(["<end>"])
    return made


def _train(made: Tokenizer, trainer: type, **options: object) -> None:
    given = {"vocab_size": 420, "special_tokens": SPECIAL, "show_progress": False} | options
    made.train_from_iterator(TEXTS, trainer(**given))


MAKES = {
    "byte-level": lambda: _byte_level(),
    "byte-level, offsets not trimmed": lambda: _byte_level(trim=False),
    "byte-level, space before": lambda: _byte_level(prefix=True),
    "byte-level, space before, not trimmed": lambda: _byte_level(trim=False, prefix=True),
    "byte-level, Llama 3's split": _split_as_llama3,
    "byte-level, not split": _unsplit,
    "byte-level, NFKC": lambda: _normalized(normalizers.NFKC()),
    "byte-level, NFC": lambda: _normalized(normalizers.NFC()),
    "byte-level, Strip": lambda: _normalized(normalizers.Strip()),
    "byte-level, lower case": lambda: _normalized(normalizers.NFD(), normalizers.Lowercase()),
    "byte-level, added": lambda: _with_added(_byte_level(prefix=True)),
    "unigram, always": lambda: _metaspace("unigram", "always"),
    "unigram, first": lambda: _metaspace("unigram", "first"),
    "unigram, never": lambda: _metaspace("unigram", "never"),
    "unigram, not split": lambda: _metaspace("unigram", "always", split=False),
    "unigram, spaces collapsed": _collapsed,
    "BPE, always": lambda: _metaspace("bpe", "always"),
    "BPE, first": lambda: _metaspace("bpe", "first"),
    "BPE, never": lambda: _metaspace("bpe", "never"),
    "bytes, legacy": lambda: _llama(legacy=True),
    "bytes": lambda: _llama(legacy=False),
    "bytes, added": lambda: _with_added(_llama(legacy=True)),
    "WordPiece": _word_piece,
    "words that say where they end": _end_of_word,
    "words": _words,
}


@cache
def build(make: str, bos: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of ``MAKES``; ``bos``: it puts BOS first and EOS last by itself."""
    inner = MAKES[make]()
    if bos:
        closed = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        before = [] if inner.post_processor is None else [inner.post_processor]
        inner.post_processor = processors.Sequence([*before, closed])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
    )
