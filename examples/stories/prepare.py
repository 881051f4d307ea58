"""Writes the texts of the story model: `python examples/stories/prepare.py CORPORA OUT`.

CORPORA holds two folders: tinystories (generated stories by Eldan and Li, CDLA-Sharing-1.0), and stories (more of them,
and books in the public domain with an index).

    OUT/tiny.txt    the training data
    OUT/valid.txt   held out: the last 220 stories of stories/tinystories.txt, from TinyStories' own validation split
    OUT/books.txt   chapters of books, which benchmarks/stories.py tries; the story model is not trained on them

Books are left out if their authors are uncertain or protected somewhere (life + 70 years). Chapters with long sentences
are left out too.
"""

import csv
import sys
from pathlib import Path

END = "\n<|endoftext|>\n"
HELD_OUT = 220
# Authors who died after 1955, house names, anthologies.
EXCLUDED = ("Laura Lee Hope", "Howard R. Garis", "Thornton W. Burgess", "Richard Barnum", "Sara Cone Bryant", "Various")
MAX_WORDS_PER_SENTENCE = 16.5  # mean of a chapter
MAX_VIOLENCE_WORDS = 1  # as the index counts them


def main(corpora: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stories = split(corpora / "stories/tinystories.txt")
    more = split(corpora / "tinystories/toyrnn_tinystories_sample_2MiB.txt")[:-1]  # the last one is truncated
    write(out / "tiny.txt", stories[:-HELD_OUT] + more)
    write(out / "valid.txt", stories[-HELD_OUT:])
    write(out / "books.txt", list(books(corpora / "stories")))


def split(path: Path) -> list[str]:
    stories = [story.strip() for story in path.read_text().split("<|endoftext|>")]
    return [story for story in stories if story]


def books(folder: Path):
    """Chapters with short sentences from books whose rights are clear."""
    texts = (folder / "public_domain.txt").read_bytes()
    with open(folder / "public_domain.index.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if any(name in row["book"] for name in EXCLUDED) or int(row["violence_words"]) > MAX_VIOLENCE_WORDS:
                continue
            if float(row["words_per_sentence"]) <= MAX_WORDS_PER_SENTENCE:
                begin = int(row["byte_offset"])
                yield texts[begin : begin + int(row["bytes"])].decode().strip()


def write(path: Path, stories: list[str]) -> None:
    path.write_text(END.join(stories) + END)
    print(f"{path}: {len(stories):,} stories, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
