"""Human-rated review snippets for the demo, cut from a package that PyPI carries.

    python demo/reviews.py --sdist vaderSentiment-3.3.2.tar.gz --out data/reviews

The source distribution of vaderSentiment 3.3.2 (MIT license) holds the data of Hutto & Gilbert,
"VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (ICWSM 2014):
short English texts of four domains, each rated from -4 to 4 by about 20 people.

    sdist ──► rows ──► rating far from 0 ──► one of each text ──► groups ──► train, dev, test
    sha256    4 files   |rating| >= 1         conflicts go         whole      equal labels

What is done, in this order, and nothing else:

1. Texts are taken as they are (also where their encoding was once garbled), but for HTML entities
   (`&amp;`, some encoded twice), which are decoded, and white space at the ends, which goes.
2. Near-neutral rows, whose mean rating is between -1 and 1, go. The rest are "negative" or
   "positive".
3. Of texts that differ only in case, spacing and punctuation, over all domains, the first stays;
   where their labels differ none stays. (The tweets hold such variants on purpose.)
4. Per domain, the sentences of one Amazon review or one New York Times article are one group; other
   rows are groups by themselves. Groups are shuffled with a fixed seed. Train takes whole groups
   until it has its number of rows of either label, then dev, then test; rows over the number go.
   Both labels are equally frequent in every split. A domain too small for the full numbers has
   them scaled down.
5. Rows are written domain by domain, the labels taking turns: the first rows of a domain, however
   many are read, are a balanced random sample.

Warning: the movie snippets are sentences from Rotten Tomatoes, as are those of the data sets SST-2
and Rotten Tomatoes. They share sentences: never train or tune on one of them and report another.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import random
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
LABELS = ("negative", "positive")
SPLITS = {"train": 1024, "dev": 300, "test": 1000}  # rows of one domain, at most
NEUTRAL_BELOW = 1.0
SEED = 0

WARNING = (
    "The movie snippets share sentences with SST-2 and Rotten Tomatoes: "
    "never train or tune on one of them and report another."
)
ABOUT = {
    "source": "vaderSentiment 3.3.2, source distribution on PyPI",
    "license": "MIT (of the package; its texts come from Rotten Tomatoes, Twitter, Amazon, NYT)",
    "citation": "Hutto, C.J. & Gilbert, E. (2014). VADER: A Parsimonious Rule-based Model for "
    "Sentiment Analysis of Social Media Text. ICWSM-14.",
    "warning": WARNING,
    "method": "near-neutral rows dropped; duplicates and conflicts removed over all domains; "
    "seeded shuffle per domain, a whole review or article to one split; labels equally frequent; "
    "SOURCE.md has the details",
}


class DemoDataError(Exception):
    """The source distribution or the folder cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One rated text; `id` is the domain and the source's own id."""

    id: str
    text: str
    label: str
    rating: float
    domain: str

    @property
    def group(self) -> str:
        """What may not cross splits: `amazon-17` for the sentence `amazon-17_3`."""
        return self.id.partition("_")[0]


def read_sources(sdist: Path, sha256: str = SDIST_SHA256) -> dict[str, bytes]:
    """Read the rating files, by domain, in memory: nothing is extracted to disk."""
    raw = sdist.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise DemoDataError(
            f"{sdist}: sha256 is {found}, expected {sha256}; "
            "delete the file and download vaderSentiment 3.3.2 again"
        )
    inner = _read_member(raw, INNER_ARCHIVE)
    return {domain: _read_member(inner, name) for domain, name in DOMAINS.items()}


def _read_member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        file = opened.extractfile(name)
        assert file is not None, f"{name} is not a file"  # the sha256 has vouched for it
        return file.read()


