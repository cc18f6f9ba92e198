"""The shelves of files and batches: who may take one, what is left behind, what goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.server.openai.batch_wire import Batch
from penstock.server.openai.store import Shelf, forget_strangers, owner_of
from penstock.server.refusal import Refusal


def stored(shelf: Shelf, content: bytes) -> str:
    file = shelf.new_file("name", "batch")
    shelf.path(file.id).write_bytes(content)
    shelf.keep(file)
    return file.id


def test_one_server_at_a_time(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "m" / owner_of(b"a"), 100)
    with pytest.raises(Refusal, match="another server"):
        Shelf(shelf.folder, 100)
    Shelf(tmp_path / "m" / owner_of(b"b"), 100).close()
    shelf.close()
    Shelf(shelf.folder, 100).close()


def test_folders_of_keys_that_are_gone(tmp_path: Path) -> None:
    """Old ones go, unless a server has them or their key is known."""
    shelves = {name: Shelf(tmp_path / owner_of(name), 100) for name in (b"held", b"old", b"known", b"fresh")}
    for name, shelf in shelves.items():
        if name != b"held":
            shelf.close()
        if name != b"fresh":
            os.utime(shelf.folder / ".lock", (1, 1))
    (tmp_path / "something else").mkdir()
    forget_strangers(tmp_path, {owner_of(b"known")})
    left = {name for name, shelf in shelves.items() if shelf.folder.exists()}
    assert left == {b"held", b"known", b"fresh"}
    assert (tmp_path / "something else").exists()
    forget_strangers(tmp_path / "nowhere", set())


def test_what_a_killed_server_left_half_done(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / owner_of(b""), 100)
    whole = stored(shelf, b"12345")
    output = "file-" + "a" * 24  # moved, but not yet described
    batch = Batch(
        id="batch_" + "b" * 24, endpoint="/v1/embeddings", input_file_id=whole, completion_window="24h", created_at=1,
        status="finalizing", output_file_id=output,
    )  # fmt: skip
    shelf.save(batch)
    shelf.path(output).write_bytes(b"answers")
    (shelf.files / ("file-" + "c" * 24)).write_bytes(b"upload that never ended")
    (shelf.files / (whole + ".json.part")).write_bytes(b"{")
    shelf.close()
    again = Shelf(shelf.folder, 100)
    names = {path.name for path in again.files.iterdir()}
    assert names == {whole, f"{whole}.json", output}
    for _ in range(2):  # done twice, it is the same
        again.adopt(again.desk(batch) / "output.jsonl", output, "name", None)
    assert again.file(output).bytes == 7
    assert {file.id for file in again.all_files()} == {whole, output}
    for bad in ("file-../x", "", "batch_" + "b" * 24, "file-" + "A" * 24):
        with pytest.raises(Refusal):
            again.file(bad)
