"""Models as ONNX files: written by PyTorch's exporter, quantized and run by ONNX Runtime (extra `onnx`)."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_transfer.errors import UserError, WorkFailed, chain, one_line, option
from hf_transfer.inference.graphs import LOGITS

_LARGE = 1_500_000_000  # bytes of weights above which they are a file of their own: a protobuf holds 2 GB at most
_NO_FUNCTION = re.compile(r"No ONNX function found for .*?op='([\w.:]+)'")
_QUANTIZED = ("MatMul", "Gemm", "Conv")


def write(program: torch.export.ExportedProgram, names: tuple[str, ...], about: Mapping[str, str], path: Path) -> None:
    """Write a graph as an ONNX file.

    Args:
        program: of `graphs.traced`.
        names: of its inputs.
        about: the metadata of the file.
        path: of the file.

    Raises:
        UserError: ONNX has no operator for something that the model computes.
    """
    is_large = sum(t.nbytes for t in program.state_dict.values()) > _LARGE
    try:
        with _quiet():
            exported = torch.onnx.export(
                program, (), input_names=list(names), output_names=[LOGITS], dynamo=True, verbose=False
            )
            assert exported is not None
            exported.save(str(path), external_data=is_large)
    except torch.onnx.OnnxExporterError as error:
        raise _refusal(error) from error
    _finish(path, about)


def quantize(path: Path, about: Mapping[str, str], batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Quantize an ONNX file to 8 bits in its place, weights per output channel.

    Matrix products quantize their input batch by batch, by its own range. Convolutions would be slower that way than in
    floats: where they hold most weights, the ranges of all activations are measured beforehand (static quantization).

    Args:
        path: of the file.
        about: the metadata of the file.
        batches: real inputs, to measure ranges on.

    Raises:
        UserError: it has nothing that can be quantized.
    """
    import onnx

    weights = _weights_by_operator(onnx.load(str(path), load_external_data=False))
    if not weights:
        raise UserError(
            "int8 changes nothing: the model has no matrix product or convolution with weights.",
            "Leave it out.",
            key="quantize",
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".int8-") as folder:
        beside = Path(folder) / path.name
        is_large = path.with_name(f"{path.name}.data").exists()
        with _quiet():
            if weights.get("Conv", 0) > sum(weights.values()) / 2:
                _quantize_static(path, beside, batches, is_large)
            else:
                _quantize_dynamic(path, beside, is_large)
        for made in Path(folder).iterdir():
            made.replace(path.parent / made.name)
    _finish(path, about)


def _weights_by_operator(model: Any) -> dict[str, int]:
    """Number of weights that each kind of operator reads directly."""
    sizes = {w.name: math.prod(w.dims) for w in model.graph.initializer}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _QUANTIZED and len(node.input) > 1 and node.input[1] in sizes:
            found[node.op_type] = found.get(node.op_type, 0) + sizes[node.input[1]]
    return found


def _quantize_dynamic(path: Path, beside: Path, is_large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        path,
        beside,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # Gather: the table of embeddings
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=is_large,
    )


def _quantize_static(path: Path, beside: Path, batches: Sequence[Mapping[str, torch.Tensor]], is_large: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rows = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rows, None)
            return None if batch is None else {name: value.numpy() for name, value in batch.items()}

    quantize_static(
        path,
        beside,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=is_large,
    )


def opened(path: Path) -> Any:
    """A function from tensors by name to logits, on the CPU with as many threads as torch has.

    Raises:
        UserError: the file cannot be read.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base
        raise UserError(
            f"{str(path)!r} cannot be read by ONNX Runtime ({one_line(error, 200)}).", "Export it again.", key="RUN"
        ) from error
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            (logits,) = session.run([LOGITS], {name: inputs[name].numpy() for name in names})
        except Exception as error:
            raise WorkFailed(f"ONNX Runtime failed on a batch ({one_line(error, 300)}).") from error
        return torch.from_numpy(logits)

    return run


def _refusal(error: Exception) -> UserError:
    """What the exporter refuses, with the operator's name where that is why."""
    text = " ".join(str(cause) for cause in chain(error))
    if found := _NO_FUNCTION.search(text):
        return UserError(
            f"ONNX has no operator for {found[1]}, which the model computes.",
            f"{option('format', 'pt2')} keeps PyTorch's own operators.",
            key="format",
        )
    causes = list(chain(error))
    return UserError(
        f"the model cannot be written as ONNX ({one_line(causes[-1], 300)}).",
        f"{option('format', 'pt2')} keeps PyTorch's own operators.",
        key="format",
    )


def _finish(path: Path, about: Mapping[str, str]) -> None:
    """Write the metadata, and names for the free axes in place of the tracer's symbols."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.helper.set_model_props(model, dict(about))
    symbols: dict[str, str] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for axis, name in enumerate(("batch", "length")):
            if axis < len(dims) and dims[axis].dim_param:
                symbols.setdefault(dims[axis].dim_param, name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]
    onnx.save(model, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the exporters' own notices, which are for their authors."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the quantizer speaks through the root logger
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
