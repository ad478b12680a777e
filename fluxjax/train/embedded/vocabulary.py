"""Training the two tokenizers of a FLUX pipeline on a list of captions."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from fluxjax.text.tokenizers import CLIP_BOS, CLIP_EOS, load_t5_tokenizer

T5_MASK = "<extra_id_0>"
_PRINTABLE = "".join(map(chr, range(33, 127)))
_NO_CAPITALS = dict.fromkeys(range(ord("A"), ord("Z") + 1))


def train_clip_tokenizer(captions: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Byte-pair encoding (Sennrich et al. 2016) with CLIP's conventions, written as it reads them.

    The vocabulary is all bytes, all bytes that end a word, the merges, and last <|startoftext|>
    and <|endoftext|>, so any text can be written. Merging stops at `vocab_size` or when every word
    is one token. Raises ValueError when `vocab_size` has no room for the bytes.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - 2 * len(alphabet) - 2
    if room < 0:
        raise ValueError(f"a byte-level CLIP vocabulary needs at least 514 ids, got {vocab_size}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(re.findall(r"'\w+|[^\W\d_]+|\d|[^\s\w]+|_+", caption.lower()))
    words = {}
    for word, count in counts.items():
        letters = [*byte_level.pre_tokenize_str(word)[0][0]]
        words[(*letters[:-1], letters[-1] + "</w>")] = count
    merges: list[tuple[str, str]] = []
    while len(merges) < room:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties: alphabetical
        merges.append(best)
        words = {_merge(word, best): count for word, count in words.items()}
    # The same word can be reached by two orders of merging: a token is listed once.
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), CLIP_BOS, CLIP_EOS]
    special = {
        "bos_token": CLIP_BOS,
        "eos_token": CLIP_EOS,
        "pad_token": CLIP_EOS,
        "unk_token": CLIP_EOS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True},
    )


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + step]))
        i += step
    return tuple(merged)


def train_t5_tokenizer(
    captions: Iterable[str], folder: Path, *, vocab_size: int, max_length: int
) -> None:
    """A SentencePiece unigram model (Kudo 2018) with T5's ids: <pad> 0, </s> 1, <unk> 2.

    Its character map folds capitals. All printable ASCII can be written. One sentinel,
    <extra_id_0>, comes last and is the mask of masked-token training. Writes spiece.model and the
    same as tokenizer.json.
    """
    import sentencepiece

    # SentencePiece considers only strings that two different words share. In a small world most
    # words have no relative, so each is also shown with a comma behind it.
    sentences = [text for caption in captions for text in (caption, caption.replace(" ", ", "))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size - 1,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        required_chars=_PRINTABLE.translate(_NO_CAPITALS),
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": [T5_MASK],
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {"tokenizer_class": "T5Tokenizer", "extra_ids": 1, "model_max_length": max_length},
    )
    (folder / "tokenizer.json").unlink(missing_ok=True)  # the new model is read, not an old copy
    load_t5_tokenizer(folder).backend.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
