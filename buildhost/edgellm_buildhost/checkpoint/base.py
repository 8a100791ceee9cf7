"""The contract of a float checkpoint: its architecture, tokenizer, and tensors by name, read lazily."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture, tensor_shapes
from edgellm_buildhost.errors import BuildError


@dataclass(frozen=True)
class TokenizerFiles:
    """What a device needs to turn text into ids and back.

    `tokenizer_json` is the format of the `tokenizers` library; `chat_template` is Jinja, or None where the
    model has none.
    """

    tokenizer_json: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool


class Checkpoint(ABC):
    """A published model. Tensors carry Hugging Face names, whatever the file calls them.

    A checkpoint maps its files and keeps no tensor that it handed out, so memory follows the largest tensor
    and not the model.
    """

    name: str
    architecture: Architecture
    tokenizer: TokenizerFiles
    directory: Path | None = None
    """The Hugging Face directory that it is, whose other files belong to it too; None for a GGUF file."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The tensor `name`, float32; linear weights are `[out, in]`.

        Raises BuildError when it is missing, has another shape than the architecture says, or is not finite.
        """
        return self._checked(name, self._read(name), tensor_shapes(self.architecture)[name])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a matrix, for tables that are too large to be held as floats at once; as `tensor`."""
        rows, *columns = tensor_shapes(self.architecture)[name]
        stop = min(stop, rows)
        return self._checked(name, self._read_rows(name, start, stop), (max(stop - start, 0), *columns))

    @abstractmethod
    def _read(self, name: str) -> NDArray[np.float32]:
        """The tensor by our name and in our form, float32; raises BuildError when it cannot be read."""

    def _read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor, as `_read`."""
        return self._read(name)[start:stop]

    def _checked(
        self, name: str, tensor: NDArray[np.float32], expected: tuple[int, ...]
    ) -> NDArray[np.float32]:
        if tensor.shape != expected:
            raise wrong_shape(self.name, name, tensor.shape, expected)
        check_finite(self.name, name, tensor)
        return tensor


def wrong_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> BuildError:
    """The error for the tensor `name` of a checkpoint or file `where`."""
    return BuildError(
        f"{where}: tensor {name} has shape {list(found)}, the configuration says {list(expected)}",
        "the weights and the configuration belong to different models: fetch both again from one place",
    )


def check_finite(where: str, name: str, values: NDArray[np.float32]) -> None:
    """Raises BuildError unless all values of the tensor `name`, in the checkpoint or file `where`, are."""
    finite = np.isfinite(values)
    if not finite.all():
        raise BuildError(
            f"{where}: tensor {name} holds {int(values.size - finite.sum())} values that are not finite",
            "the checkpoint is damaged, or was saved in float16 after an overflow: fetch it "
            "again or save it in bfloat16",
        )
