"""Where the weights of named models come from, as data: repository, file, revision, digest, licence, use.

An empty revision or sha256 is one that no public source we read gave; `unimed-jax models fetch` then asks for it.
Each pin is a fact found in at least one public place beside the repository itself; fetching compares it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unimed_jax.errors import UsageError, did_you_mean

_BERT_BASE = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
_BERT_LARGE = "microsoft/BiomedNLP-BiomedBERT-large-uncased-abstract"
_BERT_REVISION = "d673b8835373c6fa116d6d8006b33d48734e305d"
_OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
_METACLIP_URL = "https://dl.fbaipublicfiles.com/MMPT/metaclip"

NC = "CC BY-NC 4.0"
RESEARCH = "research only, not a medical device"
# Zero-shot tasks that come with unimed_jax, for models that know medical pictures.
MEDICAL = ("modality", "ct_region", "ct_plane", "mri_plane", "stain")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file on the Hugging Face hub."""

    repo: str
    name: str
    revision: str = ""  # commit, 40 hex digits
    sha256: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The pins that are not known."""
        return tuple(k for k in ("revision", "sha256") if not getattr(self, k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What belongs to a name beside its architecture (`zoo.get`).

    Attributes:
        weights: the file.
        tokenizer: tokenizer.json or vocab.txt; None for a vision tower.
        licence: of the weights, as their authors state it.
        use: what they may be used for.
        about: one line.
        tower: "" for a whole model, else the one tower that the file holds.
        prompts: names of the zero-shot tasks that suit the model.
        same: other files with the same weights: {URL: sha256}.
    """

    weights: File
    tokenizer: File | None
    licence: str
    use: str
    about: str
    tower: str = ""
    prompts: tuple[str, ...] = ()
    same: dict[str, str] = field(default_factory=dict)


_BERT_TOKENIZER = File(repo=_BERT_BASE, name="vocab.txt", revision=_BERT_REVISION)
_CLIP_TOKENIZER = File(
    repo="openai/clip-vit-large-patch14",
    name="tokenizer.json",
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
    sha256="a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
)


def _unimed(repo: str, name: str, about: str, revision: str = "") -> Origin:
    return Origin(
        weights=File(repo=f"UzairK/{repo}", name=name, revision=revision),
        tokenizer=_BERT_TOKENIZER,
        licence=NC,
        use=f"non-commercial; {RESEARCH}",
        about=about,
        prompts=MEDICAL,
    )


def _openai(repo: str, file: str, revision: str, sha256: str, url: str, about: str) -> Origin:
    return Origin(
        weights=File(repo=f"openai/{repo}", name=file, revision=revision, sha256=sha256),
        tokenizer=_CLIP_TOKENIZER,
        licence="MIT (the repository openai/CLIP)",
        use="research; its model card excludes deployed use without in-domain tests",
        about=about,
        same={f"{_OPENAI_URL}/{url}": url.split("/")[0]},
    )


def _metaclip(size: str, sha256: str, about: str) -> Origin:
    return Origin(
        weights=File(repo=f"facebook/metaclip-{size}-400m", name="model.safetensors"),
        tokenizer=_CLIP_TOKENIZER,
        licence=f"{NC} (the repository MetaCLIP)",
        use="non-commercial",
        about=about,
        same={f"{_METACLIP_URL}/{size}_400m.pt": sha256},
    )


def _bert(repo: str, revision: str, sha256: str, about: str) -> Origin:
    return Origin(
        weights=File(repo=repo, name="pytorch_model.bin", revision=revision, sha256=sha256),
        tokenizer=File(repo=repo, name="vocab.txt", revision=revision),
        licence="MIT",
        use=RESEARCH,
        about=about,
        tower="text",
    )