def parse(domain: str, raw: bytes) -> list[Row]:
    """Read one rating file: id, mean rating and text, separated by tabs, one row a line."""
    rows = []
    for line in filter(None, raw.decode("utf-8").split("\r\n")):
        id_, rating, text = line.split("\t")
        rows.append(
            Row(
                id=f"{domain}-{id_}",
                text=html.unescape(html.unescape(text)).strip(),
                label="positive" if float(rating) > 0 else "negative",
                rating=float(rating),
                domain=domain,
            )
        )
    return rows


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """Keep the first of texts with equal words, and none where their labels differ."""
    by_words: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        words = re.findall(r"\w+", row.text.casefold()) or row.text.split()  # ":-)" has no word
        by_words[tuple(words)].append(row)
    return [same[0] for same in by_words.values() if len({row.label for row in same}) == 1]


def split(rows: Sequence[Row], seed: int = SEED) -> dict[str, list[Row]]:
    """Split the rows of one domain, whole groups at a time, with equally many of each label."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    shuffle = random.Random(seed).shuffle
    names = list(groups)
    shuffle(names)

    frequency = Counter(row.label for row in rows)
    scarcest = min(frequency[label] for label in LABELS)
    full = {name: size // len(LABELS) for name, size in SPLITS.items()}
    share = min(1.0, scarcest / sum(full.values()))

    waiting = iter(names)
    splits = {}
    for name, size in full.items():
        quota = int(size * share)  # rows of one label
        taken: dict[str, list[Row]] = {label: [] for label in LABELS}
        while min(map(len, taken.values())) < quota and (group := next(waiting, None)):
            for row in groups[group]:
                taken[row.label].append(row)
        for same_label in taken.values():
            shuffle(same_label)
        count = min(quota, *map(len, taken.values()))
        turns = zip(*(same_label[:count] for same_label in taken.values()), strict=True)
        splits[name] = list(chain.from_iterable(turns))
    return splits


def build(sources: Mapping[str, bytes]) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Make the three splits, and the counts of every step, by domain."""
    read = {domain: parse(domain, raw) for domain, raw in sources.items()}
    clear = {
        domain: [row for row in rows if abs(row.rating) >= NEUTRAL_BELOW]
        for domain, rows in read.items()
    }
    unique = deduplicate(chain.from_iterable(clear.values()))

    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    counts: dict[str, Any] = {}
    for domain in sources:
        kept = [row for row in unique if row.domain == domain]
        counts[domain] = {
            "read": len(read[domain]),
            "clear": len(clear[domain]),
            "unique": len(kept),
        }
        for name, rows in split(kept).items():
            splits[name] += rows
            frequency = Counter(row.label for row in rows)
            counts[domain][name] = {label: frequency[label] for label in LABELS}
    return splits, counts


def table(counts: Mapping[str, Any]) -> str:
    """Show the counts as a Markdown table; split sizes are negative + positive."""
    columns = ["read", "clear", "unique", *SPLITS]
    lines = [f"| domain | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for domain, count in counts.items():
        sizes = [count[name] for name in columns]
        cells = [
            " + ".join(str(n) for n in size.values()) if isinstance(size, dict) else str(size)
            for size in sizes
        ]
        lines.append(f"| {domain} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(out: Path, sources: Mapping[str, bytes], sha256: str = SDIST_SHA256) -> str:
    """Write the splits, SOURCE.md and, last, manifest.json into `out`; return the table."""
    splits, counts = build(sources)
    files = {
        f"{name}.jsonl": "".join(
            json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows
        ).encode()
        for name, rows in splits.items()
    }
    shown = table(counts)
    files["SOURCE.md"] = f"# Demo data\n\n{__doc__}\n{shown}\n".encode()
    digests = {
        **{SDIST: sha256},
        **{DOMAINS[domain]: hashlib.sha256(raw).hexdigest() for domain, raw in sources.items()},
        **{name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    manifest = {**ABOUT, "seed": SEED, "neutral_below": NEUTRAL_BELOW}
    manifest |= {"counts": counts, "sha256": digests}
    files["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()

    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    return shown


def main(arguments: Sequence[str] | None = None, sha256: str = SDIST_SHA256) -> int:
    """Run from the command line; 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(description="Make the demo's data from vaderSentiment 3.3.2.")
    parser.add_argument("--sdist", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, data/reviews")
    options = parser.parse_args(arguments)
    try:
        print(write(options.out, read_sources(options.sdist, sha256), sha256))
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
