import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_leaderboard import EVIL, make_arm, make_record, some_records

from effbench import cli, store
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.export import export, kind_of
from effbench.records import SCHEMA_VERSION, Flops
from effbench.samples import TYPES, write_samples

STEPS = pd.DataFrame(
    [
        dict(kind="step", arm="baseline", seed=0, phase="timing 16", index=0, seconds=0.25),
        dict(kind="item", arm="noop", seed=0, phase="quality", index=3, score="t2i_rank", group=1, value=7.0),
    ]
)


@pytest.fixture
def board(tmp_path):
    """Write records with two samples each; returns the leaderboard's folder."""

    def save(*records):
        for record in records:
            folder = tmp_path / "board" / "records" / record.id
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(record.model_dump_json())
            write_samples(STEPS, folder / "samples.parquet")
        return tmp_path / "board"

    return save


def effbench(*arguments, capsys):
    code = cli.main([*map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_notebook_reads_one_row_per_arm(board, tmp_path, capsys):
    out, file = board(*some_records()), tmp_path / "new" / "results.parquet"
    code, said, _ = effbench("export", "--out", out, "--to", file, capsys=capsys)
    expected = store.load(out)
    assert code == 0 and f"{len(expected)} arms of {len(some_records())} runs" in said
    frame = pd.read_parquet(file)
    assert list(frame) == list(expected)
    for column in expected:
        pd.testing.assert_series_equal(frame[column], expected[column], check_dtype=False, check_names=False)
    types = {column: str(kind) for column, kind in frame.dtypes.items()}
    assert types["created"] == "datetime64[us, UTC]" and types["arm"] == "str" == types["error"]
    assert types["test_flops"] == types["weight_bytes"] == types["train_peak_bytes"] == "Int64"
    assert types["test_speedup"] == types["t2i_r10_lossiness_low"] == types["latency"] == "float64"
    table = pq.read_table(file)
    assert {name: str(kind) for name, kind in zip(table.column_names, table.schema.types, strict=True)} == {
        name: kind_of(name).replace("[us, UTC]", "[us, tz=UTC]") for name in expected
    }
    assert table["test_flops"].to_pylist() == [int(each) for each in expected["test_flops"]]
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items() if key != b"pandas"}
    assert about["effbench.table"] == "arms" and about["effbench.schema"] == str(SCHEMA_VERSION)
    assert about["effbench.version"]


def test_every_column_of_load_has_a_type_of_its_own():
    """A new text or count in `load` is not exported as a number that it is not."""
    record = make_record()
    for arm in record.arms:
        for name, value in store.row(record, arm).items():
            kind = {str: "string", int: "int64", float: "double"}.get(type(value), kind_of(name))
            assert kind_of(name) == kind, name


def test_types_do_not_depend_on_what_was_measured(board, tmp_path):
    bare = make_arm(test_flops=None, memory=None, test_speedup=None, metrics={}, tokens=())
    files = []
    for place, record in enumerate((make_record("a"), make_record("b", arms=(bare,)))):
        record = record.model_copy(update=dict(arms=record.arms[-1:]))
        files.append(tmp_path / f"{place}.parquet")
        export(str(files[-1]), [(record, tmp_path)])
    full, empty = (pq.read_schema(file) for file in files)
    assert all(full.field(name).type == empty.field(name).type for name in empty.names)
    assert len(pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")) == 2


def test_counts_are_exact(tmp_path):
    huge = 2**63 - 1
    arms = (make_arm(test_flops=Flops(dense=huge)), make_arm("none", "none", test_flops=None))
    export(str(tmp_path / "a.parquet"), [(make_record(arms=arms), tmp_path)])
    assert pd.read_parquet(tmp_path / "a.parquet")["test_flops"].tolist()[-2:] == [huge, pd.NA]


def test_samples_of_all_runs(board, tmp_path, capsys):
    out = board(make_record("20250102-a"), make_record("20250103-b", 3))
    code, said, _ = effbench("export", "--samples", "--out", out, "--to", tmp_path / "s.parquet", capsys=capsys)
    assert code == 0 and "4 samples of 2 runs" in said
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert list(frame) == ["run", *TYPES] and frame["run"].tolist() == ["20250102-a"] * 2 + ["20250103-b"] * 2
    assert frame["seconds"].tolist()[::2] == [0.25, 0.25] and np.isnan(frame["seconds"][1])
    assert frame["group"].dtype == "Int64" and frame["group"].tolist() == [pd.NA, 1, pd.NA, 1]
    assert pq.read_schema(tmp_path / "s.parquet").metadata[b"effbench.table"] == b"samples"


def test_one_run_and_csv(board, tmp_path, capsys):
    out = board(make_record("20250102-a"), make_record("20250103-b", 3))
    code, _, _ = effbench("export", "20250103", "--out", out, "--to", tmp_path / "r.CSV", capsys=capsys)
    frame = pd.read_csv(tmp_path / "r.CSV", parse_dates=["created"])
    assert code == 0 and set(frame["run"]) == {"20250103-b"} and len(frame) == 4
    assert frame["test_speedup"].tolist()[1:] == [1.001, 1.02, 1.42] and frame["test_flops"].iloc[0] == 2_510_000_000


def test_csv_holds_no_formula(tmp_path):
    evil = [make_arm(f"{start}1+1", f"{start}cmd", metrics={}) for start in "=+-@"]
    rank = make_arm().metrics["t2i_r1"]
    evil.append(make_arm("=x", "a\nb,\"c'", error=EVIL, metrics={"=HYPERLINK(1)": rank}))
    file = tmp_path / "r.csv"
    export(str(file), [(make_record(arms=tuple(evil)), tmp_path)])
    frame = pd.read_csv(file)
    assert frame["arm"].tolist()[3:] == ["'=1+1", "'+1+1", "'-1+1", "'@1+1", "'=x"]
    assert frame["spec"].tolist()[-1] == "a\nb,\"c'" and frame["'=HYPERLINK(1)"].tolist()[-1] == 48.0
    assert frame["test_speedup"].tolist()[-1] == 1.42  # numbers are left alone, negative ones too


def test_a_url(board, capsys):
    out = board(make_record())
    code, said, _ = effbench("export", "--out", out, "--to", "memory://a/b/r.parquet", capsys=capsys)
    assert code == 0 and "memory://a/b/r.parquet: 4 arms of 1 run\n" in said
    assert len(pd.read_parquet("memory://a/b/r.parquet")) == 4
    code, _, said = effbench("export", "--out", out, "--to", "memory://a/b/r.parquet", capsys=capsys)
    assert code == 3 and "is there already" in said
    fsspec.filesystem("memory").rm("/a", recursive=True)


def test_a_file_that_is_there_is_replaced_only_with_force(board, tmp_path, capsys):
    out, file = board(make_record()), tmp_path / "r.parquet"
    file.write_text("mine")
    code, _, said = effbench("export", "--out", out, "--to", file, capsys=capsys)
    assert code == 3 and "--force" in said and file.read_text() == "mine"
    code, _, _ = effbench("export", "--out", out, "--to", file, "--force", capsys=capsys)
    assert code == 0 and len(pd.read_parquet(file)) == 4
    assert os.stat(file).st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "r.parquet"
    file.write_text("mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(EffbenchError, match="r.parquet was not written: No space left"):
        export(str(file), [(make_record(), tmp_path)], force=True)
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["r.parquet"]


def test_damaged_records_and_samples_are_named_and_left_out(board, tmp_path, capsys):
    out = board(*(make_record(name, day) for day, name in enumerate(("a1", "b1", "c1"), 1)))
    (out / "records/a1/record.json").write_text("{")
    (out / "records/b1/samples.parquet").write_bytes(b"PAR1 no")
    code, said, error = effbench("export", "--out", out, "--to", tmp_path / "r.parquet", capsys=capsys)
    assert code == 0 and "8 arms of 2 runs" in said and "left out: " in error and "a1" in error
    code, said, error = effbench("export", "--samples", "--out", out, "--to", tmp_path / "s.parquet", capsys=capsys)
    assert code == 0 and "2 samples of 1 run" in said and "b1" in error
    (out / "records/c1/samples.parquet").unlink()
    code, _, error = effbench("export", "--samples", "--out", out, "--to", tmp_path / "t.parquet", capsys=capsys)
    assert code == 2 and "nothing to export" in error and not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 3, "neither --to nor --log"),
        (("--samples", "--log", "mlflow"), 3, "--samples is of --to"),
        (("--to", "r.xlsx"), 3, "end it in .parquet or .csv"),
        (("--to", "folder.csv"), 3, "is a folder"),
        (("--to", "nosuch://r.csv"), 3, "nosuch"),
        (("nothing", "--to", "r.csv"), 3, "there is no run 'nothing'"),
        (("--to", "r.csv", "--out", "empty"), 2, "there is no run in empty"),
        (("--to", "file.txt/r.csv"), 1, "was not written: "),
    ],
)
def test_what_cannot_be_exported_is_said(board, tmp_path, capsys, monkeypatch, arguments, code, said):
    board(make_record())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file.txt").write_text("")
    out = () if "--out" in arguments else ("--out", "board")
    found, _, error = effbench("export", *arguments, *out, capsys=capsys)
    assert (found, said in error) == (code, True), error


def test_a_name_that_means_two_things_costs_no_record(tmp_path):
    value = make_arm().metrics["t2i_r1"]
    odd = make_arm(metrics={"x": value, "x_note": value, "arm": value})
    rows, _ = export(str(tmp_path / "r.parquet"), [(make_record(arms=(odd,)), tmp_path)])
    frame = pd.read_parquet(tmp_path / "r.parquet")
    assert rows == 4 and frame["x"].tolist()[-1] == 48.0 and frame["arm"].tolist()[-1] == "token_prune"


def test_errors_are_errors_in_python_too(tmp_path):
    with pytest.raises(InvalidError, match="nothing to export"):
        export(str(tmp_path / "r.csv"), [])
    with pytest.raises(UsageError):
        export("r.json", [])


def test_torch_is_not_imported(board, tmp_path):
    out = board(make_record())
    run = "import sys; from effbench import cli; sys.exit(cli.main(sys.argv[1:]) or 'torch' in sys.modules)"
    asked = ["export", "--out", str(out), "--to", str(tmp_path / "r.parquet")]
    done = subprocess.run([sys.executable, "-c", run, *asked], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(pq.read_schema(tmp_path / "r.parquet").metadata[b"pandas"])["index_columns"] == []
