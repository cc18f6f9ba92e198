"""The catalogue: its names are models everywhere, sites and users add theirs, mistakes in it are named."""

from __future__ import annotations

import json
from pathlib import Path

from tests.process import check_error, penstock


def test_names_of_site_and_user(tiny_llama: Path, tmp_path: Path) -> None:
    site, user = tmp_path / "site.toml", tmp_path / "config" / "penstock" / "models.toml"
    site.write_text(f'[house-model]\nmodel = "{tiny_llama}"\nfamily = "llama"\n["gpt2"]\nmodel = "our/copy"\n')
    user.parent.mkdir(parents=True)
    user.write_text(f'["my.model"]\nmodel = "{tiny_llama}"\nlicense = "mine"\nparameters = 13.0\n')
    extra = {"home": tmp_path, "PENSTOCK_CATALOGUE": str(site)}
    done = penstock("models", "--json", **extra)
    assert done.returncode == 0, done.stderr.decode()
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["gpt2"]["model"] == "our/copy"  # the site's word over ours
    assert rows["my.model"]["license"] == "mine"
    assert rows["my.model"]["weight_bytes"]["bfloat16"] == 26_000_000_000
    assert rows["my.model"]["recommended"] == "1 GPU of 40 GB, or 32 GB of memory"
    assert rows["llama-2-70b-chat"]["recommended"].startswith("2 A100")
    shown = penstock("models", "bloomz", home=tmp_path)
    assert b"bigscience/bloomz" in shown.stdout
    assert b"llama" not in shown.stdout
    (tmp_path / "p.txt").write_text("the quick\n")
    for name in ("HOUSE-Model", "my.model"):
        ask = ("generate", name, "-i", tmp_path / "p.txt", "-o", "-", "--max-new-tokens", "3")
        done = penstock(*ask, **extra)
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout)["generated_tokens"] == 3


def test_a_hub_name_that_is_not_here(tmp_path: Path) -> None:
    done = penstock("chat", "opt-125m", "hi", home=tmp_path, HF_HUB_OFFLINE="1")
    check_error(done, 3, "facebook/opt-125m")
    done = penstock("chat", "opt-125", "hi", home=tmp_path, HF_HUB_OFFLINE="1")
    check_error(done, 4, "Did you mean opt-125m")


def test_mistakes_name_the_file_and_the_entry(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    for text, words in (
        ("[a\n", ("not TOML",)),
        ("[a]\nmodle = 'x/y'\n", ("'a'", "modle")),
        ("[a]\nmodel = 'relative'\n", ("'a'",)),
        ("['a/b']\nmodel = 'x/y'\n", ("a/b",)),
        ("[demo]\nmodel = 'x/y'\n", ("demo",)),
        ("[a]\nmodel = 'x/y'\nparameters = 'many'\n", ("'a'", "parameters")),
    ):
        file.write_text(text)
        done = penstock("models", home=tmp_path, PENSTOCK_CATALOGUE=str(file))
        check_error(done, 2, str(file), *words)
    done = penstock("models", home=tmp_path, PENSTOCK_CATALOGUE=str(tmp_path / "none.toml"))
    check_error(done, 3, "none.toml")
