"""Multivariate series: tables whose rows are evenly spaced steps, split by time."""

import csv as tables
import gzip
import hashlib
import importlib.util
import statistics
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BadData
from . import cache
from .cache import Origin, Remote, in_folder, locate, need, sha256

_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
cache.FILES |= {
    "ett/ETTh1.csv": Remote(_ETT + "ETTh1.csv", "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ett/ETTh2.csv": Remote(_ETT + "ETTh2.csv", "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"),
    "exchange_rate.txt.gz": Remote(
        "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master/exchange_rate/exchange_rate.txt.gz",
        "6a4fbb561dcdee43f071a83badbeec9223a335552278348656738b556f1c2e9d"),
}
EXCHANGE = "0127465b51e3cd3c360f8eb2be30cfd294689a2a55903eb8245aafc396626c7f"  # SHA-256 of the text in the archive
MONTH = 30 * 24  # hours, as the field's loaders count them
GAP = 1.5  # a step of time this much longer than the usual one has rows missing


@dataclass(frozen=True, eq=False)
class Series:
    """values: float64 (T, V), finite, none constant in training; names of the variates; borders: split -> its rows.

    A split's rows (start, end) are those to be forecast; val and test may look back into the rows before their start.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...]
    borders: dict[str, tuple[int, int]]
    origin: Origin

    def __post_init__(self) -> None:
        title, (start, end) = self.origin.title, self.borders["train"]
        bad = np.argwhere(~np.isfinite(self.values))
        if len(bad):
            raise BadData(f"{title}: {len(bad)} of {self.values.size} values are NaN or infinite, the first in row "
                          f"{bad[0, 0] + 1} of {self.names[bad[0, 1]]!r}; fill the gaps first")
        part = self.values[start:end]
        constant = [n for n, same in zip(self.names, (part == part[:1]).all(0), strict=True) if same]
        if constant and len(part) > 1:
            raise BadData(f"{title}: {_some(constant)} never changes in the training part (the first {end} rows), so there "
                          "is no scale for it; leave the column out")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def etth(number: int) -> Series:
    """ETTh1 or ETTh2: 7 variates of an electricity transformer, hourly; 12, 4 and 4 months, the rest is not used."""
    path = locate(f"ett/ETTh{number}.csv")
    values, names = read_csv(path)
    borders = {"train": (0, 12 * MONTH), "val": (12 * MONTH, 16 * MONTH), "test": (16 * MONTH, 20 * MONTH)}
    return Series(values, names, borders, Origin(
        f"Electricity transformer temperature (ETTh{number})", "https://github.com/zhouhaoyi/ETDataset", "CC BY-ND 4.0",
        f"12, 4 and 4 months of 30 days; as usual, the last {len(values) - 20 * MONTH} hours are left out"))


def exchange() -> Series:
    """Daily exchange rates of eight currencies, 1990 to 2016; 70, 10 and 20 %."""
    path = in_folder("exchange_rate.csv")
    if path is None:
        text = gzip.decompress(locate("exchange_rate.txt.gz").read_bytes())
    else:
        text = path.read_bytes()
        if hashlib.sha256(text).hexdigest() != EXCHANGE:
            raise BadData(f"{path} is damaged or another file: its SHA-256 is {sha256(path)}, expected {EXCHANGE}; "
                          "remove it and it is downloaded")
    values = np.array([line.split(",") for line in text.decode().split()], dtype=np.float64)
    names = ("Australia", "Britain", "Canada", "Switzerland", "China", "Japan", "New Zealand", "Singapore")
    return Series(values, names, seventy_ten_twenty(len(values)), Origin(
        "Exchange rates, daily", "https://github.com/laiguokun/multivariate-time-series-data",
        "none stated; cite Lai et al., 2018", "the first 70 %, the next 10 %, the last 20 % of the days"))


def temperatures() -> Series:
    """Hourly temperatures of San Francisco and Seattle over a year, inside vega-datasets; 70, 10 and 20 %."""
    module = importlib.util.find_spec("vega_datasets")
    if module is None or module.origin is None:
        need("vega_datasets", "vega-datasets")
    columns = []
    for city in ("sf", "seattle"):
        path = Path(module.origin).parent / "_data" / f"{city}-temps.csv"  # type: ignore[union-attr, arg-type]
        try:
            with path.open(encoding="utf-8", newline="") as file:
                columns.append({row["date"][:16]: float(row["temp"]) for row in tables.DictReader(file)})
        except (OSError, ValueError, KeyError) as error:
            raise BadData(f"vega-datasets' file {path} cannot be read ({error}); install vega-datasets again") from error
    if columns[0].keys() != columns[1].keys():
        raise BadData("vega-datasets' two temperature files are not of the same hours; install vega-datasets 0.9.0")
    values = np.array([list(column.values()) for column in columns]).T
    return Series(values, ("San Francisco", "Seattle"), seventy_ten_twenty(len(values)), Origin(
        "Temperatures of two cities, hourly", "vega-datasets, sf-temps.csv and seattle-temps.csv", "US government work",
        "climate normals by NOAA, so smoother than weather; the first 70 %, the next 10 %, the last 20 % of the hours"))


def csv(path: str | Path) -> Series:
    """Your own table: a row a step, a column a variate, dates in a first column if you like; 70, 10 and 20 %."""
    values, names = read_csv(Path(path).expanduser())
    return Series(values, names, seventy_ten_twenty(len(values)), Origin(
        f"Table {Path(path).name}", str(path), "yours", "the first 70 %, the next 10 %, the last 20 % of the rows"))


def seventy_ten_twenty(rows: int) -> dict[str, tuple[int, int]]:
    a, b = rows * 7 // 10, rows - rows * 2 // 10
    return {"train": (0, a), "val": (a, b), "test": (b, rows)}


def read_csv(path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Values (T, V) and names of a table of numbers with commas, with or without a line of names.

    A first column of dates (ISO 8601) is checked for gaps and left out; so is one without a name (a row's number).
    BadData says what is wrong, and where.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in tables.reader(file) if any(map(str.strip, row))]
    except FileNotFoundError:
        raise BadData(f"{path} does not exist; write csv:PATH, where PATH is a table with a row a step") from None
    except (OSError, UnicodeDecodeError, tables.Error) as error:
        raise BadData(f"cannot read {path} as a table ({error}); write csv:PATH, a text file with commas") from error
    if not rows:
        raise BadData(f"{path} is empty; expected a table with a row a step and a column a variate")
    named = not _is_number(rows[0][0]) and _date(rows[0][0]) is None
    names = rows.pop(0) if named else [f"column {i + 1}" for i in range(len(rows[0]))]
    first = 2 if named else 1  # number of the first row of data, as an editor counts without empty lines
    for number, row in enumerate(rows, first):
        if len(row) != len(names):
            raise BadData(f"{path}, row {number}: {len(row)} cells, expected {len(names)} as in the first row")
    columns = list(zip(*rows, strict=True))
    if rows and _date(rows[0][0]) is not None:
        _check_dates(path, columns[0], first)
    if rows and (_date(rows[0][0]) is not None or not names[0]):
        names, columns = names[1:], columns[1:]
    if not columns:
        raise BadData(f"{path} has no numbers; expected a table with a row a step and a column a variate")
    return np.stack([_numbers(path, n, c, first) for n, c in zip(names, columns, strict=True)], axis=1), tuple(names)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _date(cell: str) -> datetime | None:
    """A bare number (20240131) is a number."""
    try:
        return None if _is_number(cell) else datetime.fromisoformat(cell)
    except ValueError:
        return None


def _check_dates(path: Path, cells: tuple[str, ...], first: int) -> None:
    dates: list[datetime] = []
    for number, cell in enumerate(cells, first):
        date = _date(cell)
        if date is None:
            raise BadData(f"{path}, row {number}: {cell!r} is no date, others of its column are; write 2024-01-31 or "
                          "2024-01-31 13:00:00")
        dates.append(date)
    try:
        steps = [(b - a).total_seconds() for a, b in pairwise(dates)]
    except TypeError as error:  # some with a time zone
        raise BadData(f"{path}: the dates cannot be compared ({error})") from error
    usual = statistics.median(steps) if steps else 0.0
    for number, step in enumerate(steps, first + 1):
        if step <= 0 or step > GAP * usual:
            a, b = dates[number - first - 1], dates[number - first]
            what = "is not later" if step <= 0 else f"leaves a gap, the usual step being {usual:g} s"
            raise BadData(f"{path}, row {number}: {b} after {a} {what}; a row must be a step, so sort the rows and fill "
                          "the gaps, or leave out the dates if the rows count as evenly spaced")


def _numbers(path: Path, name: str, cells: tuple[str, ...], first: int) -> NDArray[np.float64]:
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        number, cell = next((i, c) for i, c in enumerate(cells, first) if not _is_number(c))
    if not cell:
        raise BadData(f"{path}, row {number}: {name!r} is empty; fill the gaps first")
    raise BadData(f"{path}, row {number}: {name!r} is {cell!r}, which is no number; text cannot be forecast, so leave the "
                  "column out. Only a first column may be dates, written as 2024-01-31 or 2024-01-31 13:00:00")
