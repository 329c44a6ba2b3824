"""scale/prompts.py: each kind of source, and what is wrong with a file is said with its place."""

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


PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(rows=st.lists(st.tuples(PRINTABLE, st.dictionaries(st.sampled_from("abc"), st.integers())), min_size=1))
def test_jsonl(rows, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text, **metadata}) for text, metadata in rows))
    assert read(str(file)) == [Prompt(text, metadata) for text, metadata in rows]


def test_names_and_a_prompt_itself():
    assert read("a fox. In the snow") == [Prompt("a fox. In the snow")]
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
