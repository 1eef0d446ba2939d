"""Tokenizers: text to token ids, BERT WordPiece and CLIP byte-pair encoding, from local files only."""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from unimed_jax.data import files
from unimed_jax.errors import DataError

# kind: (first, last, padding) special tokens. OpenAI's CLIP pads with id 0, which is an ordinary token ("!").
_SPECIALS = {"bert": ("[CLS]", "[SEP]", "[PAD]"), "clip": ("<|startoftext|>", "<|endoftext|>", "")}
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# How OpenAI's CLIP cuts text into words.
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_MERGES = 49152 - 256 - 2  # merges of OpenAI's vocabulary file that its model uses
# Of a tokenizer; the first that is there is read.
FILES = ("tokenizer.json", "vocab.txt", "bpe_simple_vocab_16e6.txt.gz")
_MAX_BYTES = 16 * 2**20  # of a tokenizer's file, unpacked; BERT's and CLIP's have up to 4 MB
_MAX_REASON = 150  # characters of a library's words, which may repeat what it read
_MAX_HOLES = 2**16  # numbers without a word; the library writes all of them out
_SPACE = re.compile(r"\s+")
_PLAIN = re.compile(r"[ -%'-~\t\n\r]*")  # printable ASCII without "&", which starts an entity


def clean(text: str) -> str:
    r"""Mends broken Unicode, unescapes HTML twice, strips and collapses white space, as OpenCLIP does.

    Example:
        >>> clean("  chest &amp;amp; abdomen\n CT ")
        'chest & abdomen CT'
    """
    # Plain text has nothing to mend, and ftfy costs more than the whole tokenizer.
    if not _PLAIN.fullmatch(text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACE.sub(" ", text).strip()


class Tokenizer:
    """Token ids at a fixed context length, with the reference's cleaning.

    Args:
        path: `tokenizer.json`, BERT's `vocab.txt`, CLIP's `bpe_simple_vocab_16e6.txt.gz`, or a folder with one.

    Raises:
        DataError: for a missing file, or one that holds no such tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = _find(Path(path))
        self._tokenizer = _read(self.path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        spec = json.loads(self._tokenizer.to_str())
        self.kind: str = {"WordPiece": "bert", "BPE": "clip"}.get(spec["model"]["type"], "")
        if not self.kind:
            raise DataError(
                f"{self.path} is a {spec['model']['type']} tokenizer", "WordPiece and BPE are read"
            )
        first, last, pad = _SPECIALS[self.kind]
        self.first_id, self.last_id = self._id(first), self._id(last)
        self.pad_id = self._id(pad) if pad else 0
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.digest = _digest(spec, self.kind, self.pad_id)

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"the vocabulary {self.path} has no {token}", "give the model's own vocabulary")
        return found

    def vocabulary(self) -> dict[str, int]:
        """The number of every word."""
        return self._tokenizer.get_vocab()

    def __reduce__(self):
        return type(self), (str(self.path),)

    def encode(self, texts: Sequence[str], context_length: int) -> Int32[np.ndarray, "n t"]:
        """Cleans, tokenizes, truncates (the first and last special token stay) and pads.

        Args:
            texts: n texts.
            context_length: t, special tokens included.

        Returns:
            Token ids, padded on the right with `pad_id`.
        """
        out = np.full((len(texts), context_length), self.pad_id, np.int32)
        for row, ids in zip(out, self._ids(texts), strict=True):
            ids = [self.first_id, *ids[: context_length - 2], self.last_id]
            row[: len(ids)] = ids
        return out

    def count(self, text: str) -> int:
        """The number of tokens before truncation, both special tokens included."""
        return len(self._ids([text])[0]) + 2

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        cleaned = [clean(t) for t in texts]
        if len(cleaned) == 1:  # a batch call starts a thread pool
            return [self._tokenizer.encode(cleaned[0], add_special_tokens=False).ids]
        return [e.ids for e in self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `tokenizer.json` into a folder, atomically; loading it gives the same digest.

        Returns:
            The path of the file.
        """
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, self._tokenizer.to_str())
        return path


@functools.lru_cache(maxsize=8)
def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """`Tokenizer(path)`, remembered for the life of the process."""
    return Tokenizer(path)


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise DataError(f"{path} holds no tokenizer", f"put one of {', '.join(FILES)} there")
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}", f"give a folder or one of {', '.join(FILES)}")
    return path


