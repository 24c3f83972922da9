"""The demo's data script, on a miniature of the source distribution that it reads."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "demo" / "reviews.py"


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("demo_reviews", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reviews = _load_script()


def tar_gz(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def line(id_: str, rating: float, text: str) -> str:
    return f"{id_}\t{rating}\t{text}\r\n"


def singles(word: str, positive: int, negative: int) -> str:
    """Rows that stand alone, with texts of their own."""
    good = [line(str(n), 2.5, f"{word} good {n}.") for n in range(positive)]
    bad = [line(str(positive + n), -1.5, f"{word} bad {n}.") for n in range(negative)]
    return "".join(good + bad)


def grouped(word: str, groups: int) -> str:
    """Reviews of one to five sentences, of both labels."""
    return "".join(
        line(f"{group}_{n}", (-1) ** (group + n) * 2.0, f"{word} {group} sentence {n}.")
        for group in range(groups)
        for n in range(1 + group % 5)
    )


ODD_MOVIES = (
    line("900", 3.0, "Twice   SEEN, twice kept?")
    + line("901", 3.0, "twice seen - twice kept")
    + line("902", 3.0, "Loved or hated")
    + line("903", -3.0, "loved or HATED!")
    + line("904", 0.99, "Neither here nor there.")
    + line("905", -0.99, "Nor here.")
    + line("906", 1.0, "  Salt &amp; pepper &amp;amp; caf\u00c3\u00a9 ")
    + line("907", 2.0, ":-)")
    + line("908", -2.0, ":-(")
)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {
        "movies": ODD_MOVIES + singles("film", 30, 20),
        "tweets": singles("tweet", 40, 90) + line("999", 2.5, "Film GOOD 1"),
        "amazon": grouped("phone", 60),
        "nyt": grouped("editorial", 45),
    }


@pytest.fixture
def sdist(tmp_path: Path, texts: dict[str, str]) -> Path:
    inner = tar_gz({reviews.DOMAINS[domain]: text.encode() for domain, text in texts.items()})
    path = tmp_path / "small.tar.gz"
    path.write_bytes(tar_gz({reviews.INNER_ARCHIVE: inner}))
    return path


@pytest.fixture
def out(tmp_path: Path, sdist: Path) -> Path:
    folder = tmp_path / "reviews"
    run(sdist, folder)
    return folder


def run(sdist: Path, folder: Path) -> None:
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    assert reviews.main(["--sdist", str(sdist), "--out", str(folder)], sha256=digest) == 0


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            json.loads(row)
            for row in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            if row
        ]
        for name in ("train", "dev", "test")
    }


def every_row(texts: Mapping[str, str]) -> list[Any]:
    """All rows that may enter a split, before splitting."""
    parsed = [row for domain, text in texts.items() for row in reviews.parse(domain, text.encode())]
    return reviews.deduplicate(row for row in parsed if abs(row.rating) >= reviews.NEUTRAL_BELOW)


def test_rows_have_the_documented_fields(out: Path) -> None:
    for rows in rows_of(out).values():
        for row in rows:
            assert list(row) == ["id", "text", "label", "rating", "domain"]
            assert row["label"] == ("positive" if row["rating"] > 0 else "negative")
            assert row["id"].startswith(row["domain"] + "-")


def test_labels_are_balanced_in_every_split_and_every_even_prefix(out: Path) -> None:
    for name, rows in rows_of(out).items():
        for domain in reviews.DOMAINS:
            labels = [row["label"] for row in rows if row["domain"] == domain]
            assert labels, f"{name} has no {domain}"
            assert labels == ["negative", "positive"] * (len(labels) // 2)


def test_small_domains_keep_the_proportions_of_the_full_splits(out: Path) -> None:
    sizes = {name: Counter(row["domain"] for row in rows) for name, rows in rows_of(out).items()}
    # 40 positive tweets limit each label to 40 of the 1162 that the full splits ask for
    assert {name: sizes[name]["tweets"] for name in sizes} == {
        "train": 2 * int(512 * 40 / 1162),
        "dev": 2 * int(150 * 40 / 1162),
        "test": 2 * int(500 * 40 / 1162),
    }


def test_large_domains_stop_at_the_full_splits() -> None:
    rows = reviews.parse("movies", singles("film", 1500, 1400).encode())
    sizes = {name: len(part) for name, part in reviews.split(rows).items()}
    assert sizes == {"train": 1024, "dev": 300, "test": 1000}


def test_large_groups_do_not_push_a_split_over_its_size() -> None:
    pairs = "".join(
        line(f"{group}_{n}", (-1) ** n * 2.0, f"phone {group} sentence {n}.")
        for group in range(300)
        for n in range(10)
    )
    sizes = {
        name: len(part)
        for name, part in reviews.split(reviews.parse("amazon", pairs.encode())).items()
    }
    assert sizes == {"train": 1024, "dev": 300, "test": 1000}


def test_no_row_and_no_group_crosses_splits(out: Path) -> None:
    seen: dict[str, str] = {}
    for name, rows in rows_of(out).items():
        for row in rows:
            group = row["id"].partition("_")[0]
            assert seen.setdefault(group, name) == name
    ids = [row["id"] for rows in rows_of(out).values() for row in rows]
    assert len(ids) == len(set(ids))
    assert any("_" in id_ for id_ in ids), "no grouped row was tested"


def test_the_first_of_equal_texts_stays_and_conflicts_go(texts: dict[str, str]) -> None:
    ids = {row.id for row in every_row(texts)}
    assert "movies-900" in ids
    assert "movies-901" not in ids
    assert not ids & {"movies-902", "movies-903"}
    assert {"movies-907", "movies-908"} <= ids  # nothing but punctuation: compared as it is
    assert "tweets-999" not in ids, "a duplicate from another domain stayed"


def test_near_neutral_rows_go(texts: dict[str, str], out: Path) -> None:
    ids = {row.id for row in every_row(texts)}
    assert not ids & {"movies-904", "movies-905"}
    assert "movies-906" in ids
    assert all(abs(row["rating"]) >= 1.0 for rows in rows_of(out).values() for row in rows)


def test_entities_are_decoded_and_garbled_letters_are_left(texts: dict[str, str]) -> None:
    by_id = {row.id: row.text for row in every_row(texts)}
    assert by_id["movies-906"] == "Salt & pepper & caf\u00c3\u00a9"


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, sdist: Path, out: Path) -> None:
    run(sdist, tmp_path / "again")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["SOURCE.md", "dev.jsonl", "manifest.json", "test.jsonl", "train.jsonl"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_another_seed_gives_another_split() -> None:
    rows = reviews.parse("movies", singles("film", 60, 60).encode())
    assert reviews.split(rows, seed=0) == reviews.split(rows, seed=0)
    assert reviews.split(rows, seed=0) != reviews.split(rows, seed=1)


def test_the_manifest_tells_source_license_counts_and_digests(out: Path, sdist: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["license"].startswith("MIT")
    assert "Hutto" in manifest["citation"]
    assert "SST-2" in manifest["warning"]
    assert "SST-2" in (out / "SOURCE.md").read_text(encoding="utf-8")
    for name, rows in rows_of(out).items():
        counted = Counter((row["domain"], row["label"]) for row in rows)
        for domain, count in manifest["counts"].items():
            assert count[name] == {label: counted[domain, label] for label in reviews.LABELS}
        content = (out / f"{name}.jsonl").read_bytes()
        assert manifest["sha256"][f"{name}.jsonl"] == hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    assert manifest["sha256"][reviews.SDIST] == digest


def test_another_file_is_refused_in_one_line(
    tmp_path: Path, sdist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "reviews"
    assert reviews.main(["--sdist", str(sdist), "--out", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {sdist}: sha256 is ")
    assert f"expected {reviews.SDIST_SHA256}" in message
    assert message.count("\n") == 1
    assert not folder.exists()


def test_a_missing_file_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.tar.gz"
    assert reviews.main(["--sdist", str(missing), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {missing}: No such file or directory\n"


def test_the_download_is_pinned_to_the_digest_that_the_script_expects() -> None:
    pinned = (SCRIPT.parent / "requirements-data.txt").read_text(encoding="utf-8")
    assert f"vaderSentiment==3.3.2 --hash=sha256:{reviews.SDIST_SHA256}" in pinned
