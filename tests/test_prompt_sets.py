"""The prompts of the public data sets: complete, in class order, our own, and not changed without a new version."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest

from unimed_jax.config import MODALITIES
from unimed_jax.data.minimed import captions as minimed
from unimed_jax.data.phantom import Phantom
from unimed_jax.errors import UsageError
from unimed_jax.evaluate import tasks

FOLDER = tasks.FOLDER / "unimed21"
GOLDEN = Path(__file__).parent / "golden" / "prompt_sets.json"

ORGANS = (
    "heart", "left lung", "right lung", "liver", "spleen", "pancreas", "left kidney", "right kidney", "bladder",
    "left femoral head", "right femoral head",
)  # fmt: skip
GRADES = ("no_dr", "mild_dr", "moderate_dr", "severe_dr", "full_stage4_dr")
SKIN_TUMORS = (
    "tumor_skin_epithelial_sqcc", "tumor_skin_melanoma_melanoma", "tumor_skin_epithelial_bcc",
    "tumor_skin_naevus_naevus",
)  # fmt: skip
# The data sets' own classes, in the order of their indices.
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "chexpert-5x200": (
        "X-ray",
        ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
    ),
    "rsna_pneumonia": ("X-ray", ("Normal", "Pneumonia")),
    "CT_axial": ("CT", ORGANS),
    "CT_coronal": ("CT", ORGANS),
    "CT_sagittal": ("CT", ORGANS),
    "acl_mri": ("MRI", ("no", "yes")),
    "meniscal_mri": ("MRI", ("no", "yes")),
    "breast_us": ("Ultrasound", ("benign", "malignant")),
    "thyroid_us": ("Ultrasound", ("benign", "malignant")),
    "refuge_retina": ("Fundus", ("no glaucoma", "glaucoma")),
    "five_retina": (
        "Fundus",
        ("age related macular degeneration", "diabetic retinopathy", "glaucoma", "normal"),
    ),
    "odir_retina": ("Fundus", ("normal", "pathologic myopia", "cataract")),
    "dr_regular": ("Fundus", GRADES),
    "dr_uwf": ("Fundus", GRADES),
    "LC25000_lung": (
        "Histopathology",
        ("Lung adenocarcinoma", "Benign lung", "Lung squamous cell carcinoma"),
    ),
    "LC25000_colon": ("Histopathology", ("Colon adenocarcinoma", "Benign colonic tissue")),
    "PCAM": ("Histopathology", ("Lymph node", "Lymph node containing metastatic tumor tissue")),
    "NCK_CRC": ("Histopathology", ("ADI", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")),
    "BACH": (
        "Histopathology",
        (
            "Breast non-malignant benign tissue",
            "Breast malignant in-situ carcinoma",
            "Breast malignant invasive carcinoma",
            "Breast normal breast tissue",
        ),
    ),
    "SICAPv2": (
        "Histopathology",
        (
            "Benign glands",
            "Atrophic dense glands",
            "Cribriform ill-formed fused papillary patterns",
            "Isolated nest cells without lumen rosetting patterns",
        ),
    ),
    "Osteo": ("Histopathology", ("Normal non-tumor", "Necrotic", "Tumor")),
    "skin_cancer": (
        "Histopathology",
        (
            "nontumor_skin_necrosis_necrosis",
            "nontumor_skin_muscle_skeletal",
            "nontumor_skin_sweatglands_sweatglands",
            "nontumor_skin_vessel_vessel",
            "nontumor_skin_elastosis_elastosis",
            "nontumor_skin_chondraltissue_chondraltissue",
            "nontumor_skin_hairfollicle_hairfollicle",
            "nontumor_skin_epidermis_epidermis",
            "nontumor_skin_nerves_nerves",
            "nontumor_skin_subcutis_subcutis",
            "nontumor_skin_dermis_dermis",
            "nontumor_skin_sebaceousglands_sebaceousglands",
            *SKIN_TUMORS,
        ),
    ),
    "skin_tumor": ("Histopathology", SKIN_TUMORS),
}

# What names a class in a sentence, in the order of the classes. Where it occurs in a sentence of another class, it
# must be denied, or be a landmark.
_BENIGN = r"\b(benign|normal|healthy|noncancerous|harmless)"
_CANCER = r"\b(malignan|cancer|carcinoma|adenocarcinoma|tumor(?!-free)|metasta)"
_TORN = (r"\b(intact|normal|healthy|preserved)", r"\b(torn|tear|ruptur|disrupt|discontin|frayed|cleft)")
_GRADES = (
    r"\b(healthy|grade 0|no retinopathy|no apparent|retinopathy absent)",
    r"\b(mild|grade 1|minimal)\b",
    r"\b(moderate|grade 2|intermediate)\b",
    r"\b(severe|grade 3|preproliferative)\b",
    r"\b(proliferative|PDR|neovascular\w+|new vessels|grade 4)\b",
)
_SKIN_TUMORS = (
    r"\b(squamous|SCC|keratin)",
    r"\bmelanoma|malignant melano",
    r"\b(basal cell|BCC|basal(oid|ioma))",
    r"\b(nev[iu]|mole\b|benign)",
)
TERMS: dict[str, tuple[str, ...]] = {
    "chexpert-5x200": (
        r"atelecta|collaps",
        r"cardiomegaly|enlarged (heart|cardiac)|cardiac enlargement|big heart",
        r"consolidat|pneumonia",
        r"edema|congesti",
        r"effusion|pleural fluid|hydrothorax",
    ),
    "rsna_pneumonia": (
        r"\b(normal|healthy|unremarkable|nothing acute)",
        r"pneumoni|infect|infiltrate|opacit|consolidat",
    ),
    **dict.fromkeys(("CT_axial", "CT_coronal", "CT_sagittal"), tuple(rf"\b{o}\b" for o in ORGANS)),
    "acl_mri": _TORN,
    "meniscal_mri": _TORN,
    "breast_us": (
        r"\b(benign|harmless|noncancerous|fibroadenoma|cyst)",
        _CANCER + "|spiculat|suspicious|invasive",
    ),
    "thyroid_us": (
        r"\b(benign|harmless|cyst|spongiform|colloid)",
        r"\b(malignan|cancer|carcinoma|suspicious)|spiculat|microcalc",
    ),
    "refuge_retina": (r"\b(nonglaucomatous|healthy|normal|without glaucoma)", r"\bglaucom"),
    "five_retina": (
        r"\b(macular degeneration|AMD|drusen)",
        r"\b(diabet|microaneurysm|exudate)",
        r"glaucom|cupped|excavated|hollowed",
        r"\b(normal|healthy|unremarkable|ordinary)",
    ),
    "odir_retina": (
        r"\b(normal|healthy|unremarkable)",
        r"myop|staphyloma|tessellat|nearsighted",
        r"cataract|\blens\b|\bhaz[ey]|clouded|milky",
    ),
    "dr_regular": _GRADES,
    "dr_uwf": _GRADES,
    "LC25000_lung": (r"adenocarcinoma|\bgland", _BENIGN, r"squamous|keratin|epidermoid"),
    "LC25000_colon": (_CANCER, _BENIGN),
    "PCAM": (r"tumor-free|negative|\b(benign|normal|reactive)", _CANCER),
    "NCK_CRC": (
        r"adipo|\bfat",
        r"debris|necro",
        r"lymph",
        r"\bmuc(in|us)",
        r"musc(le|ular)",
        r"\b(normal|healthy|noncancerous)",
        r"stroma|desmopla",
        _CANCER + "|neoplas",
    ),
    "BACH": (
        r"\b(benign|noncancerous|fibroadenoma|fibrocystic)",
        r"in situ|DCIS|preinvasive",
        r"\b(invasive|infiltrat)",
        r"\b(normal|healthy|unaltered|physiological)",
    ),
    "SICAPv2": (
        r"\b(benign|noncancerous|healthy|negative)",
        r"Gleason (pattern )?3|grade 3|low-grade",
        r"Gleason (pattern )?4|grade 4|\b(fused|cribriform)",
        r"Gleason (pattern )?5|grade 5|lacking lumina|single cells",
    ),
    "Osteo": (
        r"\b(normal|healthy|uninvolved|benign|non-neoplastic)",
        r"necro|non-viable|\bdead\b",
        r"(?<!non-)\b(viable|living|active)\b|anaplastic|\bmitoses",
    ),
    "skin_cancer": (
        r"necro|devitalized",
        r"muscle",
        r"sweat|eccrine|apocrine",
        r"vessel|\bvascular|arteri|venule",
        r"elasto|solar|photoag",
        r"cartilag|chondr",
        r"hair|follic",
        r"epiderm(is|al)",
        r"nerve",
        r"subcut|hypoderm|adipo",
        r"\bderm(is|al)\b",
        r"sebaceous|sebum|sebocyt",
        *_SKIN_TUMORS,
    ),
    "skin_tumor": _SKIN_TUMORS,
}
DENIED = re.compile(r"\b(no|not|without|free of|neither|nor|nothing|never|negative for|than|absent)\b", re.I)
LANDMARK = re.compile(
    r"\b(above|below|under|over|beside|next to|between|around|on the side of|resting on|capping|behind)\b",
    re.I,
)
# Sentences of a set in which another class's term is right as it stands.
ALLOWED: dict[str, tuple[str, ...]] = {
    "CT_sagittal": ("the heart notching",),
    "NCK_CRC": (
        "cancer-associated stroma",
        "tumor-bed connective tissue",
    ),  # what the class is, beside a tumor
    "skin_cancer": (  # the skin's own keratin, and landmarks
        "infundibulum filled with keratin",
        "basket-weave keratin on top",
        "orderly keratinocyte layers",
        "dermal papilla",
        "draining toward a follicle",
    ),
}


# RadImageNet has 165 classes of three modalities: where in the order each modality's are.
ULTRASOUND, CT = {*range(144, 158), 164}, {*range(85, 112), 136, *range(158, 164)}


def names() -> list[str]:
    return sorted(CLASSES)


def every() -> list[str]:
    return sorted([*CLASSES, "radimagenet"])


def sentences(name: str) -> list[tuple[str, str]]:
    return [(c, s) for c, many in tasks.load(FOLDER / f"{name}.json").classes.items() for s in many]


def test_there_is_one_file_for_each_set_and_none_else():
    assert sorted(p.stem for p in FOLDER.iterdir()) == every()
    assert not set(every()) & set(tasks.names())  # no records belong to them: they are no built-in tasks


@pytest.mark.parametrize("name", names())
def test_classes_modality_and_label(name):
    task = tasks.load(FOLDER / f"{name}.json")
    modality, classes = CLASSES[name]
    assert (task.name, task.modality, tuple(task.classes)) == (name, modality, classes)
    assert task.modality in MODALITIES
    assert task.label == f"labels:{name}"
    assert task.description.endswith(".")
    assert task.version >= 1


def test_radimagenet_names_the_modality_of_every_class():
    task = tasks.load(FOLDER / "radimagenet.json")
    assert (len(task.classes), task.modality, task.label) == (165, "", "labels:radimagenet")
    words = {
        "US": r"ultraso|sonogra",
        "CT": r"\bCT\b|computed tomography",
        "MRI": r"\bMRI?\b|magnetic resonance",
    }
    for i, texts in enumerate(task.classes.values()):
        own = "US" if i in ULTRASOUND else "CT" if i in CT else "MRI"
        for text in texts:
            assert [m for m, word in words.items() if re.search(word, text)] == [own], text


@pytest.mark.parametrize("name", every())
def test_every_class_has_as_many_sentences_of_a_sensible_length(name):
    counts = {len(p) for p in tasks.load(FOLDER / f"{name}.json").classes.values()}
    assert len(counts) == 1
    assert 6 <= counts.pop() <= 10
    for _, text in sentences(name):
        assert 4 <= len(text.split()) <= 45, text
        assert len(text) <= 200, text  # below CLIP's 77 tokens
        assert text.isascii(), text
        assert text == " ".join(text.split()), text
        assert not text.endswith("."), text


@pytest.mark.parametrize("name", every())
def test_no_sentence_comes_twice(name):
    plain = [re.sub(r"[^a-z0-9 ]", "", text.lower()) for _, text in sentences(name)]
    assert sorted(plain) == sorted(set(plain))


@pytest.mark.parametrize("name", every())
def test_us_spelling(name):
    british = r"haemat|haemor|oedema|tumour|colour|oesoph|naev|grey|fibre|centre|leuco"
    assert not [text for _, text in sentences(name) if re.search(british, text, re.I)]


def _own_training_sentences() -> list[re.Pattern[str]]:
    """MiniMed's patterns with one or two words for each fact."""
    blank = r"\S+( \S+)?"
    return [
        re.compile(
            "".join(re.escape(t) + (blank if f else "") for t, f, _, _ in string.Formatter().parse(p))
            + r"\.?",
            re.I,
        )
        for patterns in minimed.PATTERNS.values()
        for p in patterns
    ]


