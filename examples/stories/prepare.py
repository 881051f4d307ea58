"""Makes the story model's texts: `python examples/stories/prepare.py CORPORA OUT`.

CORPORA holds tinystories (machine-made stories of Eldan and Li, CDLA-Sharing-1.0) and stories (those, and books in the
public domain, with an index). Held out: the 220 stories from TinyStories' own validation split, which end
stories/tinystories.txt. Books whose authors are not certain, or protected somewhere (life + 70 years), are left out,
and so are chapters with many words to a sentence.
"""

import csv
import sys
from pathlib import Path

END = "\n<|endoftext|>\n"
HELD_OUT = 220
# Authors who died after 1955, house names, and anthologies of many hands.
DOUBTFUL = ("Laura Lee Hope", "Howard R. Garis", "Thornton W. Burgess", "Richard Barnum", "Sara Cone Bryant", "Various")
SIMPLE = 16.5  # words to a sentence, on average
VIOLENT = 1  # words of a list that the index brings


def main(corpora: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stories = split(corpora / "stories/tinystories.txt")
    more = split(corpora / "tinystories/toyrnn_tinystories_sample_2MiB.txt")[:-1]  # the last one is cut off
    write(out / "tiny.txt", stories[:-HELD_OUT] + more)
    write(out / "valid.txt", stories[-HELD_OUT:])
    write(out / "books.txt", list(books(corpora / "stories")))


def split(path: Path) -> list[str]:
    stories = [story.strip() for story in path.read_text().split("<|endoftext|>")]
    return [story for story in stories if story]


def books(folder: Path):
    """Chapters that are simple and whose rights are clear."""
    texts = (folder / "public_domain.txt").read_bytes()
    with open(folder / "public_domain.index.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if any(name in row["book"] for name in DOUBTFUL) or int(row["violence_words"]) > VIOLENT:
                continue
            if float(row["words_per_sentence"]) <= SIMPLE:
                begin = int(row["byte_offset"])
                yield texts[begin : begin + int(row["bytes"])].decode().strip()


def write(path: Path, stories: list[str]) -> None:
    path.write_text(END.join(stories) + END)
    print(f"{path}: {len(stories):,} stories, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
