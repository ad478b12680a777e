"""The tokenizers of a pipeline folder: prompts -> token ids, identical to transformers'.

transformers' own classes cost two seconds to import and build, so the same Rust tokenizers are put
together here, as `models/clip/tokenization_clip.py` and `models/t5/tokenization_t5.py` do.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from fluxjax.json_input import read_json
from fluxjax.text.sentencepiece_file import check_charsmap, read_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_EXTRA = 1000
# SHA-256 of character maps that are whole: T5's, and what SentencePiece 0.2 writes now.
_WHOLE_MAPS = {
    "0942789e0111452f1cc446f70036e26d24458c3c7858c53cc12ca4d87531279b",
    "2c03512e62f9ed965ec90d85314211b63b5b8aa0395311ea2147eec9ff738907",
}
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class TokenIds(NamedTuple):
    """Ids padded to one length, 1 where a token is not padding, and what did not fit.

    `removed[i]` is the end of prompt i that was cut off, "" when all of it was read.
    """

    input_ids: Int[np.ndarray, "b l"]
    attention_mask: Int[np.ndarray, "b l"]
    removed: tuple[str, ...]


class PromptTokenizer:
    """A tokenizer with the padding of its model: prompts of any length -> `max_length` ids."""

    def __init__(self, backend: Tokenizer, pad_token: str, max_length: int, where: str = ""):
        self.where = where or "the tokenizer"
        self.backend = backend
        self.pad_token = pad_token
        self.max_length = max_length

    def __call__(self, prompts: Sequence[str], max_length: int | None = None) -> TokenIds:
        """Token ids of the prompts, truncated and padded to `max_length`."""
        length = self.max_length if max_length is None else max_length
        self.backend.enable_truncation(length)
        pad_id = _id(self.backend, self.pad_token)
        self.backend.enable_padding(length=length, pad_id=pad_id, pad_token=self.pad_token)
        with undamaged(self.where):
            encodings = self.backend.encode_batch(list(prompts))
        return TokenIds(
            np.array([e.ids for e in encodings], np.int32).reshape(len(prompts), length),
            np.array([e.attention_mask for e in encodings], np.int32).reshape(-1, length),
            tuple(_removed(p, e) for p, e in zip(prompts, encodings, strict=True)),
        )


def _id(backend: Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer's vocabulary lacks its special token {token!r}")
    return index


def _removed(prompt: str, encoding: Any) -> str:
    for rest in encoding.overflowing:
        for (start, _), special in zip(rest.offsets, rest.special_tokens_mask, strict=True):
            if not special:
                return prompt[start:].strip()
    return ""


def load_tokenizer(
    kind: str, folder: Path, vocab_size: int | None = None, pad: str = ""
) -> PromptTokenizer:
    """`kind` is the class of transformers; `pad`, of CLIP's, as of `load_clip_tokenizer`."""
    if kind == "CLIPTokenizer":
        return load_clip_tokenizer(folder, vocab_size, pad)
    load = {"T5TokenizerFast": load_t5_tokenizer, "LlamaTokenizerFast": load_llama_tokenizer}
    return load[kind](folder, vocab_size)


def load_clip_tokenizer(
    folder: Path, vocab_size: int | None = None, pad: str = ""
) -> PromptTokenizer:
    """CLIP's byte-level BPE from vocab.json and merges.txt (or tokenizer.json).

    `vocab_size` is the network's. `pad`: the token for padding, by default the folder's. Raises
    FileNotFoundError when the folder holds neither, ValueError when a file is damaged, another
    network's, or has ids that the network has not.
    """
    with undamaged(str(folder)):
        return _with_rows(_clip_tokenizer(folder, pad), vocab_size)


