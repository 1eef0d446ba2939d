"""data/text.py: ids equal to transformers', the reference's cleaning, one file and one digest."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest

from unimed_jax.data import text
from unimed_jax.data.text import Tokenizer, clean, load_tokenizer, train_wordpiece
from unimed_jax.errors import DataError

CAPTIONS = [
    "Frontal chest X-ray showing a 12mm nodule in the left upper lobe.",
    "Axial CT of the abdomen, portal-venous phase; no free fluid.",
    "H&E stained section: poorly differentiated adenocarcinoma (Ki-67 > 80%).",
    "Fundus photograph of the right eye with micro-aneurysms and exudates.",
    "T2-weighted MRI, coronal plane, of a 54-year-old woman's brain.",
]
ODD = [
    "",
    "   ",
    "ÜBERMÄSSIG große Läsion, naïve coöperation",
    "胸部X線写真 with 肺炎",
    "Ελληνικά кириллица العربية עברית हिन्दी",
    "emoji 😀🏥 and zero\u200bwidth, soft\u00adhyphen",
    "tabs\tand\nnew\r\nlines\u00a0nbsp",
    "punct!!! ... '' \"\" (((nested)))—dash–dash",
    "a" * 150 + " long",
    "word " * 300,
    "ﬁbrosis ﬂow ½ ² µm Å",
    "it's they're I'll you've he'd we'm",
    "[CLS] literal [SEP] [MASK] specials",
    "<|startoftext|> and <|endoftext|>",
    "CamelCase123 4567.89 10^6/µL",
]

MERGES = "t h|th e</w>|c h|e s|ch es|ches t</w>|i n|in g</w>|x r|a y</w>|xr ay</w>|l u|lu n|lun g</w>|o f</w>|1 2</w>"


@pytest.fixture(scope="module")
def bert_vocab(tmp_path_factory):
    """A WordPiece vocabulary in BERT's file format, with letters of many scripts and its specials out of order."""
    words = sorted({w for c in CAPTIONS for w in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", c.lower())})
    letters = sorted(set("".join(CAPTIONS + ODD).lower()) - set(" \t\n\r\u00a0"))
    tokens = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokens += [t for c in letters for t in (c, "##" + c) if t not in tokens]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def clip_merges(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.write('"#version: 0.2\n' + MERGES.replace("|", "\n") + "\n")
    return path


def padded(ids, n, pad):
    return np.array(ids + [pad] * (n - len(ids)), np.int32)


@pytest.mark.parametrize("n", [8, 64, 256])
def test_bert_ids_equal_transformers(bert_vocab, n):
    from transformers import BertTokenizer

    ours, theirs = Tokenizer(bert_vocab), BertTokenizer.from_pretrained(bert_vocab.parent)
    assert (ours.first_id, ours.last_id, ours.pad_id) == (3, 4, 0)  # from the vocabulary, not 101 and 102
    got = ours.encode(CAPTIONS + ODD, n)
    assert got.dtype == np.int32
    assert got.shape == (len(CAPTIONS + ODD), n)
    for row, caption in zip(got, CAPTIONS + ODD, strict=True):
        want = theirs(clean(caption), max_length=n, padding="max_length", truncation=True)["input_ids"]
        np.testing.assert_array_equal(row, want, err_msg=caption)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("n", [8, 77])
def test_clip_ids_equal_transformers(clip_merges, n):
    from transformers import CLIPTokenizer

    ours = Tokenizer(clip_merges)
    theirs = CLIPTokenizer(
        vocab=ours._tokenizer.get_vocab(), merges=[tuple(m.split(" ")) for m in MERGES.split("|")]
    )
    assert ours.kind == "clip"
    assert ours.vocab_size == 512 + 16 + 2
    assert (ours.first_id, ours.last_id, ours.pad_id) == (528, 529, 0)
    for row, caption in zip(ours.encode(CAPTIONS + ODD, n), CAPTIONS + ODD, strict=True):
        ids = theirs(clean(caption), max_length=n, truncation=True)["input_ids"]
        np.testing.assert_array_equal(row, padded(ids, n, 0), err_msg=caption)
        if "<|" not in caption:
            assert (
                row.argmax() == len(ids) - 1
            )  # the end of the text is the largest id, also after truncation


def test_clip_alphabet_is_gpt2s():
    letters = text._byte_letters()
    assert len(set(letters)) == 256
    assert letters[:3] == ["!", '"', "#"]
    assert letters[188] == "Ā"  # byte 0
    assert letters.index("Ġ") == 188 + 32  # a space


@pytest.mark.assets
def test_real_minilm_vocabulary_equals_transformers(assets):
    from transformers import BertTokenizer

    folder = assets / "minilm"
    ours, theirs = Tokenizer(folder / "tokenizer.json"), BertTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.first_id, ours.last_id) == (30522, 101, 102)
    for row, caption in zip(ours.encode(CAPTIONS + ODD, 64), CAPTIONS + ODD, strict=True):
        want = theirs(clean(caption), max_length=64, padding="max_length", truncation=True)["input_ids"]
        np.testing.assert_array_equal(row, want, err_msg=caption)
    assert Tokenizer(folder / "vocab.txt").digest == ours.digest


@pytest.mark.parametrize("kind", ["bert_vocab", "clip_merges"])
def test_saved_as_one_file_with_the_same_digest_and_ids(kind, request, tmp_path):
    first = Tokenizer(request.getfixturevalue(kind))
    path = first.save(tmp_path / "a folder")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    again = Tokenizer(path.parent)
    assert again.digest == first.digest
    assert (again.kind, again.pad_id, again.vocab_size) == (first.kind, first.pad_id, first.vocab_size)
    np.testing.assert_array_equal(again.encode(CAPTIONS + ODD, 40), first.encode(CAPTIONS + ODD, 40))
    pickled = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(pickled.encode(ODD, 40), first.encode(ODD, 40))


def test_swapped_lines_change_the_digest(bert_vocab, tmp_path):
    lines = bert_vocab.read_text(encoding="utf-8").splitlines()
    lines[20], lines[21] = lines[21], lines[20]
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    assert Tokenizer(tmp_path).digest != Tokenizer(bert_vocab).digest


def test_truncation_and_padding_stored_in_a_file_do_not_matter(bert_vocab, tmp_path):
    first = Tokenizer(bert_vocab)
    spec = json.loads(first.save(tmp_path).read_text(encoding="utf-8"))
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    again = Tokenizer(tmp_path)
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.encode(CAPTIONS, 40), first.encode(CAPTIONS, 40))


def test_count_is_the_length_before_truncation(bert_vocab, clip_merges):
    for tokenizer in (Tokenizer(bert_vocab), Tokenizer(clip_merges)):
        for caption in CAPTIONS + ODD:
            ids = tokenizer.encode([caption], 2000)[0]
            assert tokenizer.count(caption) == int(np.flatnonzero(ids == tokenizer.last_id)[-1]) + 1
        assert tokenizer.count("") == 2


def test_cased_vocabulary(bert_vocab, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(bert_vocab.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased, uncased = Tokenizer(tmp_path), Tokenizer(bert_vocab)
    assert (cased.encode(["chest"], 8) == uncased.encode(["CHEST"], 8)).all()
    assert (cased.encode(["CHEST"], 8) != uncased.encode(["CHEST"], 8)).any()
    assert cased.digest != uncased.digest


def reference_clean(value):
    """OpenCLIP's basic_clean and whitespace_clean, written out independently."""
    import html

    value = html.unescape(html.unescape(ftfy.fix_text(value))).strip()
    return re.sub(r"\s+", " ", value).strip()


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("schÃ¶n", "schön"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("  a \n\t b  ", "a b"),
        ("Crohn\x92s", "Crohn's"),
        ("Keeps CASE", "Keeps CASE"),
        ("\x1b[31mred", "red"),
    ],
)
def test_clean(dirty, expected):
    assert clean(dirty) == expected == reference_clean(dirty)


def test_the_fast_road_of_clean_equals_the_whole_one():
    rng = random.Random(0)
    ascii_soup = [chr(i) for i in range(128)] + ["&amp;", "&#39;", "<b>", "\r\n", "  "] * 5
    mixed = [*ascii_soup, "ä", "Ã¶", "\u2019", "\u00a0", "中"]
    for alphabet in (ascii_soup, mixed, "abc xyz,.-\n\t", "ab \x1c\x1f\x0b\x0c"):
        for _ in range(400):
            value = "".join(rng.choice(alphabet) for _ in range(rng.randrange(30)))
            assert clean(value) == reference_clean(value), repr(value)


def test_trained_wordpiece_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys\nfrom unimed_jax.data.text import train_wordpiece\n"
        f"print(train_wordpiece({CAPTIONS!r} * 3, 150, sys.argv[1]).digest)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(i))],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for i in range(3)
    ]
    assert len(set(runs)) == 1
    assert (tmp_path / "0" / "tokenizer.json").read_bytes() == (
        tmp_path / "2" / "tokenizer.json"
    ).read_bytes()


def test_trained_wordpiece_learns_whole_words(tmp_path):
    tokenizer = train_wordpiece(
        ["chest radiograph", "chest film", "chest radiograph of a child"] * 20, 90, tmp_path
    )
    assert tokenizer.vocab_size <= 90
    assert (tokenizer.pad_id, tokenizer.first_id, tokenizer.last_id) == (0, 2, 3)
    assert tokenizer.count("Chest radiograph") == 4
    assert tokenizer.count("xyz") == 3  # letters never seen: one unknown word
    assert load_tokenizer(tmp_path).digest == tokenizer.digest


def test_a_vocabulary_too_small_for_the_letters_is_refused(tmp_path):
    with pytest.raises(DataError, match="too small for"):
        train_wordpiece(CAPTIONS, 20, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refusals_are_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer(tmp_path / "missing.json")
    with pytest.raises(DataError, match="holds no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(DataError, match="holds no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("just\nwords\n")
    with pytest.raises(DataError, match=r"has no \[PAD\]"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="holds no tokenizer"):
        Tokenizer(tmp_path)


SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def specification(**model) -> dict:
    vocab = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "axial"))}
    wordpiece = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocab,
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "[PAD]", **SPECIAL}],
        "model": wordpiece | model,
    }


