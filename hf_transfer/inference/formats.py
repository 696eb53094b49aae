"""The formats of exported models: how each is written, and how it is opened.

The packages that they need are in `config.arguments.export`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_transfer.errors import UserError, one_line
from hf_transfer.inference import onnx_files

Run = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
Write = Callable[[torch.export.ExportedProgram, tuple[str, ...], Mapping[str, str], Path], None]
Quantize = Callable[[Path, Mapping[str, str], Sequence[Mapping[str, torch.Tensor]]], None]
METADATA = "hf_transfer.json"  # inside of a .pt2 archive


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as a value of `format`.
        file: name of the file in an export's folder.
        write: writes a graph: program, names of the inputs, metadata, path.
        open: the function from tensors by name to logits that a file holds.
        quantize: makes a file 8-bit in its place; None where that is not possible.
        may_pickle: whether a file may hold pickles, which run code when they are read.
    """

    name: str
    file: str
    write: Write
    open: Callable[[Path], Run]
    quantize: Quantize | None = None
    may_pickle: bool = False


# ---- torch.export ----------------------------------------------------------------------------------------------------


def _write_pt2(
    program: torch.export.ExportedProgram, names: tuple[str, ...], about: Mapping[str, str], path: Path
) -> None:
    text = json.dumps({**about, "inputs": list(names)})
    torch.export.save(program, path, extra_files={METADATA: text})


def _open_pt2(path: Path) -> Run:
    extra = {METADATA: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        names = json.loads(extra[METADATA])["inputs"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{str(path)!r} cannot be read by torch.export ({one_line(error, 200)}).", "Export it again.", key="RUN"
        ) from error
    module = program.module()

    def run(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = module(*(inputs[name] for name in names))
        return logits

    return run


# ---- OpenVINO --------------------------------------------------------------------------------------------------------


def _write_openvino(
    program: torch.export.ExportedProgram, names: tuple[str, ...], about: Mapping[str, str], path: Path
) -> None:
    import openvino

    onnx_path = path.with_suffix(".onnx")
    onnx_files.write(program, names, about, onnx_path)
    model = openvino.convert_model(str(onnx_path))
    for name, value in about.items():
        model.set_rt_info(value, ["hf_transfer", name])
    is_half = any(t.dtype == torch.float16 for t in program.state_dict.values())
    openvino.save_model(model, str(path), compress_to_fp16=is_half)
    for made in onnx_path.parent.glob(f"{onnx_path.name}*"):
        made.unlink()


def _open_openvino(path: Path) -> Run:
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled: Any = openvino.Core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise UserError(
            f"{str(path)!r} cannot be read by OpenVINO ({one_line(error, 200)}).", "Export it again.", key="RUN"
        ) from error
    names = [port.any_name for port in compiled.inputs]

    def run(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(compiled({name: inputs[name].numpy() for name in names})[0].copy())

    return run


FORMATS = {
    "onnx": Format("onnx", "model.onnx", onnx_files.write, onnx_files.opened, onnx_files.quantize),
    "pt2": Format("pt2", "model.pt2", _write_pt2, _open_pt2, may_pickle=True),
    "openvino": Format("openvino", "model.xml", _write_openvino, _open_openvino),
}
