"""A build as its user asked for it, from the source's path to what is attached to the engine.

Everything that can be refused is refused in `prepare`, before the first layer is read.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.quality import CalibrationText, HeldOutText, QualityReport
from edgellm.profiles import load_profile
from edgellm_buildhost import provenance
from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.build import (
    build_engine,
    calibration_windows,
    quantize,
    recipe_calibrates,
    suggested_name,
    text_windows,
)
from edgellm_buildhost.calibration.text import Text, calibration_text, held_out_text, read_text
from edgellm_buildhost.calibration.walk import FloatModel
from edgellm_buildhost.checkpoint import Checkpoint, open_checkpoint
from edgellm_buildhost.compile import check_buildable
from edgellm_buildhost.engine_config import runtime_requires
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.estimate import check_built, check_fits
from edgellm_buildhost.footprint import LinearForm
from edgellm_buildhost.progress import Progress
from edgellm_buildhost.quality.attestation import envelope as quality_envelope
from edgellm_buildhost.quality.engine import check_runs_here
from edgellm_buildhost.quality.gate import check_increase, check_limit
from edgellm_buildhost.quality.measure import WINDOW_TOKENS, WINDOWS, measure
from edgellm_buildhost.quantized import QuantizedCheckpoint, is_quantized, open_quantized
from edgellm_buildhost.quantized.dequantized import DequantizedCheckpoint
from edgellm_buildhost.recipe import KvName, QuantName, Request, recipe_for
from edgellm_buildhost.workspace import code_digest, key_of, workspace

_AS_IT_IS = "as it is"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""As `EngineConfig` has it."""
_PLAIN = {QuantName.INT4, QuantName.INT8, QuantName.FP8}


@dataclass(frozen=True)
class Job:
    """What is asked for; None leaves it to us. A source that is quantized already takes no `request`."""

    source: Path
    request: Request | None = None
    kv: KvName = KvName.FLOAT32
    profile: str = "host"
    name: str | None = None
    calibration: Path | None = None
    report: bool | None = None
    held_out: Path | None = None
    max_perplexity_increase: float | None = None
    context: int | None = None
    concurrency: int = 1
    canary: bool = True

    def prepare(self) -> Prepared:
        """Everything but the work; raises BuildError, DoesNotFitError, OSError."""
        if self.request is not None and self.request.quant is QuantName.FP8:
            raise BuildError(
                "--quant fp8 makes a checkpoint, no engine",
                "`edgellm quantize --quant fp8 -o DIR` writes it; engines are built with the other methods",
            )
        _check_name(self.name)
        checkpoint = open_source(self.source)
        request = self._request_for(checkpoint)
        self._check_calibration(self.kv is KvName.INT8 or recipe_calibrates(checkpoint, request))
        measures = self._measures(request)
        check_buildable(checkpoint.architecture, checkpoint.name)
        if measures:
            check_runs_here(runtime_requires(self.kv))
        if request is not None:  # what a quantized source takes is known when it was compiled
            self._check_fits(checkpoint.architecture, request)
        held_out = _text(self.held_out, held_out_text)
        return Prepared(
            job=self,
            checkpoint=checkpoint,
            request=request,
            name=self.name or suggested_name(checkpoint.name, request.quant if request else None, self.kv),
            sources=provenance.Sources.read(self.source),
            text=_text(self.calibration, calibration_text),
            held_out=held_out,
            windows=text_windows(checkpoint, held_out, WINDOWS, WINDOW_TOKENS) if measures else None,
        )

    def _measures(self, request: Request | None) -> bool:
        """Whether a report is made; raises BuildError for options that contradict each other."""
        if self.max_perplexity_increase is not None:
            check_limit(self.max_perplexity_increase)
            if self.report is False:
                raise BuildError(
                    "--max-perplexity-increase needs the report that --no-report leaves out",
                    "leave one of them away",
                )
            return True
        measures = request is not None and request.quant not in _PLAIN if self.report is None else self.report
        if self.held_out is not None and not measures:
            raise BuildError("--held-out: no report is made of this build", "add --report, or leave it away")
        return measures

    def _request_for(self, checkpoint: Checkpoint | QuantizedCheckpoint) -> Request | None:
        """What is done to the source's weights: None, for a source that is quantized already."""
        if isinstance(checkpoint, Checkpoint):
            request = self.request or Request(QuantName.INT4)
            recipe_for(request, checkpoint.architecture)
            return request
        if self.request is not None:
            raise BuildError(
                f"{self.source}: quantized already, and built as it is",
                "leave --quant, --group-size, --grid and --budget-bytes away, "
                "or give the float checkpoint that it was made from",
            )
        return None

    def _check_calibration(self, reads: bool) -> None:
        """Nobody should believe that a text was used which was not."""
        if self.calibration is not None and not reads:
            raise BuildError(
                "--calibration: nothing that was asked for reads a text",
                "leave it away, or choose int4-gptq or another calibrated method, or --kv int8",
            )

    def _check_fits(self, architecture: Architecture, request: Request) -> None:
        """Raises DoesNotFitError for a board that cannot hold what would be built."""
        check_fits(
            architecture,
            request.quant.value,
            self.kv,
            load_profile(self.profile),
            form=LinearForm.of(recipe_for(request, architecture).rounding),
            context_tokens=self.context,
            max_sequences=self.concurrency,
        )

    def quantize(self, output: Path, progress: Progress) -> QuantizedCheckpoint:
        """The quantized checkpoint alone, in the directory `output`; raises BuildError, OSError."""
        checkpoint = open_source(self.source)
        if not isinstance(checkpoint, Checkpoint):
            raise BuildError(f"{self.source}: quantized already", "give it to `edgellm build` as it is")
        request = self.request or Request(QuantName.INT4_GPTQ)
        if output.exists() and any(output.iterdir()):
            raise BuildError(f"{output}: exists", "name a new directory, or remove this one")
        calibrates = recipe_calibrates(checkpoint, request)
        self._check_calibration(calibrates)
        text = _text(self.calibration, calibration_text)
        key = _key(provenance.Sources.read(self.source), request, text)
        read = None
        if calibrates:
            read = calibration_windows(checkpoint, text)
        return quantize(checkpoint, request, output, key=key, windows=read, progress=progress)