def vocabulary(**more) -> dict:
    return specification(vocab=specification()["model"]["vocab"] | more)


DAMAGE = {
    "a number near 2**32": (vocabulary(x=4294967290), "number of 'x' is 4294967290, not one of 0 to 6554"),
    "a negative number": (vocabulary(x=-1), "number of 'x' is -1"),
    "a fraction": (vocabulary(x=1.5), "number of 'x' is 1.5"),
    "yes": (vocabulary(x=True), "number of 'x' is True"),
    "a text": (vocabulary(x="1"), "number of 'x' is '1'"),
    "a word without end": (vocabulary(**{"y\n" * 10_000: -1}), "number of 'y"),
    "CLIP's kind": (
        specification(type="BPE", merges=[], vocab={"<|endoftext|>": 0, "x": 4294967290}),
        "4294967290",
    ),
    "an added word": (
        specification() | {"added_tokens": [{"id": 4294967290, "content": "zz", **SPECIAL}]},
        "number of 'zz' is 4294967290",
    ),
    "an added number": (
        specification() | {"added_tokens": [{"id": 5, "content": 5, **SPECIAL}]},
        "no list of words",
    ),
    "added nothing": (specification() | {"added_tokens": [7]}, "no list of words"),
    "no vocabulary": (specification(vocab=[["a", 0.0]], type="Unigram"), "is a 'Unigram' tokenizer"),
    "no model": ({"version": "1.0"}, "it has no model"),
    "a list": ([1, 2], "no JSON object"),
    "no word for unknown ones": (specification(unk_token="zebra"), "'zebra', has no number"),
    "an empty word for unknown ones": (specification(unk_token=""), "'', has no number"),
    "CLIP's word for unknown ones": (
        specification(type="BPE", merges=[], unk_token="zz"),
        "'zz', has no number",
    ),
    "a long value that the library repeats": (
        specification(max_input_chars_per_word="\x1b" * 100_000),
        "invalid type: string",
    ),
    "a panic of the library": (
        specification() | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "precompiled_charsmap",
    ),
}

