"""A trained model, ready to use: load it, embed pictures and texts, classify, save it.

Batching, padding and compilation live here once: requests are cut into a few fixed batch sizes and text widths, so that
nothing compiles twice, and padding never changes a result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from unimed_jax import config, model_folder, parallel
from unimed_jax.data import images as pictures
from unimed_jax.data import medical
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import UsageError
from unimed_jax.models import clip, zoo
from unimed_jax.vectors import class_scores, ensemble, unit

_TEXT_WIDTHS = (16, 32, 64, 128, 256)  # tokens; a text is encoded at the smallest that holds it
Picture = Image.Image | str | os.PathLike[str] | bytes | np.ndarray


class Loaded:
    """A model with its weights on the devices.

    Args:
        cfg: the architecture.
        params: nested dict; numpy or jax arrays (those already on `mesh` stay where they are).
        tokenizer: None for a model that will only see token ids.
        mesh: devices to share batches over; default: one device.
        batch_size: rows of the largest batch, over all devices; rounded up to a multiple of them.
        dtype: of the computation; "float32" is what published figures are made with.
        digest: of the weights, when it is known already.
    """

    def __init__(
        self,
        cfg: config.Model,
        params: clip.Params,
        tokenizer: Tokenizer | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int = 64,
        dtype: str = "float32",
        digest: str = "",
    ):
        self.cfg, self.tokenizer, self.dtype = cfg, tokenizer, dtype
        self.mesh = mesh or parallel.make_mesh(config.Mesh(), jax.local_devices()[:1])
        self.params = _place(params, self.mesh)
        n = self.mesh.size
        self.batch_size = -(-batch_size // n) * n
        # A single picture must not wait for a full batch of padding.
        self._sizes = sorted({-(-size // n) * n for size in (1, 8, batch_size)})
        plain = dataclasses.replace(cfg, dtype=dtype, remat="none", text_groups=())
        self._image, self._text = _encoders(json.dumps(config.to_dict(plain)), self.mesh)
        self._digest = digest

    @property
    def logit_scale(self) -> float:
        """The factor on the cosines, above 0."""
        return float(np.exp(model_folder.to_host(self.params["logit_scale"])))

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return self.cfg.vision.image_size

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and values of the weights, whatever file they came from."""
        if not self._digest:
            h = hashlib.sha256()
            for name, leaf in sorted(clip.flatten(self.params).items()):
                value = np.array(model_folder.to_host(leaf), order="C")
                h.update(f"{name} {value.dtype} {value.shape}\n".encode())
                h.update(value.tobytes())
            self._digest = h.hexdigest()
        return self._digest

    @property
    def about(self) -> dict[str, Any]:
        """What a record says of it: everything that scores depend on, but the pictures and the prompts."""
        return {
            "name": self.cfg.name,
            "sha256": self.digest,
            "normalize": self.cfg.vision.normalize,
            "dtype": self.dtype,
            "logit_scale": self.logit_scale,
        }

    def describe(self) -> str:
        """One line: towers, size, weights, precision, devices."""
        v, t = self.cfg.vision, self.cfg.text
        device = self.mesh.devices.flat[0]
        return (
            f"{self.cfg.name}  ViT {v.width}x{v.depth}/{v.patch_size} {v.image_size} px + {t.kind} {t.width}x{t.depth} "
            f"context {t.context_length}   sha {self.digest[:12]}   {self.dtype}   {self.mesh.size} x {device.platform}"
        )

    def preprocess(self, picture: Picture) -> UInt8[np.ndarray, "size size 3"]:
        """The evaluation picture: shorter side to the model's size (bicubic), centre crop, RGB.

        Args:
            picture: PIL image, path (DICOM and NIfTI too), bytes of an image file, or u8[h w] / u8[h w 3].

        Raises:
            DataError: for a file that holds no picture.
            UsageError: for an array of another type or shape.
        """
        return pictures.eval_image(_readable(picture), self.image_size, where=_name(picture))

    def preprocess_train(
        self, picture: Picture, rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "size size 3"]:
        """A training picture: a random crop of 90 to 100 % of the area, of whatever `preprocess` takes."""
        found = _readable(picture)
        if isinstance(found, Image.Image):
            buffer = io.BytesIO()
            keeps = found.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
            (found if keeps else found.convert("RGB")).save(buffer, "PNG", compress_level=0)
            found = buffer.getvalue()
        return pictures.train_image(
            found, self.image_size, rng or np.random.default_rng(), where=_name(picture)
        )

    def encode_image(
        self, images: UInt8[np.ndarray, "b h w 3"] | Sequence[Picture], *, normalize: bool = True
    ) -> Float[np.ndarray, "b d"]:
        """Image embeddings.

        Args:
            images: uint8 [batch, height, width, 3] at the model's size, or a list of whatever `preprocess` takes.
            normalize: scale to unit length.

        Raises:
            UsageError: for arrays of another layout, type or size.
            DataError: for a file that holds no picture.
        """
        if isinstance(images, Sequence):
            chunks = self._preprocessed(images)
        else:  # numpy, jax or torch
            array = self.checked(np.asarray(images))
            chunks = (array[i : i + self.batch_size] for i in range(0, len(array), self.batch_size))
        return _finish([z for chunk in chunks for z in self._run(self._image, chunk)], self.cfg, normalize)

    def encode_text(
        self, texts: Sequence[str] | Int[np.ndarray, "b t"], *, normalize: bool = True
    ) -> Float[np.ndarray, "b d"]:
        """Text embeddings; each text is encoded at about its own length, which changes nothing but the time.

        Args:
            texts: texts, or token ids padded at the end.
            normalize: scale to unit length.

        Raises:
            UsageError: for a model without tokenizer, a single string, or ids outside the vocabulary.
        """
        tokens = self._tokens(texts)
        if not len(tokens):
            return _finish([], self.cfg, normalize)
        lengths = _lengths(tokens, self.cfg.text)
        widths = np.array([w for w in _TEXT_WIDTHS if w < tokens.shape[1]] + [tokens.shape[1]])
        width_of = widths[np.searchsorted(widths, lengths)]
        out = np.zeros((len(tokens), self.cfg.embed_dim), np.float32)
        for width in np.unique(width_of):
            rows = np.flatnonzero(width_of == width)
            done = self._run(self._text, np.ascontiguousarray(tokens[rows, :width]))
            out[rows] = np.concatenate([np.asarray(z)[:n] for z, n in done])
        return unit(out) if normalize else out

    def text_bank(self, classes: Mapping[str, Sequence[str]]) -> Float[np.ndarray, "c d"]:
        """One unit vector a class: the mean of its prompts' unit embeddings, normalised (CLIP's prompt ensemble).

        Raises:
            UsageError: for a class without prompts.
        """
        empty = [k for k, v in classes.items() if isinstance(v, str) or not len(v)]
        if empty or not classes:
            raise UsageError(
                f"class {empty[0]!r} has no list of prompts" if empty else "there are no classes"
            )
        z = self.encode_text([p for v in classes.values() for p in v])
        return ensemble(np.split(z, np.cumsum([len(v) for v in classes.values()])[:-1]))

    def classify(
        self,
        images: UInt8[np.ndarray, "b h w 3"] | Sequence[Picture],
        classes: Mapping[str, Sequence[str]],
    ) -> Float[np.ndarray, "b c"]:
        """Softmax over the classes of logit_scale x cosine; not calibrated probabilities.

        Args:
            images: see `encode_image`.
            classes: class -> prompts.

        Raises:
            UsageError: see `encode_image` and `text_bank`.
        """
        scores = class_scores(self.encode_image(images), self.text_bank(classes), self.logit_scale)
        return np.exp(scores).astype(np.float32)

    def encode_rows(self, images: UInt8[np.ndarray, "r h w 3"], ids: Int[np.ndarray, "r"]) -> tuple[Any, Any]:
        """One global batch of which this process holds some rows; every process gets all embeddings and ids.

        Returns:
            (f32[b d] not normalised, i32[b]) as jax arrays in the order of the devices; the call does not wait.
        """
        batch = parallel.put({"image": images, "ids": np.asarray(ids, np.int32)}, self.mesh)
        return self._image(self.params, batch["image"]), _gather(self.mesh)(batch["ids"])

    def save(
        self, folder: str | Path, *, force: bool = False, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes a model folder; it appears under its name only when complete. See `model_folder.save`."""
        return model_folder.save(folder, self.cfg, self.params, self.tokenizer, force=force, extra=extra)

    def checked(self, array: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        """The same pictures, or a refusal that says what this model takes.

        Raises:
            UsageError: for arrays of another layout, type or size.
        """
        size = self.image_size
        if array.ndim == 4 and array.shape[1] == 3 and array.shape[3] != 3:
            raise UsageError(
                f"images have the shape {list(array.shape)}, which is channels first",
                "pass [batch, height, width, 3]: images.transpose(0, 2, 3, 1)",
            )
        if array.ndim != 4 or array.shape[3] != 3:
            raise UsageError(f"images have the shape {list(array.shape)}", "[batch, height, width, 3]")
        if array.dtype != np.uint8:
            raise UsageError(
                f"images are {array.dtype}, not uint8", "pass pixels 0..255; the model normalises them itself"
            )
        if array.shape[1:3] != (size, size):
            raise UsageError(
                f"images are {array.shape[1]} x {array.shape[2]} pixels, this model takes {size} x {size}",
                "pass a list of pictures, or apply `preprocess` to each",
            )
        return array

    def _preprocessed(self, items: Sequence[Picture]) -> Iterator[np.ndarray]:
        if isinstance(items, (str, bytes, os.PathLike, Image.Image)):
            raise UsageError(
                "encode_image takes a list of pictures", "put the picture into a list: [picture]"
            )
        with ThreadPoolExecutor(4, thread_name_prefix="preprocess") as pool:
            for i in range(0, len(items), self.batch_size):
                yield np.stack(list(pool.map(self.preprocess, items[i : i + self.batch_size])))

    def _tokens(self, texts: Sequence[str] | Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b t"]:
        t = self.cfg.text
        if isinstance(texts, str):
            raise UsageError("encode_text takes a list of texts", "put the text into a list: [text]")
        if not hasattr(texts, "shape"):
            if self.tokenizer is None:
                raise UsageError(
                    f"model {self.cfg.name} has no tokenizer, so it encodes images only",
                    f"{model_folder.NO_TOKENIZER}; or pass token ids",
                )
            return self.tokenizer.encode(list(texts), t.context_length)
        tokens = np.asarray(texts)
        if (
            tokens.ndim != 2
            or not np.issubdtype(tokens.dtype, np.integer)
            or tokens.shape[1] > t.max_positions
        ):
            raise UsageError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}", f"integers [batch, <= {t.max_positions}]"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < t.vocab_size:
            raise UsageError(
                f"token ids reach from {tokens.min()} to {tokens.max()}", f"0 to {t.vocab_size - 1}"
            )
        return tokens.astype(np.int32)

    def _run(self, fn: Callable[..., jax.Array], rows: np.ndarray) -> list[tuple[jax.Array, int]]:
        """Embeddings of all rows as (batch, how many of its rows are real) pairs; does not wait for the device."""
        out, start = [], 0
        sharding = parallel.batch_sharding(self.mesh)
        while start < len(rows):
            left = len(rows) - start
            size = next((s for s in self._sizes if s >= left), self._sizes[-1])
            part = rows[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            batch = jax.make_array_from_callback(filled.shape, sharding, functools.partial(_cut, filled))
            out.append((fn(self.params, batch), len(part)))
            start += size
        return out


@functools.lru_cache(maxsize=16)
def _encoders(
    spec: str, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The two compiled towers of an architecture; shared, so that evaluating during training compiles once."""
    graphdef, _ = clip.skeleton(config.from_dict(config.Model, json.loads(spec)))
    whole = parallel.replicated(mesh)
    image = jax.jit(lambda p, x: clip.bind(graphdef, p).encode_image(x), out_shardings=whole)
    text = jax.jit(lambda p, x: clip.bind(graphdef, p).encode_text(x), out_shardings=whole)
    return image, text


@functools.lru_cache(maxsize=16)
def _gather(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))


