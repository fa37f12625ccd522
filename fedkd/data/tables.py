"""Tables: images, labels and client ids in columns, as the library ``datasets`` reads them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd.core.errors import DataError, last_line, unknown
from fedkd.core.notes import plain
from fedkd.data import folders, pictures
from fedkd.data.folders import TEST
from fedkd.data.samples import Samples, array
from fedkd.data.sources import Source, fraction_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedkd.data.samples import Picture

    Rows = NDArray[np.int64]

#: Files that cannot hold images, only their paths.
TEXT = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
BINARY = {".parquet": "parquet", ".arrow": "arrow"}
LABELS = ("label", "labels", "fine_label")  # columns that are preferred to others that could be the label


def of_source(source: Source, split: str) -> Samples:
    """A split of a data set of the Hugging Face hub, or of a local folder or file.

    Raises:
        DataError: it cannot be read, has no such split or column, or has a row that cannot be used.

    """
    with _reading(source):
        splits = _loaded(source)
    part = source.train_part or "train"
    fraction = fraction_of(source.held_out)
    if split == "test" and fraction is None:
        part = source.held_out or next((name for name in TEST if name in splits), "")
    if not part:
        raise DataError(
            f"{source.name} has no test split (it has {', '.join(splits)}); name one with test=SPLIT, "
            "or hold out a fifth of the training images with test=0.2."
        )
    if part not in splits:
        option = "train" if part == (source.train_part or "train") else "test"
        raise DataError(f"{unknown(f'split of {source.name}:', part, splits)} Choose one with {option}=SPLIT.")
    has_clients = split == "train" or fraction is not None  # the parts of a split are drawn from the same rows
    samples = _samples(splits[part], source, f"{source.name} ({part})", has_clients)
    samples = dataclasses.replace(samples, notes=(*samples.notes, *_unread(source, splits)))
    return samples if fraction is None else samples.part(split, fraction)


def of_parquet(source: Source, files: Sequence[Path], split: str) -> Samples:
    """The samples of local parquet files.

    Raises:
        DataError: as `of_source`.

    """
    with _reading(source):
        import datasets

        table = datasets.Dataset.from_parquet([str(file) for file in files])
    return _samples(table, source, str(files[0]) if len(files) == 1 else source.name, split == "train")


def _unread(source: Source, splits: Mapping[str, Any]) -> Iterator[str]:
    """A note if a folder has more image files than rows: the library follows no links to folders, for example."""
    root = Path(source.argument).expanduser()
    files = folders.walk(root) if root.is_dir() else ()
    count = sum(path.suffix.lower() in pictures.suffixes() for path in files)
    if (rows := sum(map(len, splits.values()))) < count:
        what = f"the library datasets reads {plain(rows, 'row')}, but there are {plain(count, 'image file')}"
        yield f"{source.name}: {what}; folder:{source.argument} reads them all."


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Make one sentence of what the library raises, without what it prints."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints two lines for each of six tries to connect
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds
        cause = error.__cause__ or error  # its own message may only say that an error occurred
        reason = last_line(next(iter(str(cause).strip().splitlines()), type(cause).__name__))
        raise DataError(f"Cannot read {source.name}: {reason}.") from error


def _loaded(source: Source) -> Mapping[str, Any]:
    """The tables by the names of their splits."""
    import datasets

    root = Path(source.argument).expanduser()
    if root.is_dir() and ((root / "state.json").is_file() or (root / "dataset_dict.json").is_file()):
        saved = datasets.load_from_disk(str(root))
        return saved if isinstance(saved, dict) else {"train": saved}
    if root.is_file():
        if (kind := (TEXT | BINARY).get(root.suffix.lower())) is None:
            raise DataError(f"{root} is no table; known are {', '.join(TEXT | BINARY)}.")
        options: dict[str, Any] = {"sep": "\t"} if root.suffix.lower() == ".tsv" else {}
        if TEXT.get(root.suffix.lower()) == "csv":
            options |= {"keep_default_na": False, "na_values": [""]}  # a class may be called None or NA
        return datasets.load_dataset(kind, data_files=str(root), **options)  # type: ignore[no-any-return]
    is_path = source.argument.startswith(("/", ".", "~")) or root.suffix.lower() in TEXT | BINARY
    if not root.is_dir() and is_path:
        raise DataError(f"There is no folder or file {root}.")
    return datasets.load_dataset(str(root) if root.is_dir() else source.argument)  # type: ignore[no-any-return]


def _samples(table: Any, source: Source, where: str, has_clients: bool) -> Samples:
    image = _image_column(table, source)
    missing: dict[int, str] = {}
    fetch, files = _fetch(table, image, source, missing)
    labels, names = np.full(len(table), -1), tuple[str, ...]()
    clients = None
    if source.labeled:
        labels, names = _labels(table, _label_column(table, source), where, missing)
    if source.client_column and has_clients:
        clients = _clients(table, _named(table, source.client_column, source), missing)
    samples = Samples(where, fetch, np.arange(len(table)), labels, names, clients, files)
    if not missing:
        return samples
    first = min(missing)
    problem = f"{samples.place(first)} {missing[first]}"
    if not source.skip_damaged:
        raise DataError(f"{problem}; give it one, or leave out all such images with --skip-damaged.")
    if len(missing) == len(table):
        raise DataError(f"{where} has no image that can be used: {problem}.")
    note = f"{where}: {plain(len(missing), 'image')} left out, the first since {problem}."
    return dataclasses.replace(samples.select(np.setdiff1d(samples.rows, list(missing))), notes=(note,))


def _named(table: Any, column: str, source: Source) -> str:
    """The column, if there is one of this name."""
    if column not in table.features:
        raise DataError(unknown(f"column of {source.name}:", column, table.features))
    return column


def _chosen(candidates: Sequence[str], table: Any, source: Source, option: str) -> str:
    """The only candidate."""
    if len(candidates) == 1:
        return candidates[0]
    found = f"several {option} columns ({', '.join(candidates)})" if candidates else f"no {option} column"
    advice = f"choose one with {option}=COLUMN" if source.reader == "hugging_face" else "exactly one is needed"
    raise DataError(f"{source.name} has {found} among {', '.join(table.features)}; {advice}.")


def _image_column(table: Any, source: Source) -> str:
    import datasets

    if source.image_column:
        return _named(table, source.image_column, source)
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in table.features.items() if _holds_images(feature)]
    return _chosen(images, table, source, "image")


def _holds_images(feature: Any) -> bool:
    """Whether a column has encoded images or arrays; one of paths is recognized by the user only."""
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_bytes or _is_array(feature)


def _is_array(feature: Any) -> bool:
    import datasets

    arrays = (datasets.Array2D, datasets.Array3D)
    lists = (datasets.List, datasets.LargeList)
    return isinstance(feature, arrays) or (isinstance(feature, lists) and isinstance(feature.feature, lists))


def _label_column(table: Any, source: Source) -> str:
    import datasets

    if source.label_column:
        return _named(table, source.label_column, source)
    classes = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    preferred = [name for name in LABELS if name in table.features]
    return _chosen(preferred or classes, table, source, "label")


def _fetch(
    table: Any, image: str, source: Source, missing: dict[int, str]
) -> tuple[Callable[[Rows], list[Picture]], Sequence[Path]]:
    """What gets the images of some rows, and the files of all of them if the table only has their paths."""
    import datasets

    feature = table.features[image]
    column = table.select_columns([image])
    root = Path(source.argument).expanduser()
    if _is_array(feature):
        return lambda rows: [_array(entry) for entry in column[rows][image]], ()
    if isinstance(feature, datasets.Image) or _holds_images(feature):
        column = column.cast_column(image, datasets.Image(decode=False))
        return lambda rows: [_encoded(entry, root) for entry in column[rows][image]], ()
    if getattr(feature, "dtype", "") not in ("string", "large_string") or root.suffix.lower() not in TEXT:
        raise DataError(
            f"Column {image} of {source.name} holds no images, but {getattr(feature, 'dtype', feature)}; "
            "choose another with image=COLUMN. (Paths of images are read from .csv and .jsonl files.)"
        )
    paths = column[image][:]
    missing |= {row: "has no path" for row, path in enumerate(paths) if not path}
    files = [root.parent / (path or "") for path in paths]
    return lambda rows: [files[row] for row in rows], files


def _encoded(entry: Mapping[str, Any] | None, root: Path) -> Picture:
    """The encoded image of an entry: its bytes, or the file that it names, which must be in the folder that is read."""
    if entry is None or (entry["bytes"] is None and not entry["path"]):
        return None
    if entry["bytes"] is not None:
        content: bytes = entry["bytes"]
        return content
    path = Path(entry["path"])
    if root.exists() and not (path.is_absolute() and os.path.realpath(root) in map(os.path.realpath, path.parents)):
        return pictures.Unsupported(f"is only a path ({path}); store the image itself, or list paths in a .csv file")
    return path


def _array(entry: Any) -> Picture:
    """The pixels in an entry of nested lists."""
    if entry is None:
        return None
    try:
        values = np.asarray(entry)
    except ValueError:  # rows of different lengths
        return pictures.Unsupported("has rows of different lengths")
    whole = values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 255
    return array(values.astype(np.uint8) if whole else values)


def _labels(table: Any, column: str, where: str, missing: dict[int, str]) -> tuple[Rows, tuple[str, ...]]:
    """The number of each label, -1 for those that are added to ``missing``, and the names of the classes.

    Text is numbered in the order of the names; whole numbers are class numbers.
    """
    import datasets

    feature = table.features[column]
    values = _values(table, column, "label", missing)
    names: tuple[str, ...] = ()
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "bool"):
        names = tuple(sorted({str(value) for value in values if value is not None}))
        numbers = {name: number for number, name in enumerate(names)}
        values = [None if value is None else numbers[str(value)] for value in values]
    elif not isinstance(feature, datasets.Value) or not feature.dtype.startswith(("int", "uint", "float", "null")):
        raise DataError(
            f"Column {column} of {where} holds {getattr(feature, 'dtype', 'lists')}, not one class for each image; "
            "choose another with label=COLUMN."
        )
    if (fraction := next((i for i, value in enumerate(values) if value is not None and value % 1), None)) is not None:
        raise DataError(f"Image {fraction} of {where} has the label {values[fraction]:g}, which is no class number.")
    return np.asarray([-1 if value is None else int(value) for value in values], np.int64), names


def _clients(table: Any, column: str, missing: dict[int, str]) -> NDArray[np.str_]:
    """The client of each row."""
    import datasets

    feature = table.features[column]
    values = _values(table, column, f"client id in column {column}", missing)
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value is None else feature.names[value] for value in values]
    return np.asarray(
        [str(int(value)) if isinstance(value, float) and not value % 1 else str(value) for value in values]
    )


def _values(table: Any, column: str, what: str, missing: dict[int, str]) -> list[Any]:
    """A column, with None for what is null or not a number; these rows are added to ``missing``."""
    values = [None if value is None or value != value else value for value in table[column][:]]
    missing |= {row: f"has no {what}" for row, value in enumerate(values) if value is None}
    return values
