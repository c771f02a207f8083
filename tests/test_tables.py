"""Tables and lists as spreadsheets, other systems and other people write them."""

import json
import random
import unicodedata

import pytest

from forgery_eval.benchmarks import open_benchmark
from llava.errors import DataError, OptionError, UserError
from llava.images import list_images
from llava.tables import NameFinder, parse_label_map, read_label, read_rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("image", "label"), [("path", "class"), ("File Name", "is_fake"), ("IMG", "Target")])
def test_tables_as_spreadsheets_write_them(tmp_path, delimiter, encoding, end, image, label):
    lines = [
        delimiter.join(row) for row in ((image, "camera", label), ('"a.png"', "old", "1.0"), ("b.png", "new", "0"))
    ]
    (tmp_path / "t.csv").write_bytes((end.join(lines) + end).encode(encoding))
    samples = open_benchmark(tmp_path / "t.csv")
    assert [(s.id, s.label, dict(s.groups)) for s in samples] == [
        ("a.png", 1, {"camera": "old"}),
        ("b.png", 0, {"camera": "new"}),
    ]


@pytest.mark.parametrize(
    ("word", "column", "label"),
    [
        *(
            (word, "label", 1)
            for word in ("AI", "ai-generated", "synthetic", "Generated", "tampered", "manipulated", 1.0)
        ),
        *((word, "class", 0) for word in ("authentic", "natural", "pristine", "REAL ", "0.0")),
        *(("True", "is_fake", 1), (False, "is_fake", 0), ("true", "is_real", 0), ("1", "real", 0), (0, "is_real", 1)),
        ("yes", "AI generated", 1),
    ],
)
def test_label_words_of_the_field(word, column, label):
    assert read_label(word, column, {}, "here") == label


@pytest.mark.parametrize(
    ("word", "column"), [("True", "label"), ("original", "class"), ("2", "label"), ("", "is_fake")]
)
def test_ambiguous_words_are_refused_until_they_are_explained(word, column):
    with pytest.raises(DataError, match=r"here: the label must be .*--label-map"):
        read_label(word, column, {}, "here")
    if word:
        assert read_label(word, column, parse_label_map(f"{word}=fake,other=real"), "here") == 1


@pytest.mark.parametrize("text", ["", "a", "a=maybe", "=real", "a=real,a=fake"])
def test_a_wrong_label_map_is_refused(text):
    with pytest.raises(OptionError, match="--label-map"):
        parse_label_map(text)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,filename,label", "path, filename could each be the column image"),
        ("image,class,is_fake", "class, is_fake could each be the column label"),
        ("foo,bar", "needs the column image .* and the column label .*; it has foo, bar"),
        ("image,kind", "needs the column label .*; it has image, kind"),
    ],
)
def test_columns_that_are_not_plain_are_explained(tmp_path, header, message):
    (tmp_path / "t.csv").write_text(f"{header}\n" + ",".join("0" * len(header.split(","))) + "\n")
    with pytest.raises(DataError, match=message):
        open_benchmark(tmp_path / "t.csv")


def test_names_of_other_systems_are_found_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    accented = unicodedata.normalize("NFC", "été.png")
    for name in ("sub/a.png", f"sub/{accented}", "sub/Case.JPG", "sub/two.png", "sub/Two.png"):
        (tmp_path / name).touch()
    finder = NameFinder(tmp_path)
    names = {
        "sub\\a.png": "sub/a.png",
        " sub/a.png \t": "sub/a.png",
        (tmp_path / "sub/a.png").as_uri(): "sub/a.png",
        "~/sub/a.png": "sub/a.png",
        f"sub/{unicodedata.normalize('NFD', accented)}": f"sub/{accented}",
        "SUB\\case.jpg": "sub/Case.JPG",
    }
    for name, path in names.items():
        assert finder.find(name) == tmp_path / path, name
    assert finder.find("sub/TWO.png") == tmp_path / "sub/TWO.png"  # two could be meant
    assert finder.find("sub/\0.png") == tmp_path / "sub/\0.png"
    finder.report("t.csv")
    assert "t.csv: 6 names were found under another spelling" in capsys.readouterr().err
    (tmp_path / "l.txt").write_bytes("sub\\a.png\r\nsub/case.jpg\r\n".encode("utf-16"))
    assert [file.name for file in list_images(tmp_path / "l.txt")] == ["a.png", "Case.JPG"]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_tables_are_read_or_explained(tmp_path, count):
    rows = [{"image": f"{index}.png", "label": index % 2} for index in range(5)]
    whole = {
        "csv": "image,label\n" + "".join(f"{row['image']},{row['label']}\n" for row in rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "txt": "".join(f"{row['image']}\n" for row in rows),
    }
    random_ = random.Random(14)
    for number in range(count):
        suffix = list(whole)[number % 4]
        content = bytearray(whole[suffix].encode())
        for _ in range(random_.randint(1, 6)):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        file = tmp_path / f"{number}.{suffix}"
        file.write_bytes(bytes(content[: random_.randint(1, len(content))] if number % 3 else content))
        for read in (list_images, open_benchmark, read_rows):
            try:
                list(read(file))
            except UserError as error:
                assert str(error)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_deep_nesting_is_one_sentence(tmp_path, suffix):
    (tmp_path / f"t.{suffix}").write_text('{"image":' + "[" * 100_000)
    with pytest.raises(DataError, match=r"nested too deeply|not JSON"):
        open_benchmark(tmp_path / f"t.{suffix}")
