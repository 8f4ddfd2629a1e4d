"""The tokenizers of the default model `tiny`: byte-level, so that any text encodes, and made by program."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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


def write_qwen_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE whose only merges make the role names; returns the ids of the special tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ROLES:
        for end in range(2, len(word) + 1):  # s+y, sy+s, ...: left to right
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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


def write_clip_tokenizer(folder: Path) -> dict[str, int]:
    """CLIP's layout without merges: 256 bytes, 256 bytes that end a word, start and end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(f"{s}</w>" for s in alphabet)])}
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    vocab |= {bos: 2 * BYTES, eos: 2 * BYTES + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>", unk_token=eos))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
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
    _write_bpe_files(folder, vocab, [])
    return {"bos": vocab[bos], "eos": vocab[eos], "vocab_size": len(vocab)}


def write_t5_tokenizer(folder: Path) -> dict[str, int]:
    """A unigram tokenizer over printable ASCII with T5's first ids; everything else falls back to bytes.

    It is stored as a plain fast tokenizer: transformers' T5 class would rebuild it without the byte fallback.
    """
    specials = ("<pad>", "</s>", "<unk>")
    pieces = [(token, 0.0) for token in specials]
    pieces += [("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    pieces += [(f"<0x{b:02X}>", -10.0) for b in range(BYTES)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
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
        model_max_length=T5_MAX_TOKENS,
    )
    return {"pad": 0, "eos": 1, "vocab_size": len(pieces)}


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


def _write_bpe_files(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