ORIGINS: dict[str, Origin] = {
    "unimed-clip-vit-b16": _unimed(
        "unimed-clip-vit-b16",
        "unimed-clip-vit-b16.pt",
        "UniMed-CLIP, six modalities, BiomedBERT-base",
        "84a67cb0331b511b630136e4878beaa5a3fdc657",
    ),
    "unimed-clip-vit-l14-336": _unimed(
        "unimed_clip_vit_l14_base_text_encoder",
        "unimed_clip_vit_l14_base_text_encoder.pt",
        "UniMed-CLIP at 336 px, BiomedBERT-base: the best of the three on average",
    ),
    "unimed-clip-vit-l14-336-large-text": _unimed(
        "unimed_clip_vit_l14_large_text_encoder",
        "unimed_clip_vit_l14_large_text_encoder.pt",
        "UniMed-CLIP at 336 px, BiomedBERT-large",
    ),
    "metaclip-b16-400m": _metaclip(
        "b16",
        "68dfb5996c52a8f4fecb9bd16601e97e1895236645082778bd9cede8429a8d49",
        "MetaCLIP, 400 M pairs: what UniMed-CLIP B/16 starts from",
    ),
    "metaclip-b32-400m": _metaclip(
        "b32", "3c68642594a329afc1ec0fe489ee2b58ab19c9d0556ccf7c404a59baa0762d71", "MetaCLIP, 400 M pairs"
    ),
    "metaclip-l14-400m": _metaclip(
        "l14", "51c782959f920b030779e494517b8d545f56794df6b0a2796a4c310455a361be", "MetaCLIP, 400 M pairs"
    ),
    "openai-b32": _openai(
        "clip-vit-base-patch32",
        "pytorch_model.bin",
        "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "OpenAI CLIP ViT-B/32",
    ),
    "openai-b16": _openai(
        "clip-vit-base-patch16",
        "pytorch_model.bin",
        "57c216476eefef5ab752ec549e440a49ae4ae5f3",
        "ec89c7b09c749a60aae3c9cd910516f24b58214a7df060b48962d14c469cfbf0",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "OpenAI CLIP ViT-B/16",
    ),
    "openai-l14": _openai(
        "clip-vit-large-patch14",
        "model.safetensors",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "OpenAI CLIP ViT-L/14",
    ),
    "openai-l14-336": _openai(
        "clip-vit-large-patch14-336",
        "pytorch_model.bin",
        "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
        "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
        "OpenAI CLIP ViT-L/14 at 336 px",
    ),
    "biomedclip": Origin(
        weights=File(
            repo="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            name="open_clip_pytorch_model.bin",
            revision="9f341de24bfb00180f1b847274256e9b65a3a32e",
            sha256="52cc993c5c5ff962bd0c60931874bc001e7e9b41666a385530f4a036294576be",
        ),
        tokenizer=_BERT_TOKENIZER,
        licence="MIT",
        use=RESEARCH,
        about="BiomedCLIP: 15 M figures and captions of PubMed Central",
        prompts=MEDICAL,
    ),
    "dinov2-s14": Origin(
        weights=File(
            repo="facebook/dinov2-small",
            name="model.safetensors",
            revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
            sha256="ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
        ),
        tokenizer=None,
        licence="Apache-2.0",
        use=RESEARCH,
        about="DINOv2 ViT-S/14, a vision tower for init.vision",
        tower="vision",
    ),
    "biomedbert-base": _bert(
        _BERT_BASE,
        _BERT_REVISION,
        "d513412d396cecec5f67936ac871b4aaf1178dfb5193776e790fd2b28bba240c",
        "BiomedBERT-base (abstracts), a text tower for init.text",
    ),
    "biomedbert-large": _bert(
        _BERT_LARGE,
        "f18ff5ec008285849e7c467b2618262b0def6238",
        "2d7a3e00619bab3b5c9a9d04dc173c6197becd5a53a253999ded7ed742ba2419",
        "BiomedBERT-large (abstracts), a text tower for init.text",
    ),
}


def get(name: str) -> Origin:
    """The origin of a name's weights.

    Raises:
        UsageError: for a name without published weights.

    Example:
        >>> get("biomedclip").licence
        'MIT'
    """
    if name not in ORIGINS:
        raise UsageError(
            f"no published weights are known for {name!r}.{did_you_mean(name, ORIGINS)}",
            "unimed-jax models list",
        )
    return ORIGINS[name]
