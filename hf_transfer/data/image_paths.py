"""Paths of images in tables, as people write them: relative to the table."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Image, Value

from hf_transfer.config.arguments.data import DataArguments

# What a column of pictures is called where nobody said so.
IMAGE_COLUMNS = ("image", "img", "pixel_values", "image_path", "file_name", "filename", "file", "path")
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def with_images(table: Dataset, file: Path, args: DataArguments) -> Dataset:
    """`table` with its column of paths, if it has one, as images that are not read yet; else `table` itself.

    A column of texts is one where `image_column_name` names it, or where it is called as such columns are and its
    first value ends like an image. Relative paths count from the table's folder; from here only where they lead
    nowhere there.
    """
    column = _path_column(table, args)
    if column is None:
        return table
    values = table[column][:]
    first = next((v for v in values if v), "")
    here = Path(first).exists() and not (file.parent / first).exists()
    base = Path() if here else file.parent
    paths = [None if not v else str((base / v).absolute()) for v in values]
    cells = [{"path": path, "bytes": None} for path in paths]
    order = table.column_names
    made = table.remove_columns(column).add_column(column, cells, feature=Image(decode=False))
    return made.select_columns(order)


def _path_column(table: Dataset, args: DataArguments) -> str | None:
    texts = [n for n, f in table.features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string")]
    if args.image_column_name:
        return args.image_column_name if args.image_column_name in texts else None
    if args.task not in (None, "image-classification") or any(isinstance(f, Image) for f in table.features.values()):
        return None
    for name in IMAGE_COLUMNS:
        if name in texts:
            first = next((v for v in table[name][:100] if v), "")
            if Path(first).suffix.lower() in IMAGE_SUFFIXES and not any(c.isspace() for c in Path(first).suffix):
                return name
    return None
