"""Training data on disk: `.jsonl` files, every line checked before anything else happens. `rows` says what one is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..fields import shorten
from ..files import as_utf8, not_unicode, read_bytes
from ..paths import expanded
from .rows import read_row

_LISTED = 20  # faults shown; a file of the wrong form has one a line


@dataclass(frozen=True)
class Splits:
    """What to train on, what to validate on, and sentences about what was done to the data."""

    train: list[Any]  # `rows.Record`, or what the objective reads
    valid: list[Any]
    notes: tuple[str, ...] = ()


ReadRow = Callable[[Any, str, dict[str, str]], Any]


def read_data(data: str | Path, valid: str | Path | None = None, read: ReadRow = read_row) -> Splits:
    """Records of a `.jsonl` file, or of a directory with train.jsonl and perhaps valid.jsonl.

    `valid` names a file to validate on instead of the directory's. `read` makes a record of a line's value, as
    `rows.read_row` does. Raises DataError, one line that names the file, the
    line, the key and what was expected, of up to 20 faulty lines.
    """
    path = expanded(data)
    valid_path = None if valid is None else expanded(valid)
    if path.is_dir():
        if not (path / "train.jsonl").is_file():
            raise DataError(f"{path} has no train.jsonl; put one line of JSON an example there, or name a .jsonl file")
        if valid_path is None and (path / "valid.jsonl").is_file():
            valid_path = path / "valid.jsonl"
        path = path / "train.jsonl"
    faults: list[str] = []
    unused: dict[str, str] = {}
    train = _read(path, read, faults, unused)
    held = [] if valid_path is None else _read(valid_path, read, faults, unused)
    if faults:
        more = f"; and {len(faults) - _LISTED:,} more" if len(faults) > _LISTED else ""
        raise DataError("; ".join(faults[:_LISTED]) + more)
    for file, records in ((path, train), (valid_path, held)):
        if file is not None and not records:
            raise DataError(f"{file} holds no examples; write one JSON object a line")
    listed = ", ".join(f"{shorten(key)} ({source})" for key, source in [*unused.items()][:_LISTED])
    note = f"keys that are not used, and the lines that have them first: {listed}"
    return Splits(train, held, (note,) if listed else ())


def _read(path: Path, read: ReadRow, faults: list[str], unused: dict[str, str]) -> list[Any]:
    try:
        data = read_bytes(path, most=None)
        lines = as_utf8(data).split(b"\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} {not_unicode(error, data, path)}") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; name a .jsonl file or a directory with one"
        ) from error
    records, first = [], True
    for number, line in enumerate(lines, 1):
        source = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8").removeprefix("\ufeff"))  # of files that were joined
        except UnicodeDecodeError as error:
            # The way out is the whole file's, and said once.
            faults.append(f"{source}: {not_unicode(error, data, path) if first else 'is not UTF-8 text'}")
            first = False
        except (ValueError, RecursionError) as error:
            faults.append(f"{source}: is not JSON ({error}); expected one JSON object a line")
        else:
            try:
                records.append(read(value, source, unused))
            except DataError as error:
                faults.append(f"{source}: {error}")
    return records


def hold_out(records: Sequence[Any], share: float, seed: int) -> Splits:
    """Keep a share of the examples (drawn with `seed`) for validation, and at least one to train on.

    Of ten or more at least one is kept; of fewer the share is rounded down, so that the usual one keeps none.
    """
    import random

    total = len(records)
    count = max(1, round(total * share)) if share and total >= 10 else int(total * share)
    count = min(count, max(0, total - 1))
    chosen = set(random.Random(seed).sample(range(total), count))
    train = [record for n, record in enumerate(records) if n not in chosen]
    if count:
        note = f"no valid.jsonl: {count:,} of {total:,} examples were held out to validate on"
    else:
        few = "1 example is" if total == 1 else f"{total:,} examples are"
        note = f"no valid.jsonl, and {few} too few to hold out {share:.0%}: nothing is validated"
    return Splits(train, [records[n] for n in sorted(chosen)], (note,) if share else ())
