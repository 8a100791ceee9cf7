"""Writes a quantized checkpoint in ModelOpt's layout, one file a layer: a build resumes behind any."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import FINAL_NORM, HEAD, LINEARS, layer_tensor
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.checkpoint.hf import MODELOPT_FILE
from edgellm_buildhost.checkpoint.stored import StoredNames
from edgellm_buildhost.checkpoint.tensor_files import INDEX_FILE, read_header
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.layer import Linear, QuantizedLayer
from edgellm_buildhost.quantization.rows import concatenate_linears
from edgellm_buildhost.quantized.configuration import embedded, hf_quant_config
from edgellm_buildhost.quantized.forms import Form, encode, form_of
from edgellm_buildhost.quantized.metadata import model_config, published_type, write_json, write_metadata
from edgellm_buildhost.quantized.tables import sixteen_bits, smallest_exact, table, table_names, table_type
from edgellm_buildhost.quantized.tensor_writer import Pending, sync, whole, write_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

_PROGRESS_FILE = "progress.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class KvCacheScales:
    """One scale for all keys of a layer, and one for all values: x = scale * code; `[layers]` each."""

    algorithm: Literal["INT8", "FP8"]
    keys: Sequence[float]
    values: Sequence[float]


class CheckpointWriter:
    """Takes the layers of a model in order; nothing is at `directory` before `finish`.

    Until then the files are beside it, in `.NAME.partial`, and stay there after a failure: a writer with the
    same `key` goes on behind the last whole layer, one with another key starts anew. `key` names everything
    that the result follows from. `scheme` says in words how the linears are stored. A context manager:
    leaving it lets another writer in.
    """

    def __init__(
        self,
        directory: Path,
        source: Checkpoint,
        *,
        key: str,
        scheme: str,
        kv_scales: KvCacheScales | None = None,
    ) -> None:
        """Find out what an earlier run finished.

        Raises BuildError when something is at `directory`, another writer is at work, or the disk refuses.
        """
        self._directory, self._source = directory, source
        self._scheme, self._kv_scales = scheme, kv_scales
        self._partial = directory.with_name(f".{directory.name}.partial")
        storage = replace(source.architecture.storage, prefix="")  # of a multimodal model, its text alone
        self._names = StoredNames(replace(source.architecture, storage=storage), ())
        self._kind: np.dtype[Any] | None = None
        _refuse_existing(directory)
        model_config(source, "float16")  # what cannot be described is known before the work
        with self._disk_errors("begin"):
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._partial)
            try:
                self._begin(key)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another writer in."""
        self.close()

    @property
    def done(self) -> int:
        """Layers that are on the disk, from the first on."""
        layers = self._source.architecture.layers
        return next((layer for layer in range(layers) if not self._shard(layer).exists()), layers)

    def add_layer(self, index: int, layer: QuantizedLayer) -> None:
        """Write the next layer, whose index is `done`.

        Raises BuildError for a layer that has no form in a checkpoint, and when the disk is full; what was
        written before stays.
        """
        if index != self.done:
            raise ValueError(f"layer {index} came, layer {self.done} is next")
        tensors = [*self._linears(index, layer), *self._vectors(index, layer)]
        with self._disk_errors(f"write layer {index} of"):
            write_tensors(self._shard(index), tensors)

    def finish(self) -> Path:
        """Write tables and metadata, and have the whole appear at `directory`, which is returned.

        Raises BuildError when the disk refuses; calling it again goes on.
        """
        layers = self._source.architecture.layers
        if self.done < layers:
            raise ValueError(f"{self.done} of {layers} layers are written")
        _refuse_existing(self._directory)
        with self._disk_errors("finish"):
            self._write_tables()
            weight_map, forms, left_alone = self._survey()
            self._write_index(weight_map)
            kv_algorithm = None if self._kv_scales is None else self._kv_scales.algorithm
            description = hf_quant_config(forms, left_alone, self._scheme, kv_algorithm)
            config = model_config(self._source, self._table_type().name)
            write_metadata(self._partial, self._source, config | embedded(description))
            write_json(self._partial / MODELOPT_FILE, description)
            (self._partial / _PROGRESS_FILE).unlink()
            for path in self._partial.iterdir():
                sync(path)
            sync(self._partial)
            self._partial.replace(self._directory)
            sync(self._directory.parent)
        self.close()
        return self._directory

    def close(self) -> None:
        """Let another writer in; the files stay."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Remove what is not finished, and let another writer in."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self.close()

    def _begin(self, key: str) -> None:
        """Keep what a run with the same key left, and nothing else."""
        progress = self._partial / _PROGRESS_FILE
        if not _has_key(progress, key):
            for path in self._partial.iterdir():
                path.unlink()
            write_json(progress, {"key": key})
            sync(progress)
            sync(self._partial)
        for path in self._partial.glob(".*.unfinished"):
            path.unlink()

    def _linears(self, index: int, layer: QuantizedLayer) -> Iterator[Pending]:
        for stored, parts in self._together(index, [f"{part}.weight" for part in LINEARS]).items():
            names = [part.removesuffix(".weight") for part in parts]
            try:
                yield from self._one_linear(
                    stored, concatenate_linears([layer.linears[name] for name in names])
                )
            except ValueError as error:
                raise BuildError(
                    f"layer {index}: {' and '.join(names)} cannot be written as {stored}: {error}",
                    "choose a group size that divides the widths of the model, and one scheme for linears "
                    "that the family stores as one",
                ) from error

    def _one_linear(self, stored: str, linear: Linear) -> Iterator[Pending]:
        module = stored.removesuffix(".weight")
        if isinstance(linear, np.ndarray):
            yield whole(stored, smallest_exact(linear, self._table_type()))
            return
        for part, array in encode(linear).items():
            yield whole(f"{module}.{part}", array)

    def _vectors(self, index: int, layer: QuantizedLayer) -> Iterator[Pending]:
        """Gains stay float32: factors that a method moved into them are not rounded again.

        Biases have 16 bits: the exporter of tensorrt-edgellm 0.11 adds them to float16 values as they are.
        """
        for stored, parts in self._together(index, list(self._source.architecture.vectors())).items():
            offset = self._names.place(f"model.layers.{index}.{parts[0]}").offset
            values: NDArray[np.float32] = np.concatenate([layer.vectors[part] for part in parts])
            if stored.endswith(".bias"):
                yield whole(stored, sixteen_bits(values, self._table_type()))
            else:
                yield whole(stored, np.asarray(values - np.float32(offset), np.float32))
        if self._kv_scales is not None:
            for part, scales in (
                ("k_proj.k_scale", self._kv_scales.keys),
                ("v_proj.v_scale", self._kv_scales.values),
            ):
                yield whole(f"model.layers.{index}.self_attn.{part}", np.array(scales[index], np.float32))

    def _together(self, index: int, parts: list[str]) -> Mapping[str, list[str]]:
        """Parts of a layer by the stored tensor that holds them, in the order of their rows."""
        found: dict[str, list[tuple[int, str]]] = {}
        for part in parts:
            place = self._names.place(f"model.layers.{index}.{part}")
            found.setdefault(place.name, []).append((place.start, part))
        return {stored: [part for _, part in sorted(rows)] for stored, rows in found.items()}

    def _write_tables(self) -> None:
        first = self._source.architecture.layers
        for shard, name in enumerate(table_names(self._source), first):
            if self._shard(shard).exists():
                continue
            tensors = [table(self._source, name, self._names.place(name).name, self._table_type())]
            if shard == first:
                place = self._names.place(FINAL_NORM)
                tensors.append(whole(place.name, self._source.tensor(FINAL_NORM) - np.float32(place.offset)))
            write_tensors(self._shard(shard), tensors)

    def _table_type(self) -> np.dtype[Any]:
        if self._kind is None:
            self._kind = table_type(self._source, published_type(self._source))
        return self._kind

    def _shard(self, index: int) -> Path:
        """Layers first, then the tables."""
        count = self._source.architecture.layers + len(table_names(self._source))
        return self._partial / f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _survey(self) -> tuple[dict[str, str], dict[str, Form], list[str]]:
        """File of each tensor, form of each quantized module, and the modules that are floats."""
        weight_map: dict[str, str] = {}
        forms: dict[str, Form] = {}
        left_alone = [
            self._names.place(name).name.removesuffix(".weight") for name in table_names(self._source)
        ]
        left_alone = sorted({*left_alone, HEAD.removesuffix(".weight")})
        linears = {self._names.place(layer_tensor(0, part)).name.split(".", 3)[3] for part in LINEARS}
        for path in sorted(self._partial.glob("model-*.safetensors")):
            header = read_header(path)
            weight_map |= dict.fromkeys(header, path.name)
            modules: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]] = {}
            for name, stored in header.items():
                module, _, part = name.rpartition(".")
                modules.setdefault(module, {})[part] = (stored.kind, stored.shape)
            for module in (name for name in modules if f"{name.split('.', 3)[-1]}.weight" in linears):
                form = form_of(modules[module])
                if form is None:
                    left_alone.append(module)
                else:
                    forms[module] = form
        return weight_map, forms, left_alone

    def _write_index(self, weight_map: Mapping[str, str]) -> None:
        size = sum((self._partial / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._partial / INDEX_FILE, index)

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise BuildError(
                f"{self._directory}: another build is writing this checkpoint",
                "wait for it, or name another output",
            ) from error
        except OSError as error:
            full = error.errno in _FULL
            free = shutil.disk_usage(self._partial).free if full else 0
            raise BuildError(
                f"cannot {what} {self._directory}: {error.strerror or error}"
                + (f", {free} bytes free" if full else ""),
                f"{'free some space' if full else 'make the place writable'} and run it again: it goes on "
                f"behind the layers that are done, in {self._partial}",
            ) from error


def _refuse_existing(directory: Path) -> None:
    if directory.is_symlink() or (
        directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise BuildError(
            f"{directory}: there is something already", "name another output, or remove it first"
        )


def _lock(directory: Path) -> int:
    """Hold the directory against other writers until the handle is closed; raises BlockingIOError."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _has_key(progress: Path, key: str) -> bool:
    try:
        return bool(json.loads(progress.read_text(encoding="utf-8")).get("key") == key)
    except (FileNotFoundError, ValueError, AttributeError):
        return False
