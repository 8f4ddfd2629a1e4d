"""The tokenizers of the default model `tiny`: byte-level, so that any text encodes, and made by program.

Given texts, each learns merges from them (byte-pair encoding, Sennrich et al., 2016), so that a word of those texts is
one token or a few; without texts a token is a byte.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Qwen's special tokens, in the order of their ids.
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ROLES = ("system", "user", "assistant")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP_MAX_TOKENS = 77
T5_MAX_TOKENS = 512
BYTES = 256
Merges = list[tuple[str, str]]


def write_qwen_tokenizer(folder: Path, texts: Sequence[str] = (), num_merges: int = 0) -> dict[str, int]:
    """A byte-level BPE whose first merges make the role names; returns the ids of the special tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ROLES:
        for end in range(2, len(word) + 1):  # s+y, sy+s, ...: left to right
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _add_merges(vocab, merges, _learned_merges(texts, num_merges, normalizers.NFC(), words))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in QWEN_SPECIAL])
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}
    _write(
        folder,
        tokenizer,
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder={str(i): _added(token) for token, i in ids.items()},
        additional_special_tokens=list(QWEN_SPECIAL[1:]),
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )
    _write_bpe_files(folder, vocab, merges)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    return ids


def write_clip_tokenizer(folder: Path, texts: Sequence[str] = (), num_merges: int = 0) -> dict[str, int]:
    """CLIP's layout: 256 bytes, 256 bytes that end a word, what merges make of them, start and end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(f"{s}</w>" for s in alphabet)])}
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    split = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    merges: Merges = []
    _add_merges(vocab, merges, _learned_merges(texts, num_merges, lower, words, suffix="</w>"))
    vocab |= {bos: len(vocab), eos: len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=eos))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=True, special=True) for t in (bos, eos)])
    tokenizer.post_processor = processors.RobertaProcessing((eos, vocab[eos]), (bos, vocab[bos]), False, False)
    _write(
        folder,
        tokenizer,
        tokenizer_class="CLIPTokenizer",
        added_tokens_decoder={str(vocab[t]): _added(t, normalized=True) for t in (bos, eos)},
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        unk_token=eos,
        model_max_length=CLIP_MAX_TOKENS,
    )
    _write_bpe_files(folder, vocab, merges)
    return {"bos": vocab[bos], "eos": vocab[eos], "vocab_size": len(vocab)}


def write_t5_tokenizer(
    folder: Path, texts: Sequence[str] = (), num_pieces: int = 0, max_tokens: int = T5_MAX_TOKENS
) -> dict[str, int]:
    """A unigram tokenizer with T5's first ids: printable ASCII, pieces of `texts`; the rest falls back to bytes.

    It is stored as a plain fast tokenizer: transformers' T5 class would rebuild it without the byte fallback.
    """
    specials = ("<pad>", "</s>", "<unk>")
    pieces = [(token, 0.0) for token in specials]
    pieces += [("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    pieces += [(f"<0x{b:02X}>", -10.0) for b in range(BYTES)]
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    known = {piece for piece, _ in pieces}
    pieces += [pair for pair in _learned_pieces(texts, num_pieces, words) if pair[0] not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    _write(
        folder,
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder={str(i): _added(token) for i, token in enumerate(specials)},
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_tokens,
    )
    return {"pad": 0, "eos": 1, "vocab_size": len(pieces)}


def _learned_merges(
    texts: Sequence[str], num: int, normalizer: normalizers.Normalizer, words: pre_tokenizers.PreTokenizer, suffix=""
) -> Merges:
    """The `num` merges that shorten `texts` most, in their order."""
    if not num:
        return []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ends = {"end_of_word_suffix": suffix} if suffix else {}
    learner = Tokenizer(models.BPE(**ends))
    learner.normalizer, learner.pre_tokenizer = normalizer, words
    size = len(alphabet) * (1 + len(ends)) + num
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, **ends)
    learner.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:num]


def _add_merges(vocab: dict[str, int], merges: Merges, more: Merges) -> None:
    for left, right in more:
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))


def _learned_pieces(texts: Sequence[str], num: int, words: pre_tokenizers.PreTokenizer) -> list[tuple[str, float]]:
    """About `num` pieces of words and their log probabilities."""
    if not num:
        return []
    learner = Tokenizer(models.Unigram())
    learner.normalizer, learner.pre_tokenizer = normalizers.NFKC(), words
    learner.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=num, show_progress=False))
    return [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]


def _added(token: str, normalized: bool = False) -> dict:
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False, "special": True}
    return {"content": token, **flags}


def _write(folder: Path, tokenizer: Tokenizer, **config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config |= {"clean_up_tokenization_spaces": False}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def _write_bpe_files(folder: Path, vocab: dict[str, int], merges: Merges) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
