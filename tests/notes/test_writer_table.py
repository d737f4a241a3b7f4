"""Tables as Parquet and CSV."""

import csv
import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clinical_nlp.errors import UsageError
from clinical_nlp.notes.writers.table import write_table

TABLE = pa.table(
    {
        "text": ["=1+1", "+x", "-x", "@x", "\tx", "plain", "a,b\nc", None],
        "count": [1, -2, 3, 4, 5, 6, 7, 8],
        "spans": [[{"start": 1}], [], [], [], [], [], [], []],
    }
)


def test_csv_cells_that_look_like_formulas_are_defused(tmp_path):
    write_table(tmp_path / "t.csv", TABLE)
    with open(tmp_path / "t.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["text"] for row in rows] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "plain", "a,b\nc", ""]
    assert rows[1]["count"] == "-2"
    assert rows[0]["spans"] == '[{"start": 1}]'


def test_parquet_is_unchanged_and_its_digest_is_returned(tmp_path):
    digest = write_table(tmp_path / "t.parquet", TABLE)
    assert pq.read_table(tmp_path / "t.parquet").equals(TABLE)
    assert digest == hashlib.sha256((tmp_path / "t.parquet").read_bytes()).hexdigest()
    assert digest == write_table(tmp_path / "again.parquet", TABLE)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(UsageError):
        write_table(tmp_path / "t.xlsx", TABLE)