def test_no_sentence_is_one_that_training_reads():
    patterns = _own_training_sentences()
    assert any(p.fullmatch("axial CT slice of the upper abdomen") for p in patterns)  # the check can fail
    source = Phantom(n=240, size=32)
    drawn = {c.text.lower() for item in source.items() for c in source.example(item).captions}
    assert "frontal chest x-ray" in drawn
    for name in every():
        for _, text in sentences(name):
            assert text.lower() not in drawn, (name, text)
            assert not any(p.fullmatch(text) for p in patterns), (name, text)


def contradictions(
    name: str, classes: tuple[str, ...], texts: list[tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """(class, class named, sentence) where a sentence claims what belongs to another class."""
    found = []
    for c, text in texts:
        for other, term in zip(classes, TERMS[name], strict=True):
            hit = None if other == c else re.search(term, text, re.I)
            if hit is None or any(a in text for a in ALLOWED.get(name, ())):
                continue
            before = re.split(r"[:;]", text[: hit.start()])[-1] + hit.group()
            if not DENIED.search(before) and not (name.startswith("CT_") and LANDMARK.search(before)):
                found.append((c, other, text))
    return found


@pytest.mark.parametrize("name", names())
def test_no_sentence_names_another_class_as_present(name):
    assert contradictions(name, CLASSES[name][1], sentences(name)) == []


@pytest.mark.parametrize("name", names())
def test_every_class_is_named_and_the_check_for_other_classes_can_fail(name):
    classes = CLASSES[name][1]
    shifted = dict(zip(classes, (*classes[1:], classes[0]), strict=True))
    assert {
        c for c, _, _ in contradictions(name, classes, [(shifted[c], s) for c, s in sentences(name)])
    } == set(classes)


def test_the_prompts_are_those_of_their_version():
    """A change of a sentence changes every score: raise `version` in the file, then renew the golden file."""
    now = {n: [t.version, t.digest] for n in every() for t in [tasks.load(FOLDER / f"{n}.json")]}
    assert now == json.loads(GOLDEN.read_text())


def test_a_modality_that_is_none_is_refused(tmp_path):
    raw = json.loads((FOLDER / "PCAM.json").read_text())
    (tmp_path / "PCAM.json").write_text(json.dumps(raw | {"modality": "Histopatology"}))
    with pytest.raises(UsageError, match='Did you mean "Histopathology"'):
        tasks.load(tmp_path / "PCAM.json")