def _clip_tokenizer(folder: Path, pad: str) -> PromptTokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    settings = _Settings(folder)
    if pad:
        settings.values["pad_token"] = pad
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    model = settings.values.get("model")
    if model is not None:
        settings.require_type("BPE", "CLIP")
        vocab = model["vocab"]
        merges: Any = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    elif vocab_file.is_file() and merges_file.is_file():
        vocab, merges = BPE.read_file(str(vocab_file), str(merges_file))
    else:
        raise FileNotFoundError(
            f"{folder} is not a CLIP tokenizer: it needs vocab.json and merges.txt, "
            "or tokenizer.json"
        )
    bos, eos = settings.token("bos_token", CLIP_BOS), settings.token("eos_token", CLIP_EOS)
    unk = settings.token("unk_token", CLIP_EOS)
    _require_made(vocab, merges, {bos, eos, unk, settings.token("pad_token", CLIP_EOS)})
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unk,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    pad = settings.token("pad_token", CLIP_EOS)
    settings.add_special_tokens(backend, [bos, eos, unk, pad])
    backend.post_processor = processors.RobertaProcessing(
        (eos, _id(backend, eos)), (bos, _id(backend, bos)), False, False
    )
    return PromptTokenizer(backend, pad, settings.max_length(77), settings.file(vocab_file))


def _require_made(vocab: Mapping[str, int], merges: Any, special: Collection[str]) -> None:
    """Raises ValueError for tokens of several letters that no merge makes: of a list of merges that
    is cut short the rest reads as a good one, and prompts as other tokens."""
    made = {left + right for left, right in merges}
    lost = [token for token in vocab if len(token.removesuffix("</w>")) > 1 and token not in made]
    lost = [token for token in lost if token not in special and not token.startswith("<|")]
    if lost:
        raise ValueError(f"no merge makes {len(lost)} of its tokens, such as {lost[0]!r}")


def load_t5_tokenizer(folder: Path, vocab_size: int | None = None) -> PromptTokenizer:
    """T5's SentencePiece unigram model from tokenizer.json or spiece.model.

    `vocab_size` is the network's. Raises FileNotFoundError when the folder holds neither,
    ValueError when a file is damaged, another network's, or has ids that the network has not.
    """
    with undamaged(str(folder)):
        return _with_rows(_t5_tokenizer(folder), vocab_size)


