"""Text to tokens and back without loss: the bytes themselves, or subwords that spell them.

Every token stands for one string of bytes, whatever stands beside it. So what a model is scored on is a number of bytes
too, and bits per byte compare across tokenizers. A tokenizer that loses something (one that lower-cases, or has a token
for unknown words) is refused.

Subwords are byte-level byte-pair encodings (Sennrich et al., 2016, arXiv 1508.07909; of bytes as in GPT-2: Radford et
al., 2019), by the `tokenizers` library. One that is trained, and the tokens of every text, are kept in the cache folder
under a hash of all that they depend on: the text, the tokenizer, the library's version.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xformers_lab import files, spec
from xformers_lab.errors import UsageError

DEFAULT_VOCAB = 4096
_VOCABS = range(257, 2**20 + 1)
_LARGEST = 700.0  # nats, of which no float holds the exponential of many more
_CHUNK = 2**16  # bytes that are encoded as one text
_AT_ONCE = 64  # chunks that the library encodes side by side
_HOW = "tokens=bytes, tokens=bpe, tokens=(file:PATH) with a tokenizer.json, or tokens=(hub:MODEL)"
# What a decoder reads of bytes that are no UTF-8: surrogates that no text has.
_INVALID = re.compile("([\udc80-\udcff]+)")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenizer. spelled: the bytes of each token; how: where it comes from, in words; digest: a sha256 of it;
    tokenizer: the library's. Bytes need no tokenizer: they have neither."""

    task: str
    choice: str
    spelled: Sequence[bytes]
    how: str = ""
    digest: str | None = None
    tokenizer: Any = None

    @property
    def vocab(self) -> int:
        return len(self.spelled)

    @property
    def unit(self) -> str:
        """What several are called."""
        return "bytes" if self.tokenizer is None else "tokens"

    def named(self, first: int = 0) -> str:
        """What tells its tokens, the lowest of which is given this number, from those of any other tokenizer."""
        name = "bytes" if self.digest is None else f"{self.vocab:,} subwords {self.digest[:12]}"
        return f"{name} from {first} on" if first else name

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """How many bytes each token stands for, (vocab,) float32."""
        return np.array([len(spelling) for spelling in self.spelled], np.float32)

    def count(self, tokens: np.ndarray) -> int:
        """How many bytes these tokens stand for."""
        return int(self.sizes.astype(np.int64)[tokens].sum())

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a text (n,), which spell exactly it; raises UsageError where they cannot."""
        return np.frombuffer(text, np.uint8) if self.tokenizer is None else self._encoded([text])

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each text. They are kept in the cache folder, one text after the other, and read from there in
        place; what cannot be kept is done without."""
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        if self.tokenizer is None:
            return [np.frombuffer(text, np.uint8) for text in texts]
        kept = _kept(["tokens", self.digest, _library(self.task, self.choice).__version__], texts, ".npy")
        tokens = self._read(kept, texts)
        if tokens is None:
            tokens, content = self._encoded(texts), io.BytesIO()
            np.save(content, tokens)
            with contextlib.suppress(OSError):
                files.replace_bytes(kept, content.getbuffer())
        # Tokens spell whole texts, so the bytes that were read up to each say whose it is.
        read = np.cumsum(self.sizes.astype(np.int64)[tokens])
        ends = np.where(ends > 0, np.searchsorted(read, ends) + 1, 0)
        return [tokens[start:end] for start, end in zip(np.append(0, ends), ends, strict=False)]

    def decode(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.spelled[token] for token in tokens)

    def bytes_per_token(self, tokens: np.ndarray) -> float:
        return self.count(tokens) / max(len(tokens), 1)

    def describe(self) -> dict:
        """What identifies it, for a task's `describe`; nothing for bytes, which need no tokenizer."""
        return {} if self.digest is None else {"tokens": {"vocab": self.vocab, "sha256": self.digest}}

    def reading(self, training: np.ndarray) -> list[str]:
        """What is to be said of it, given the tokens of the training split."""
        if self.digest is None:
            return []
        compressed = f"{self.bytes_per_token(training):.2f} bytes per token of the training split"
        return [f"tokens: {self.vocab:,} of {self.choice}, {self.how}, sha256 {self.digest[:12]}, {compressed}"]

    def unigram(self, training: np.ndarray, scored: np.ndarray) -> float:
        """Bits per byte of `scored` for guessing by the counts of tokens in `training`, one added to each."""
        counts = np.bincount(training, minlength=self.vocab) + 1.0
        bits = -np.log2(counts / counts.sum())
        return float(bits @ np.bincount(scored, minlength=self.vocab)) / self.count(scored)

    def _read(self, kept: pathlib.Path, texts: Sequence[bytes]) -> np.ndarray | None:
        """The tokens in a file of the cache; None where there is none, or a damaged one."""
        try:
            tokens = np.load(kept, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        sound = tokens.ndim == 1 and tokens.dtype.kind == "u" and (not len(tokens) or tokens.max() < self.vocab)
        return tokens if sound and self.count(tokens) == sum(map(len, texts)) else None

    def _encoded(self, texts: Sequence[bytes]) -> np.ndarray:
        chunks, tokens = [chunk for text in texts for chunk in _chunks(text)], []
        for start in range(0, len(chunks), _AT_ONCE):
            some = chunks[start : start + _AT_ONCE]
            parts = [part for chunk in some for part in _parts(chunk)]
            valid = [part for part in parts if not _INVALID.match(part)]
            encoded = iter(self.tokenizer.encode_batch_fast(valid, add_special_tokens=False))
            ids: list[int] = []
            for part in parts:
                ids += self._of_bytes(part) if _INVALID.match(part) else next(encoded).ids
            self._check(b"".join(some), self.decode(ids))
            tokens.append(np.array(ids, np.uint16 if self.vocab <= 2**16 else np.uint32))
        return np.concatenate([np.zeros(0, np.uint16), *tokens])

    def _of_bytes(self, part: str) -> list[int]:
        """A token for each byte of what is no UTF-8."""
        content = part.encode("utf-8", "surrogateescape")
        if missing := [byte for byte in content if byte not in self._single]:
            raise UsageError(
                f"{self.task}: tokens={self.choice} has no token for the byte 0x{missing[0]:02x}, and the text is no "
                "UTF-8 there: use tokens=bytes, or turn the text into UTF-8"
            )
        return [self._single[byte] for byte in content]

    @functools.cached_property
    def _single(self) -> dict[int, int]:
        return {spelling[0]: token for token, spelling in enumerate(self.spelled) if len(spelling) == 1}

    def _check(self, text: bytes, spelled: bytes) -> None:
        """Raises UsageError where tokens spell another text."""
        if spelled == text:
            return
        pairs = enumerate(zip(text, spelled, strict=False))
        at = next((at for at, (one, other) in pairs if one != other), min(len(text), len(spelled)))
        was, became = (part[at : at + 16].decode(errors="replace") for part in (text, spelled))
        raise UsageError(
            f"{self.task}: tokens={self.choice} does not spell the text back: {was!r} became {became!r}; bits per byte "
            "need a tokenizer that loses nothing: tokens=bpe trains one, tokens=bytes needs none"
        )


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats for each token."""
    return math.exp(loss) if loss < _LARGEST else math.inf


def of(task: str, choice: str, vocab: int | None, training: Callable[[], Sequence[bytes]]) -> Tokens:
    """The tokenizer that `tokens=` names; training() gives the texts that a bpe of up to `vocab` tokens is trained on.
    Raises ValueError where the options do not fit, UsageError where it cannot be had."""
    if choice != "bpe" and vocab is not None:
        raise ValueError(f"vocab={vocab} is of tokens=bpe, which is trained: give that, or drop it")
    if choice == "bytes":
        return Tokens(task, choice, [bytes([byte]) for byte in range(256)])
    if choice == "bpe":
        wanted = DEFAULT_VOCAB if vocab is None else vocab
        if wanted not in _VOCABS:
            raise ValueError(f"vocab={wanted}: use {_VOCABS[0]} to {_VOCABS[-1]:,}, since 256 are the bytes themselves")
        return _trained(task, wanted, training())
    kind, _, name = choice.partition(":")
    if kind == "hub" and name:
        place = _from_hub(task, choice, name)
    elif (kind == "file" and name) or choice.endswith(".json"):
        place = spec.located(name if kind == "file" else choice, f"{task}: tokens={choice}")
    else:
        raise ValueError(f"tokens={choice}: use {_HOW}")
    try:
        content = place.read_bytes()
        tokenizer = _library(task, choice).Tokenizer.from_buffer(content)
    except OSError as error:
        raise UsageError(f"{task}: tokens={choice}: {place} cannot be read: {error.strerror}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{task}: tokens={choice}: {place} is no tokenizer.json: {reason}") from None
    return _made(task, choice, tokenizer, "as given", hashlib.sha256(content).hexdigest())


def _trained(task: str, vocab: int, texts: Sequence[bytes]) -> Tokens:
    """A byte-pair encoding trained on these texts, or the one in the cache that was."""
    library, how = _library(task, "bpe"), "trained on the training split"
    kept = _kept(["bpe", vocab, library.__version__], texts, ".json")
    try:
        tokenizer = library.Tokenizer.from_buffer(kept.read_bytes())
        how += " (read from the cache)"
    except (OSError, ValueError):
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab, initial_alphabet=list(_ALPHABET), special_tokens=[], show_progress=False
        )
        parts = (part for text in texts for chunk in _chunks(text) for part in _parts(chunk))
        tokenizer.train_from_iterator((part for part in parts if not _INVALID.match(part)), trainer)
        with contextlib.suppress(OSError):
            files.replace_text(kept, tokenizer.to_str())
    return _made(task, "bpe", tokenizer, how, hashlib.sha256(tokenizer.to_str().encode()).hexdigest())


def _made(task: str, choice: str, tokenizer: Any, how: str, digest: str) -> Tokens:
    """Raises UsageError where tokens are no strings of bytes."""
    about = json.loads(tokenizer.to_str())
    if "ByteLevel" not in _kinds(about["pre_tokenizer"]) | _kinds(about["decoder"]):
        raise UsageError(
            f"{task}: tokens={choice} is no byte-level tokenizer, so it may lose some of a text, and bits per byte "
            "need all of it: give one such as GPT-2's or Llama 3's, or tokens=bpe, which trains one"
        )
    about |= {"truncation": None, "padding": None}
    about["model"]["dropout"] = None  # the same text has the same tokens, each time
    added = {token["id"]: token["content"].encode() for token in about["added_tokens"]}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    spelled = [b""] * (max(ids.values()) + 1)
    for token, number in ids.items():
        known = number not in added and all(mark in _ALPHABET for mark in token)
        spelled[number] = bytes(_ALPHABET[mark] for mark in token) if known else added.get(number, token.encode())
    made = _library(task, choice).Tokenizer.from_str(json.dumps(about))
    return Tokens(task, choice, spelled, how, digest, made)


def _kinds(part: Any) -> set[str]:
    """The types of a part of a tokenizer.json and of all that it is made of."""
    if isinstance(part, dict):
        return {part.get("type", "")}.union(*map(_kinds, part.values()))
    return set().union(*map(_kinds, part)) if isinstance(part, list) else set()


def _from_hub(task: str, choice: str, name: str) -> pathlib.Path:
    """The tokenizer.json of a model on the hub; raises UsageError where it cannot be had."""
    _library(task, choice)
    import huggingface_hub  # which tokenizers and datasets need

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except (OSError, ValueError) as error:  # all that it raises: no connection, no such model, no such file, no name
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{task}: tokens=({choice}) is not available: connect this machine (and unset HF_HUB_OFFLINE), or give its "
            f"tokenizer.json with tokens=(file:PATH) ({type(error).__name__}: {reason})"
        ) from None


def _library(task: str, choice: str) -> Any:
    """The library of tokenizers; raises UsageError where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise UsageError(
            f"{task}: tokens={choice} needs the tokenizers library: pip install 'xformers_lab[text]', or use "
            "tokens=bytes"
        ) from None
    return tokenizers


def _kept(about: list, texts: Sequence[bytes], ending: str) -> pathlib.Path:
    """The file of the cache for what depends on this and on these texts."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for text in texts:
        digest.update(b"%d " % len(text) + text)
    return files.cache("tokens") / f"{digest.hexdigest()[:32]}{ending}"


def _chunks(text: bytes) -> Iterator[bytes]:
    """A text in pieces, which end after a line where there is one, and else after a character."""
    start = 0
    while start < len(text):
        end = start + _CHUNK
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
            while end > start + 1 and text[end] & 0xC0 == 0x80:
                end -= 1
        yield text[start:end]
        start = end


def _parts(chunk: bytes) -> list[str]:
    """Text, and between it the bytes that are no UTF-8, as surrogates."""
    return [part for part in _INVALID.split(chunk.decode("utf-8", "surrogateescape")) if part]


def _alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level tokenizer stands for: printable ones for themselves, the others, in
    their order, from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()
