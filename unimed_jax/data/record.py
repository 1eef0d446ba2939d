"""The Example: one picture with its captions, and its form on disk.

A record is a `tf.Example` in the feature encoding of tensorflow-datasets, written and read without either of them:
the wire format is declared below as a private protobuf descriptor, in its own pool so that it cannot clash with
TensorFlow's. Every field has a default, so records written before a field existed stay readable.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from unimed_jax.data import limits
from unimed_jax.errors import DataError

SCHEMA_VERSION = 1


@dataclass(slots=True, frozen=True, kw_only=True)
class Caption:
    """One caption, its kind (config.CAPTION_KINDS) and its tokens, special ones included (0 = not counted)."""

    text: str
    kind: str = "original"
    tokens: int = 0


@dataclass(slots=True, frozen=True, kw_only=True)
class Example:
    """One picture, as its source stores it, with everything that is said about it."""

    key: str  # source/relative path, unique
    image: bytes  # the source's bytes, unchanged unless a smaller picture was asked for
    image_format: str = ""  # jpeg, png, ...; found from the bytes
    height: int = 0  # pixels
    width: int = 0  # pixels
    captions: tuple[Caption, ...] = ()
    labels: tuple[str, ...] = ()  # "task:value", e.g. "plane:axial"
    modality: str = ""  # one of config.MODALITIES, or empty
    source: str = ""
    patient: str = ""  # salted hash, see `hash_patient`
    split: str = "train"
    sha256: str = ""  # of the image bytes, hexadecimal
    simulated: bool = False  # drawn or computed, not acquired
    original_sha256: str = ""  # of the source's bytes, where smaller ones are stored (data/reduce.py)


# name on disk: (field of Example, kind of value). The order is the order on disk, which makes the bytes deterministic.
_SCALARS: dict[str, tuple[str, str]] = {
    "key": ("key", "text"),
    "image": ("image", "bytes"),
    "image_format": ("image_format", "text"),
    "height": ("height", "int"),
    "width": ("width", "int"),
    "modality": ("modality", "text"),
    "source": ("source", "text"),
    "patient": ("patient", "text"),
    "split": ("split", "text"),
    "sha256": ("sha256", "text"),
    "simulated": ("simulated", "int"),
    "original_sha256": ("original_sha256", "text"),
}

_SEQUENCES = {"captions/text": "bytes", "captions/kind": "bytes", "captions/tokens": "int", "labels": "bytes"}
# name on disk: which list of the wire format holds it
_LISTS = {name: "int" if kind == "int" else "bytes" for name, (_, kind) in _SCALARS.items()}
_LISTS |= _SEQUENCES | {"schema_version": "int"}


def layout() -> list[Any]:
    """What records look like on disk, for digests: the schema version, and the names of all fields in their order."""
    return [SCHEMA_VERSION, *_SCALARS, *_SEQUENCES]


def hash_patient(patient: str, salt: str) -> str:
    """A patient's pseudonym: 16 hexadecimal digits of keyed BLAKE2b; empty for an empty identifier.

    Without a secret salt, short identifiers can be guessed by trying them all.

    Example:
        >>> hash_patient("p1", salt="secret") == hash_patient("p1", salt="other")
        False
    """
    if not patient:
        return ""
    key = hashlib.sha256(salt.encode()).digest()
    return hashlib.blake2b(patient.encode(), key=key, digest_size=8).hexdigest()


def _message_class() -> Any:
    """tf.Example as a protobuf class; the map of features is a list of entries, which is the same on the wire."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="unimed_jax/example.proto", package="unimed_jax", syntax="proto3"
    )
    # message: ((field, number, type, repeated), ...); a name stands for a message
    tables: dict[str, tuple[tuple[str, int, int | str, bool], ...]] = {
        "BytesList": (("value", 1, field.TYPE_BYTES, True),),
        "FloatList": (("value", 1, field.TYPE_FLOAT, True),),
        "Int64List": (("value", 1, field.TYPE_INT64, True),),
        "Feature": (
            ("bytes", 1, "BytesList", False),
            ("float", 2, "FloatList", False),
            ("int", 3, "Int64List", False),
        ),
        "Entry": (("key", 1, field.TYPE_STRING, False), ("value", 2, "Feature", False)),
        "Features": (("feature", 1, "Entry", True),),
        "Example": (("features", 1, "Features", False),),
    }
    for message, fields in tables.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                declared.field.add(
                    name=name,
                    number=number,
                    label=label,
                    type=field.TYPE_MESSAGE,
                    type_name=f".unimed_jax.{kind}",
                )
            else:
                declared.field.add(name=name, number=number, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("unimed_jax.Example"))


