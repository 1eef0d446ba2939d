"""What a folder of records says about itself: the data card, and the metadata for tensorflow-datasets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from unimed_jax.data import record, reduce
from unimed_jax.data.shards import Manifest


def text(manifest: Manifest) -> str:
    """The data card (README.md) of a source."""
    m = manifest
    rows = [
        f"| {split} | {m.examples(split)} | {counts.get('captions', 0)} | {_listed(counts, 'modality ')} |"
        for split, counts in m.counts.items()
    ]
    simulated = sum(c.get("simulated", 0) for c in m.counts.values())
    notes = ", ".join(f"{what} {n}" for what, n in caption_notes(m).items())
    shown = "train" if "train" in m.splits else next(iter(m.splits))
    rejected = ", ".join(f"{reason}: {n}" for reason, n in m.rejects.items()) or "none"
    return "\n".join(
        [
            f"# {m.source}",
            "",
            m.description or "No description was given.",
            "",
            f"- Licence: {m.licence or 'not stated'}",
            f"- Records: {sum(map(m.examples, m.splits))}, schema version {m.schema_version}",
            f"- Simulated, not acquired: {simulated}",
            f"- Left out: {rejected} (rejects.jsonl)",
            *([f"- Taken apart or dropped: {notes}"] if notes else []),
            f"- Tokens counted by: {'tokenizer ' + m.tokenizer[:16] if m.tokenizer else 'not counted'}",
            "- Research use only, not a medical device. Patients appear as salted hashes; text that is burned into "
            "pictures is not removed.",
            "",
            "| split | pictures | captions | modalities |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"{_pictures(m)} 16-bit gray is stretched from the value range of the picture when it is "
            "read; alpha is dropped, EXIF orientation is ignored, of several frames the first is used.",
            "",
            "```python",
            "import tensorflow_datasets as tfds  # TensorFlow is not needed",
            'records = tfds.builder_from_directory("THIS FOLDER").as_data_source(',
            f'    "{shown}", decoders={{"image": tfds.decode.SkipDecoding()}})',
            "```",
            "",
        ]
    )


def _pictures(m: Manifest) -> str:
    if not m.reduction:
        return "Pictures are the source's bytes."
    sums = Counter[str]()
    for counts in m.counts.values():
        sums.update({k: n for k, n in counts.items() if k in ("reduced jpeg", "reduced png", reduce.KEPT)})
    r, kept = m.reduction, sums[reduce.KEPT]
    return (
        f"Pictures are the source's bytes up to {r['max_side']} pixels a side. Of larger ones "
        f"{sums['reduced jpeg'] + sums['reduced png']} were reduced to that ({r['filter']}) and stored anew: "
        f"{sums['reduced jpeg']} as JPEG (quality {r['jpeg_quality']}, {r['jpeg_sampling']}), {sums['reduced png']} "
        f"as PNG; original_sha256 is the digest of the source's bytes.{f' {kept} were kept.' if kept else ''}"
    )


def caption_notes(manifest: Manifest) -> dict[str, int]:
    """How many captions were taken apart or dropped at export (data/markers.py), where there were any."""
    names = ("joined captions", "placeholder captions")
    sums = {name: sum(c.get(name, 0) for c in manifest.counts.values()) for name in names}
    return {name: n for name, n in sums.items() if n}


def _listed(counts: dict[str, int], prefix: str) -> str:
    found = {k.removeprefix(prefix): n for k, n in counts.items() if k.startswith(prefix)}
    return ", ".join(f"{name} {n}" for name, n in sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))


def write_tfds_metadata(folder: Path, manifest: Manifest) -> None:
    """Writes dataset_info.json and features.json, so that tensorflow-datasets reads the folder without our code."""
    import tensorflow_datasets as tfds
    from etils import epath

    splits = []
    for name, shards in manifest.splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(folder), dataset_name="unimed", split=name, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[s.count for s in shards],
                num_bytes=sum(s.bytes for s in shards),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=record.tfds_features(),
        split_infos=splits,
        version=manifest.version,
        description=manifest.description or manifest.source,
        license=manifest.licence or None,
        check_data=False,  # it would need TensorFlow
    )