READ_ALL = """
import sys
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError
for path in sys.argv[1:]:
    try:
        Tokenizer(path)
        print("read")
    except DataError as e:
        print(e.line())
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def read_all(*paths) -> tuple[list[str], int]:
    """What a process of its own says of each file, and its peak of memory in bytes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    argv = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, peak = done.stdout.splitlines()
    return lines, int(peak) * 1024


def test_damaged_vocabularies_are_refused_before_the_library_crashes(tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(len(DAMAGE) + 1)]
    for path, (spec, _) in zip(paths, [*DAMAGE.values(), (specification(), "")], strict=True):
        path.write_text(json.dumps(spec))
    lines, _ = read_all(*paths)
    assert lines.pop() == "read"
    for path, line, (name, (_, words)) in zip(paths, lines, DAMAGE.items(), strict=False):
        assert str(path) in line, name
        assert words in line, name
        assert len(line) < 400, name
        assert line.isprintable(), name


def test_files_that_are_deep_or_large_once_unpacked_are_refused(tmp_path):
    deep, bomb, wide = tmp_path / "deep.json", tmp_path / "bomb.txt.gz", tmp_path / "vocab.txt"
    deep.write_text('{"model": ' + "[" * 1_000_000)
    bomb.write_bytes(gzip.compress(bytes(2**20), 1) * 400)
    assert bomb.stat().st_size < 2**21
    wide.write_bytes(b"a\n" * 2**23 + b"b")
    lines, peak = read_all(deep, bomb, wide)
    assert "deep.json holds no tokenizer: no readable JSON" in lines[0]
    assert "bomb.txt.gz holds no tokenizer: it has more than 16 MB" in lines[1]
    assert "vocab.txt holds no tokenizer: it has more than 16 MB" in lines[2]
    assert peak < 300 * 2**20