def load_llama_tokenizer(folder: Path, vocab_size: int | None = None) -> PromptTokenizer:
    """A language model's, as its tokenizer.json has it, with what stands before and after a prompt.

    `vocab_size` is the network's. Raises FileNotFoundError where there is no such file, ValueError
    when it is damaged, another network's, has no token for padding, or ids that the network has
    not.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    settings = _Settings(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no language model's tokenizer: no tokenizer.json")
    with undamaged(str(path)):
        settings.require_type("BPE", "a language model")
        backend = Tokenizer.from_file(str(path))
        pad = settings.token("pad_token", "")
        if backend.token_to_id(pad) is None:
            raise ValueError(f"it has no token for padding (pad_token={pad!r})")
        length = settings.max_length(512)
        return _with_rows(PromptTokenizer(backend, pad, length, str(path)), vocab_size)


def _with_rows(tokenizer: PromptTokenizer, vocab_size: int | None) -> PromptTokenizer:
    """The same one. An id beyond the network's embedding would read its last row, or any; one that
    two tokens have is a damaged number."""
    vocab = tokenizer.backend.get_vocab()
    if len(set(vocab.values())) < len(vocab):
        twice = Counter(vocab.values()).most_common(1)[0][0]
        names = " and ".join(sorted(repr(t[:40]) for t, index in vocab.items() if index == twice))
        raise ValueError(f"{tokenizer.where} is damaged: it gives {names} the same id {twice}")
    token, largest = max(vocab.items(), key=lambda item: item[1])
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{tokenizer.where} is another model's: it gives {token[:40]!r} the id {largest}, and "
            f"the network's vocabulary (vocab_size) is {vocab_size}"
        )
    return tokenizer


def _t5_tokenizer(folder: Path) -> PromptTokenizer:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    settings = _Settings(folder)
    eos, pad = settings.token("eos_token", "</s>"), settings.token("pad_token", "<pad>")
    unk = settings.token("unk_token", "<unk>")
    count = settings.values.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= _MAX_EXTRA:
        raise ValueError(f"{folder}: extra_ids must be 0 ... {_MAX_EXTRA}, got {str(count)[:60]}")
    extra = [f"<extra_id_{i}>" for i in range(count)]
    model = settings.values.get("model")
    if model is not None:
        settings.require_type("Unigram", "T5")
        vocab = [(piece, score) for piece, score in model["vocab"]]
        charsmap = _charsmap_of(settings.values.get("normalizer"))
    elif (folder / "spiece.model").is_file():
        vocab, charsmap = read_sentencepiece(folder / "spiece.model")
        vocab += [(token, 0.0) for token in reversed(extra)]
    else:
        raise FileNotFoundError(
            f"{folder} is not a T5 tokenizer: it needs tokenizer.json or spiece.model"
        )
    if not all(math.isfinite(score) for _, score in vocab):
        raise ValueError(f"{folder} is damaged: a score of its vocabulary is not finite")
    backend = Tokenizer(Unigram(vocab, unk_id=2, byte_fallback=False))
    if charsmap:
        if hashlib.sha256(charsmap).hexdigest() not in _WHOLE_MAPS:  # 40 ms
            check_charsmap(charsmap)
        backend.normalizer = normalizers.Precompiled(charsmap)
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    backend.decoder = decoders.Metaspace(**metaspace)
    settings.add_special_tokens(backend, [eos, unk, pad, *extra])
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", eos], special_tokens=[(eos, _id(backend, eos))]
    )
    return PromptTokenizer(
        backend, pad, settings.max_length(512), settings.file(folder / "spiece.model")
    )


class _Settings:
    """What a folder's JSON files say; any of them may be missing."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"the tokenizer folder {folder} does not exist")
        self.folder = folder
        self.values: dict[str, Any] = {}
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                self.values.update(read_json(folder / name))

    def token(self, name: str, default: str) -> str:
        value = self.values.get(name) or default
        return value["content"] if isinstance(value, dict) else value

    def max_length(self, default: int) -> int:
        value = self.values.get("model_max_length", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
            raise ValueError(f"{self.folder}: model_max_length is {str(value)[:60]}")
        return int(value) if value < 1e6 else default  # transformers writes 1e30 for "none"

    def file(self, alternative: Path) -> str:
        """Where the vocabulary was read from."""
        return str(self.folder / "tokenizer.json" if "model" in self.values else alternative)

    def require_type(self, kind: str, name: str) -> None:
        """Raises ValueError for a tokenizer.json with another model than `kind`."""
        found = self.values["model"].get("type", kind)
        if found != kind:
            raise ValueError(
                f"{self.folder} holds a tokenizer of the kind {str(found)[:60]}, where {name}'s "
                f"({kind}) belongs: are tokenizer and tokenizer_2 swapped?"
            )

    def add_special_tokens(self, backend: Tokenizer, tokens: Sequence[str]) -> None:
        """Make tokens special, with the matching flags of `added_tokens_decoder` where given."""
        from tokenizers import AddedToken

        entries = {int(i): e for i, e in self.values.get("added_tokens_decoder", {}).items()}
        if not entries:
            entries = {e["id"]: e for e in self.values.get("added_tokens") or ()}
        listed = {}
        for _, entry in sorted(entries.items()):
            flags = {name: value for name, value in entry.items() if name != "id"}
            listed[entry["content"]] = AddedToken(**flags)
        for token in tokens:
            listed.setdefault(token, AddedToken(token, special=True, normalized=False))
        backend.add_tokens(list(listed.values()))


@contextmanager
def undamaged(where: str) -> Iterator[None]:
    """Whatever a damaged tokenizer makes go wrong, here or in Rust, is a ValueError that names it.

    The Rust library panics on some of them, which is no Exception in Python.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        if where in str(error) or isinstance(error, OSError):
            raise
        raise ValueError(f"{where} is damaged: {error}") from None
    except Exception as error:
        raise ValueError(f"{where} is damaged: {type(error).__name__}: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} is damaged: {error}") from None


def _charsmap_of(normalizer: dict[str, Any] | None) -> bytes:
    """The precompiled table of NFKC-like replacements inside a tokenizer.json normalizer."""
    if not normalizer:
        return b""
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return b""