_Message = _message_class()


def encode(example: Example) -> bytes:
    """Serialises an example; equal examples give equal bytes.

    Raises:
        DataError: if the record is larger than limits.MAX_RECORD_BYTES.

    Example:
        >>> decode(encode(Example(key="a/1", image=b"..."))).key
        'a/1'
    """
    message = _Message()
    add = message.features.feature.add
    for name, (attribute, kind) in _SCALARS.items():
        value = getattr(example, attribute)
        feature = add(key=name).value
        if kind == "int":
            feature.int.value.append(int(value))
        else:
            feature.bytes.value.append(value.encode() if kind == "text" else value)
    sequences = {
        "captions/text": [c.text.encode() for c in example.captions],
        "captions/kind": [c.kind.encode() for c in example.captions],
        "captions/tokens": [c.tokens for c in example.captions],
        "labels": [x.encode() for x in example.labels],
    }
    for name, values in sequences.items():
        stored = getattr(add(key=name).value, _SEQUENCES[name])
        # An empty list must still be present: tensorflow-datasets cannot read a sequence whose feature is missing.
        stored.SetInParent()
        stored.value.extend(values)
    add(key="schema_version").value.int.value.append(SCHEMA_VERSION)
    blob = message.SerializeToString(deterministic=True)
    if len(blob) > limits.MAX_RECORD_BYTES:
        raise DataError(f"record {example.key} has {len(blob)} bytes, more than {limits.MAX_RECORD_BYTES}")
    return blob


def decode(blob: bytes) -> Example:
    """Parses a record; unknown features are ignored and missing ones take their defaults.

    Raises:
        DataError: for bytes that are no record, or a record of another schema version.
    """
    if len(blob) > limits.MAX_RECORD_BYTES:
        raise DataError(f"the record has {len(blob)} bytes, more than {limits.MAX_RECORD_BYTES}")
    found: dict[str, Any] = {}
    try:
        for entry in _Message.FromString(blob).features.feature:
            name, value = entry.key, entry.value
            if name in _LISTS:
                found[name] = value.int.value if _LISTS[name] == "int" else value.bytes.value
        version = found["schema_version"][0] if found.get("schema_version") else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise DataError(
                f"the record has schema version {version}; this program reads {SCHEMA_VERSION}",
                "export the source again, or use the version of unimed_jax that wrote it",
            )
        return _example(found)
    except DataError:
        raise
    except Exception as e:  # protobuf's DecodeError, and wrong types or text inside a well-formed message
        raise DataError(f"the bytes are no record: {type(e).__name__}: {e}") from e


def _example(found: dict[str, Any]) -> Example:
    texts = found.get("captions/text", [])
    kinds = found.get("captions/kind") or [b"original"] * len(texts)
    tokens = found.get("captions/tokens") or [0] * len(texts)
    values: dict[str, Any] = {}
    for name, (attribute, kind) in _SCALARS.items():
        value = found.get(name)
        if value:
            values[attribute] = value[0].decode() if kind == "text" else value[0]
    if "simulated" in values:
        values["simulated"] = bool(values["simulated"])
    return Example(
        captions=tuple(
            Caption(text=t.decode(), kind=k.decode(), tokens=n)
            for t, k, n in zip(texts, kinds, tokens, strict=True)
        ),
        labels=tuple(x.decode() for x in found.get("labels", [])),
        **values,
    )


def tfds_features() -> Any:
    """The same schema declared for tensorflow-datasets, which is only needed to write its metadata."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, kinds = tfds.features.Text(), {"text": tfds.features.Text, "int": lambda: np.int64}
    declared: dict[str, Any] = {
        name: kinds[kind]() for name, (_, kind) in _SCALARS.items() if kind != "bytes"
    }
    return tfds.features.FeaturesDict(
        {
            **declared,
            "simulated": np.bool_,
            "image": tfds.features.Image(shape=(None, None, None)),
            "captions": tfds.features.Sequence({"text": text, "kind": text, "tokens": np.int64}),
            "labels": tfds.features.Sequence(text),
            "schema_version": np.int64,
        }
    )