@dataclass(frozen=True)
class Prepared:
    """A build about to begin."""

    job: Job
    checkpoint: Checkpoint | QuantizedCheckpoint
    request: Request | None
    name: str
    sources: provenance.Sources
    text: Text
    held_out: Text
    windows: NDArray[np.int64] | None
    """Of the held-out text; None: no report is made."""

    def run(self, directory: Path, progress: Progress) -> tuple[EngineConfig, QualityReport | None]:
        """Make the engine's files in `directory`, and measure them if that was asked for."""
        key = _key(self.sources, self.request, self.text)
        with workspace(key) as work, naming_full_disk(directory.parent):
            config = build_engine(
                self.checkpoint,
                self.request,
                directory,
                profile=self.job.profile,
                kv=self.job.kv,
                name=self.name,
                text=self.text,
                work=work,
                key=key,
                progress=progress,
                canary=self.job.canary,
            )
            if self.request is None:
                self._check_built(config)
            return config, self._measure(directory, config, progress)

    def _check_built(self, config: EngineConfig) -> None:
        check_built(
            config,
            load_profile(self.job.profile),
            context_tokens=self.job.context,
            max_sequences=self.job.concurrency,
        )

    def said(self, digest: str, report: QualityReport | None, began_s: float) -> list[bytes]:
        """What is attached to the engine of that manifest digest: unsigned envelopes."""
        job, asked = self.job, _asked(self.request)
        options = {**asked, "kv": job.kv.value, "profile": job.profile, "name": self.name}
        made = provenance.envelope(self.name, digest, self.sources, options, began_s)
        return [made] if report is None else [made, quality_envelope(self.name, digest, report)]

    def _measure(self, directory: Path, config: EngineConfig, progress: Progress) -> QualityReport | None:
        """The report, if one was asked for; raises BuildError when it is worse than was allowed."""
        if self.windows is None:
            return None
        source, text = self.checkpoint, self.held_out
        floats = source if isinstance(source, Checkpoint) else DequantizedCheckpoint(source)
        calibrated = recipe_calibrates(source, self.request)
        method = _AS_IT_IS if self.request is None else self.request.quant.value
        report = measure(
            FloatModel(floats),
            directory,
            config,
            self.windows,
            progress,
            text=HeldOutText(name=text.name, sha256=text.sha256),
            kind="float" if isinstance(source, Checkpoint) else "dequantized",
            calibration=CalibrationText(method=method, sha256=self.text.sha256) if calibrated else None,
        )
        if self.job.max_perplexity_increase is not None:
            check_increase(report, self.job.max_perplexity_increase, method)
        return report


@contextmanager
def naming_full_disk(place: Path) -> Iterator[None]:
    """An error that says what is full, where the system's says only that something is; raises BuildError."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise BuildError(
            f"{place}: {error.strerror}, {shutil.disk_usage(place).free:,} bytes free",
            "free some space and run it again: it goes on behind the layers that are done",
        ) from error


def open_source(source: Path) -> Checkpoint | QuantizedCheckpoint:
    """The checkpoint, float or quantized; raises BuildError."""
    if source.is_dir() and is_quantized(source):
        return open_quantized(source)
    return open_checkpoint(source)


def _check_name(name: str | None) -> None:
    if name is not None and not _NAME.fullmatch(name):
        raise BuildError(
            f"--name {name!r:.140} is no name for an engine",
            "take up to 128 of a-z, 0-9, dot, hyphen and underscore, and begin with a letter or a digit",
        )


def _key(sources: provenance.Sources, request: Request | None, text: Text) -> str:
    return key_of(
        {
            "code": code_digest(),
            "tools": provenance.tools(),
            "source": dict(sources.files),
            "request": _asked(request),
            "text": text.sha256,
        }
    )


def _asked(request: Request | None) -> dict[str, str]:
    """What the user said, by the options' names."""
    if request is None:
        return {}
    said = {name: getattr(value, "value", value) for name, value in asdict(request).items()}
    return {name: str(value) for name, value in said.items() if value is not None}


def _text(path: Path | None, default: Callable[[], Text]) -> Text:
    return default() if path is None else read_text(path)