def _readable(picture: Picture) -> bytes | Image.Image:
    """What data/images.py takes; of a DICOM or NIfTI file its middle frame."""
    if isinstance(picture, (str, os.PathLike)):
        picture = medical.read(Path(picture))[0].data
    if isinstance(picture, (bytes, Image.Image)):
        return picture
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise UsageError(
            f"a picture is {array.dtype}{list(array.shape)}", "uint8 [height, width] or [height, width, 3]"
        )
    return Image.fromarray(array)


def _name(picture: Picture) -> str:
    return Path(picture).name if isinstance(picture, (str, os.PathLike)) else ""


def _cut(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


def _place(params: clip.Params, mesh: jax.sharding.Mesh) -> clip.Params:
    def put(leaf: Any, sharding: Any) -> jax.Array:
        there = leaf.sharding if isinstance(leaf, jax.Array) else None
        if isinstance(there, jax.sharding.NamedSharding) and there.mesh == mesh:
            return leaf
        value = np.asarray(leaf, np.float32)
        return jax.make_array_from_callback(value.shape, sharding, functools.partial(_cut, value))

    return jax.tree.map(put, params, parallel.shardings(params, mesh))


def _finish(
    done: list[tuple[jax.Array, int]], cfg: config.Model, normalize: bool
) -> Float[np.ndarray, "b d"]:
    parts = [np.asarray(z)[:n] for z, n in done] or [np.zeros((0, cfg.embed_dim), np.float32)]
    return unit(np.concatenate(parts)) if normalize else np.concatenate(parts)


def _lengths(tokens: Int[np.ndarray, "b t"], t: config.Text) -> Int[np.ndarray, "b"]:
    """Leading tokens that can change an embedding (models/text.py, `Text.lengths`, on the host)."""
    if t.kind == "clip":
        return np.argmax(tokens if t.eot_id < 0 else tokens == t.eot_id, axis=1) + 1
    return np.max(np.where(tokens != t.pad_id, np.arange(1, tokens.shape[1] + 1), 0), axis=1)


def load(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, batch_size: int = 64, dtype: str = "float32"
) -> Loaded:
    """Loads a model folder, or a training run (its `model` folder, else its newest checkpoint; `RUN@STEP` for one).

    Args:
        path: the folder.
        mesh: devices to share batches over; default: one device.
        batch_size: rows of the largest batch.
        dtype: float32, or bfloat16 for speed.

    Raises:
        UsageError: when there is no such folder.
        DataError: for missing, unexpected, mis-shaped or non-finite weights, a tokenizer that is not the model's, or a
            damaged file; everything that is wrong is listed.
    """
    cfg, params, tokenizer = model_folder.read(path)
    return Loaded(cfg, params, tokenizer, mesh=mesh, batch_size=batch_size, dtype=dtype)


def create_model_and_transforms(
    name: str | Path, *, mesh: jax.sharding.Mesh | None = None, seed: int = 0
) -> tuple[Loaded, Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """(model, preprocess_train, preprocess), in open_clip's words.

    Args:
        name: a model folder or run; or a named model: with its weights where they were fetched, else with random
            ones, and says so.
        mesh: devices to share batches over.
        seed: of random weights.

    Raises:
        UsageError, DataError: see `load`.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):
        ...     model, _, preprocess = create_model_and_transforms("tiny")
        >>> model.encode_image([preprocess(Image.new("RGB", (64, 48)))]).shape
        (1, 32)
    """
    if str(name) in zoo.MODELS and not Path(name).exists() and zoo.local(str(name)) is None:
        warnings.warn(f"{name} has random weights: give a model folder for trained ones", stacklevel=2)
        cfg = zoo.get(str(name))
        model = Loaded(cfg, clip.init(cfg, jax.random.key(seed)), mesh=mesh)
    else:
        model = load(name, mesh=mesh)
    return model, model.preprocess_train, model.preprocess


def get_tokenizer(path: str | Path) -> Callable[..., Int[np.ndarray, "b t"]]:
    """The tokenizer of a model folder or run as a function: texts (or one text) to token ids.

    Raises:
        UsageError: for a named architecture, which has no vocabulary of its own, or a missing folder.
        DataError: for a damaged folder.
    """
    tokenizer, context = model_folder.read_tokenizer(path)

    def encode(texts: str | Sequence[str], context_length: int = context) -> Int[np.ndarray, "b t"]:
        return tokenizer.encode([texts] if isinstance(texts, str) else texts, context_length)

    return encode
