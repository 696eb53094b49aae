"""Which files are images, and tables with a column of their paths, which are relative to the table's folder."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Image, Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.errors import UserError

# Column names that are recognized without `image_column_name`.
IMAGE_COLUMNS = ("image", "img", "pixel_values", "image_path", "file_name", "filename", "file", "path")
# What PIL opens, without documents (pdf, ps, eps), video (mpg), and data that PIL only identifies (h5, grib, wmf).
_OPENED = (
    "apng avif avifs blp bmp bw cur dcx dds dib fit fits flc fli ftc ftu gbr gif icb icns ico iim im j2c j2k jfif "
    "jp2 jpc jpe jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm psd pxr qoi ras rgb rgba sgi tga tif "
    "tiff vda vst webp xbm xpm"
)
_RAW = "3fr arw cr2 cr3 crw dcr dng erf iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
_REMEDIES = {
    "heic heif hif": "Convert HEIC images with `heif-convert IMAGE IMAGE.jpg` (libheif).",
    _RAW: "Convert raw images with `darktable-cli IMAGE IMAGE.jpg`.",
    "dcm exr hdr jxl jxr svg wdp": "Convert them with `magick mogrify -format png FILES` (ImageMagick).",
}
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _OPENED.split())
# Suffix of images that PIL does not open → what converts them.
UNREADABLE_IMAGES = {f".{name}": remedy for names, remedy in _REMEDIES.items() for name in names.split()}


def with_images(table: Dataset, file: Path, args: DataArguments) -> Dataset:
    """`table` with its path column turned into an undecoded image column; `table` itself if it has no such column.

    A text column holds paths if `image_column_name` names it, or if it has one of the usual names and its first value
    has an image extension. Relative paths are resolved against the table's folder, or against the working directory if
    the first one exists only there. Paths written on Windows are read as such.

    Raises:
        UserError: they are addresses.
    """
    column = _path_column(table, args)
    if column is None:
        return table
    values = [None if not v else native(v, file.parent) for v in table[column][:]]
    first = next((v for v in values if v), "")
    if "://" in first:
        raise UserError(
            f"column {column!r} of {str(file)!r} holds addresses ({first!r}), and images are read from files.",
            "Download them, and write their paths into the column.",
            key="image_column_name",
        )
    here = Path(first).exists() and not (file.parent / first).exists()
    base = Path() if here else file.parent
    paths = [None if not v else str((base / v).absolute()) for v in values]
    cells = [{"path": path, "bytes": None} for path in paths]
    order = table.column_names
    with_cells = table.remove_columns(column).add_column(column, cells, feature=Image(decode=False))
    return with_cells.select_columns(order)


def native(path: str, folder: Path) -> str:
    """A path with this system's separators, if no such file exists as it is written."""
    return path if "\\" not in path or (folder / path).exists() else path.replace("\\", "/")


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
