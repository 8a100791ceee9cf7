"""`edgellm quantize`: from a float checkpoint to a quantized one, for any runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json
from edgellm_buildhost.commands.options import (
    BudgetOption,
    CalibrationOption,
    GridOption,
    GroupSizeOption,
    QuantOption,
    SourceArgument,
    bars,
)
from edgellm_buildhost.recipe import QuantName, Request

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keeps `quantize` a command of its own."""


@app.command()
def quantize(
    source: SourceArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory of the quantized checkpoint.", show_default=False),
    ],
    quant: QuantOption = QuantName.INT4_GPTQ,
    group_size: GroupSizeOption = None,
    grid: GridOption = None,
    budget_bytes: BudgetOption = None,
    calibration: CalibrationOption = None,
    json_: JsonOption = False,
) -> None:
    """Quantize a checkpoint into a directory that other tools load too.

    The layout is that of NVIDIA ModelOpt: safetensors and hf_quant_config.json. `edgellm build` takes the
    directory as it is. An interrupted run goes on where it was when the same command is given again.

    \b
    edgellm quantize ./Llama-3.2-1B -o ./Llama-3.2-1B-int4 --quant int4-gptq
    edgellm build ./Llama-3.2-1B-int4 --profile orin-nano-8gb
    """
    from edgellm_buildhost.job import Job

    request = Request(quant, group_size, grid, budget_bytes)
    with bars(shown=not json_) as progress:
        quantized = Job(source=source, request=request, calibration=calibration).quantize(output, progress)
    size_bytes = sum(path.stat().st_size for path in output.iterdir())
    facts = {"checkpoint": str(output), "scheme": quantized.scheme, "size_bytes": size_bytes}
    if json_:
        print_json(facts)
    else:
        # ONNX Runtime does not multiply by FP8.
        build = f"edgellm build {output} --profile BOARD"
        next_step = "load it with vLLM or TensorRT Edge-LLM" if quant is QuantName.FP8 else build
        shown = [("checkpoint", str(output)), ("linears", quantized.scheme)]
        print_facts([*shown, ("size", human_bytes(size_bytes)), ("next", next_step)])