def _read(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        if path.suffix == ".txt":
            return _wordpiece(_vocabulary(path), **_casing(path))
        if path.suffix == ".gz":
            return _clip(path)
        # What was checked is what the library gets: it crashes where Python would raise.
        return Backend.from_str(json.dumps(_specification(path)))
    except DataError:
        raise
    except BaseException as e:  # the library raises plain Exception, and panics with a class of its own
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise _no_tokenizer(path, str(e)) from e


def _no_tokenizer(path: Path, why: str) -> DataError:
    line = "".join(c if c.isprintable() else " " for c in why[:_MAX_REASON])
    return DataError(f"{path} holds no tokenizer: {line}", f"give one of {', '.join(FILES)}")


def _bounded(path: Path) -> bytes:
    """The content of a file, unpacked, up to the limit."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
        data = f.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise _no_tokenizer(path, f"it has more than {_MAX_BYTES // 2**20} MB")
    return data


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_bounded(path))
    except (ValueError, RecursionError) as e:
        raise _no_tokenizer(path, f"no readable JSON: {e}") from e
    if not isinstance(value, dict):
        raise _no_tokenizer(path, "no JSON object")
    return value


def _specification(path: Path) -> dict[str, Any]:
    """A tokenizer.json whose words are texts and whose numbers leave few holes."""
    spec = _json(path)
    model, added = spec.get("model"), spec.get("added_tokens") or []
    if not isinstance(model, dict):
        raise _no_tokenizer(path, "it has no model")
    if not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path} is a {model.get('type')!r:.40} tokenizer", "WordPiece and BPE are read")
    if not isinstance(added, list) or not all(
        isinstance(t, dict) and isinstance(t.get("content"), str) for t in added
    ):
        raise _no_tokenizer(path, "its added_tokens are no list of words")
    numbered = [*model["vocab"].items(), *((t["content"], t.get("id")) for t in added)]
    limit = len(numbered) + _MAX_HOLES
    for word, number in numbered:
        if type(number) is not int or not 0 <= number < limit:
            raise _no_tokenizer(
                path, f"the number of {word!r:.40} is {number!r:.40}, not one of 0 to {limit - 1}"
            )
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown not in model["vocab"] and (unknown or model.get("type") != "BPE"):
        # The library would find out at the first unknown word; byte-level vocabularies have none, and may say "".
        raise _no_tokenizer(path, f"its word for unknown ones, {unknown!r:.40}, has no number")
    return spec


def _vocabulary(path: Path) -> dict[str, int]:
    lines = _bounded(path).decode("utf-8").split("\n")
    vocabulary = {token.rstrip("\r"): i for i, token in enumerate(lines if lines[-1] else lines[:-1])}
    if missing := [t for t in _BERT_SPECIALS if t not in vocabulary]:
        raise DataError(f"the vocabulary {path} has no {', '.join(missing)}", "give BERT's vocab.txt")
    return vocabulary


def _casing(path: Path) -> dict[str, bool]:
    options = path.with_name("tokenizer_config.json")
    if not options.is_file():
        return {}
    return {"lowercase": bool(_json(options).get("do_lower_case", True))}


def _wordpiece(vocabulary: dict[str, int], *, lowercase: bool = True) -> Any:
    """BERT's tokenizer: clean, split Chinese, lower case and strip accents (when uncased), then WordPiece."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([t for t in _BERT_SPECIALS if t in vocabulary])
    return backend


def _byte_letters() -> list[str]:
    """One printable character for each byte, printable bytes standing for themselves and first (GPT-2's alphabet)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in own] + [chr(256 + i) for i in range(256 - len(own))]


def _clip(path: Path) -> Any:
    """CLIP's tokenizer from OpenAI's list of merges: lower case, byte letters, `</w>` ends a word."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    lines = _bounded(path).decode("utf-8").split("\n", _CLIP_MERGES + 1)[1 : _CLIP_MERGES + 1]
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines) if b]
    letters = _byte_letters()
    words = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), *_SPECIALS["clip"][:2]]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(
        models.BPE(
            vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=words[-1]
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(words[-2:])
    return backend


def _digest(spec: dict[str, Any], kind: str, pad_id: int) -> str:
    """SHA-256 over the vocabulary and everything that changes ids; not over truncation, padding and templates."""
    parts = {k: spec.get(k) for k in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    text = json.dumps([kind, pad_id, parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: str | os.PathLike[str]) -> Tokenizer:
    """Learns an uncased WordPiece vocabulary from captions and saves it as `folder/tokenizer.json`.

    The same texts give the same vocabulary. [PAD] is 0.

    Args:
        texts: captions; cleaned here.
        vocab_size: entries at most, the five special tokens included.
        folder: where `tokenizer.json` goes.

    Raises:
        DataError: if not even the letters fit.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    rules = _wordpiece({"[UNK]": 0})
    normalize, split = rules.normalizer.normalize_str, rules.pre_tokenizer.pre_tokenize_str
    words = [word for text in texts for word, _ in split(normalize(clean(text)))]
    letters = sorted(set("".join(words)))
    # The trainer numbers letters in the order of a randomly seeded hash table, and breaks ties between merges by
    # number; naming all letters beforehand makes it deterministic.
    known = [*_BERT_SPECIALS, *letters, *("##" + c for c in letters)]
    if len(known) > vocab_size:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small for {len(letters)} letters", f"{len(known)} or more"
        )
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=known, show_progress=False)
    backend.train_from_iterator(words, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    learned = backend.get_vocab()
    backend = _wordpiece({word: i for i, word in enumerate(sorted(learned, key=learned.__getitem__))})
    files.write_text(folder / "tokenizer.json", backend.to_str())
    return Tokenizer(folder / "tokenizer.json")
