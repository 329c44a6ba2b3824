"""scale/prompts.py: each kind of source, and what is wrong with a file is said with its place."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale.prompts import NAMES, Prompt, read
from scale.shapes import DOUBTFUL, parse


def test_text(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa fox\n\n  a hare \nein Bär\n", encoding="utf-8")
    assert read(str(tmp_path / "p.txt")) == [Prompt("a fox"), Prompt("a hare"), Prompt("ein Bär")]


def test_csv(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,count\n"a fox, running",2\na hare,\n')
    assert read(str(tmp_path / "p.csv")) == [Prompt("a fox, running", {"count": "2"}), Prompt("a hare", {"count": ""})]


TEXT = st.text(
    st.one_of(
        st.sampled_from("\n\r\x0b\x0c\x1c\x1e\x85\u2028\u2029\",' a"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"),
    ),
    min_size=1,
).filter(str.strip)
"""With all that some function or other takes for the end of a line; the mark of a file's encoding is none of it."""
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@given(
    rows=st.lists(st.tuples(TEXT, st.dictionaries(st.sampled_from("abc"), st.integers() | TEXT)), min_size=1),
    end=st.sampled_from(["\n", "\r\n"]), ascii_alone=st.booleans(), encoding=ENCODINGS,
)  # fmt: skip
def test_what_json_wrote_is_read(rows, end, ascii_alone, encoding, folder):
    lines = (json.dumps({"prompt": text, **metadata}, ensure_ascii=ascii_alone) for text, metadata in rows)
    (folder / "p.jsonl").write_text("".join(line + end for line in lines), encoding, newline="")
    assert read(str(folder / "p.jsonl")) == [Prompt(text, metadata) for text, metadata in rows]


@given(rows=st.lists(st.tuples(TEXT, TEXT | st.just("")), min_size=1), encoding=ENCODINGS)
def test_what_a_csv_writer_wrote_is_read(rows, encoding, folder):
    """A line break in a cell stays where it is."""
    with (folder / "p.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([("note", "prompt"), *((note, text) for text, note in rows)])
    assert read(str(folder / "p.csv")) == [Prompt(text, {"note": note}) for text, note in rows]


@given(
    lines=st.lists(TEXT.filter(lambda text: not set(text) & set("\n\r")).map(str.strip), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]), encoding=ENCODINGS,
)  # fmt: skip
def test_lines_are_read_as_they_were_written(lines, end, encoding, folder):
    (folder / "p.txt").write_text(end.join(lines), encoding, newline="")
    assert read(str(folder / "p.txt")) == [Prompt(line) for line in lines]


def test_names_and_a_prompt_itself():
    assert read("a fox. In the snow") == [Prompt("a fox. In the snow")]
    long = 99 * "a red fox, " + "in the snow"  # longer than a file's name may be
    assert read(long) == [Prompt(long)] and read(long[:-12] + ". Snow") == [Prompt(long[:-12] + ". Snow")]
    assert {"a cat", "an owl"} <= {p.text for p in read("animals")}
    for name, doubtful in (("shapes", False), ("shapes-doubtful", True), ("shapes-doubtful-more", True)):
        pairs = {(item.shape, item.colour) for p in read(name) for item in parse(p.text).objects}
        assert pairs <= DOUBTFUL if doubtful else not pairs & DOUBTFUL
    assert not {p.text for p in read("shapes-doubtful")} & {p.text for p in read("shapes-doubtful-more")}
    assert all(len({p.text for p in make()}) == len(make()) for make in NAMES.values())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", None, "there is no file"),
        ("p.txt", b"\n\n", "has none"),
        ("p.txt", b"\xff\xfe\xff", "is not UTF-8"),
        ("p.csv", b"text,n\na fox,1\n", "row 2 has no text under `prompt`"),
        ("p.csv", b"prompt,n\na fox, running,1\n", "row 2 has more cells than the first row: .* stands in quotes"),
        ("p.csv", b'prompt\n"a fox\na hare\n', "is not CSV: unexpected end of data"),
        ("p.jsonl", b'{"prompt": "a fox"}\n{"text": 1}\n', "line 2 has no text under `prompt`"),
        ("p.jsonl", b'{"prompt": "a fox"}\n{', "line 2 is not JSON"),
        ("p.jsonl", b"[1]", "line 1 has no text"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path / name))
    with pytest.raises(ValueError, match="it is empty"):
        read(" ")
