"""Tables as streams: rows as they arrive, with the types that the beginning decides.

A later row that does not fit carries the reason in the column `REASON`, and every row its place in `PLACE`, so that
training can name it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_paths import with_images
from hf_transfer.data.rows import BadRow, DelimitedFile, format_of, read_rows
from hf_transfer.data.tables import array, json_types
from hf_transfer.errors import UserError

PLACE, REASON = "__place__", "__reason__"
LOOK_ROWS = 10_000  # rows whose types decide those of a JSON stream


def table_stream(paths: Sequence[Path], args: DataArguments) -> tuple[Any, list[str]]:
    """(a stream of the rows of one split, messages for the user); each file is a shard.

    Raises:
        UserError: a file cannot be read, or lists images.
    """
    if format_of(paths[0]) == "parquet":
        return datasets.load_dataset("parquet", data_files=[str(p) for p in paths], split="train", streaming=True), []
    skips = args.on_bad_example == "skip"
    beginning = [row for row in islice(read_rows(paths[0], skips), LOOK_ROWS) if isinstance(row, dict)]
    if not beginning:
        raise UserError(f"{str(paths[0])!r} has no examples.")
    notes = list[str]()
    if format_of(paths[0]) == "csv":
        notes += DelimitedFile(paths[0], skips).notes
        features = {name: Value("string") for name in beginning[0]}
    else:
        features = dict(Features.from_arrow_schema(json_types(beginning, paths[0])))
    first = Dataset.from_list([{n: row.get(n) for n in features} for row in beginning[:100]], Features(features))
    if any(isinstance(f, Image) for f in with_images(first, paths[0], args).features.values()):
        raise UserError("streaming: the images listed in a table are already on disk.", "Remove streaming.")
    types = Features(features).arrow_schema
    stream = IterableDataset.from_generator(
        _rows,
        features=Features({**features, PLACE: Value("string"), REASON: Value("string")}),
        gen_kwargs={"paths": [str(p) for p in paths], "types": types, "skip_bad": skips},
    )
    return stream, notes


def _rows(paths: Sequence[str], types: pa.Schema, skip_bad: bool) -> Iterator[dict[str, Any]]:
    for path in map(Path, paths):
        is_csv = format_of(path) == "csv"
        for number, row in enumerate(read_rows(path, skip_bad), 1):
            values = dict.fromkeys(types.names)
            if isinstance(row, BadRow):
                yield {**values, PLACE: row.place, REASON: row.reason}
                continue
            place, reason = f"{path.name} row {number}", None
            try:
                values |= {f.name: array([row.get(f.name)], f, path)[0].as_py() for f in types}
            except UserError as error:
                reason = f"{error.problem}"
            if is_csv and (missing := set(values) - set(row)):
                reason = f"it has no column {min(missing)!r}, which the beginning of the data has"
            if more := set(row) - set(values):
                reason = f"it has a column {min(more)!r}, which the beginning of the data has not"
            yield {**values, PLACE: place, REASON: reason}
