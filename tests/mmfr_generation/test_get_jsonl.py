"""Images become request files that the API takes, with ids that stay."""

import base64
import hashlib
import io
import itertools
import json
import shutil
import tracemalloc

import pytest
from PIL import Image

from llava.errors import DataError
from mmfr_generation.api.answers import image_of
from mmfr_generation.api.costs import PRICES, TileRule
from mmfr_generation.get_jsonl import limit_name, main
from mmfr_generation.prompts import reasoning_prompt
from tests.mmfr_generation.annotation_helpers import noise_image


def requests_in(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def ask(images, out, *more):
    return main(["--image-folder", str(images), "--output-folder", str(out), "--label", "fake", *more])


def names_in(folder):
    return [image_of(request["custom_id"]) for request in requests_in(folder)]


def content_of(request):
    url = request["body"]["messages"][0]["content"][1]["image_url"]["url"]
    head, data = url.split(",", 1)
    return head, base64.b64decode(data)


def test_requests_are_what_the_batch_api_takes(make_images, tmp_path):
    root = make_images(["b.png", "a.jpg", "sub/ç ü.webp", "sub/deeper/x.gif"])
    assert ask(root, tmp_path / "out", "--set_name", "gallery/1_fake", "--max_tokens", "77", "--model", "m") == 0
    assert list(bytes_in(tmp_path / "out")) == ["gallery_1_fake_fake_reasoning_0001.jsonl"]
    requests = requests_in(tmp_path / "out")
    assert names_in(tmp_path / "out") == [
        "gallery/1_fake/a.jpg",
        "gallery/1_fake/b.png",
        "gallery/1_fake/sub/deeper/x.gif",
        "gallery/1_fake/sub/ç ü.webp",
    ]
    for request, kind in zip(requests, ["jpeg", "png", "gif", "webp"], strict=True):
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        assert (request["body"]["model"], request["body"]["max_tokens"]) == ("m", 77)
        assert request["body"]["messages"][0]["content"][0]["text"] == reasoning_prompt("fake")
        head, data = content_of(request)
        assert head == f"data:image/{kind};base64"
        assert data == (root / image_of(request["custom_id"]).removeprefix("gallery/1_fake/")).read_bytes()
        assert request["custom_id"].endswith(f"#{hashlib.sha256(data).hexdigest()[:16]}")


def test_media_type_comes_from_the_content(make_images, tmp_path):
    root = make_images(["really.png", "a.bmp"])
    (root / "really.png").rename(root / "called.jpg")
    shutil.copy(root / "called.jpg", root / "no_suffix")
    (root / "notes.txt").write_text("no image")
    noise_image(5).convert("CMYK").save(root / "c.tif")
    frames = [noise_image(seed) for seed in range(3)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    assert ask(root, tmp_path / "out") == 0
    found = {image_of(request["custom_id"]): content_of(request) for request in requests_in(tmp_path / "out")}
    assert sorted(found) == [f"photos/{name}" for name in ["a.bmp", "c.tif", "called.jpg", "moving.gif", "no_suffix"]]
    assert all(head == "data:image/png;base64" for head, _ in found.values())
    for name, (_, data) in found.items():
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG", name
            assert image.size == (64, 48)
            assert getattr(image, "n_frames", 1) == 1


def test_unreadable_images_are_named_and_counted(make_images, tmp_path, run_script):
    root = make_images(["good.png", "torn.png", "torn.jpg"])
    for name in ("torn.png", "torn.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:-200])
    (root / "text.png").write_text("not an image")
    (root / "empty.jpg").touch()
    (root / "dangling.png").symlink_to("nowhere")
    bad_name = str(root).encode() + b"/\xff.png"
    shutil.copy(root / "good.png", bad_name)
    done = run_script("get_jsonl", "--image-folder", root, "--output-folder", "out", "--label", "real", cwd=tmp_path)
    assert done.returncode == 3
    assert "left out: 6 images" in done.stderr
    for name in ("torn.png", "torn.jpg", "text.png", "empty.jpg", "dangling.png", "\\udcff.png"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert names_in(tmp_path / "out") == ["photos/good.png"]


@pytest.mark.parametrize(("limit", "per_file"), [(30_000, 50), (10**9, 3), (25_000, 2)])
def test_files_are_split_by_bytes_and_images(limit, per_file, make_images, tmp_path):
    root = make_images([f"{number}.png" for number in range(10)])
    assert ask(root, tmp_path / "out", f"--max-bytes={limit}", f"--images-per-file={per_file}") == 0
    files = bytes_in(tmp_path / "out")
    assert all(len(data) <= limit and len(data.splitlines()) <= per_file for data in files.values())
    ordered = [files[name] for name in sorted(files)]
    for one, following in itertools.pairwise(ordered):
        fuller = len(one) + len(following.splitlines(keepends=True)[0])
        assert fuller > limit or len(one.splitlines()) == per_file
    assert len(requests_in(tmp_path / "out")) == 10


def test_an_image_above_the_limit_is_named(make_images, tmp_path, capsys):
    root = make_images(["a.png", "b.png"])
    noise_image(1, (900, 900)).save(root / "big.bmp")
    assert ask(root, tmp_path / "out", "--max-bytes", "30000") == 3
    assert "big.bmp: its request has" in capsys.readouterr().err
    assert len(requests_in(tmp_path / "out")) == 2


def test_a_resumed_run_writes_the_same_files(make_images, tmp_path):
    root = make_images([f"{number}.png" for number in range(9)])
    ask(root, tmp_path / "whole", "--images-per-file", "2")
    whole = bytes_in(tmp_path / "whole")
    for kept in range(5):
        out = tmp_path / f"stopped{kept}"
        out.mkdir()
        for name in sorted(whole)[:kept]:
            (out / name).write_bytes(whole[name])
        assert ask(root, out, "--images-per-file", "2") == 0
        assert bytes_in(out) == whole


def test_new_images_are_added_and_written_requests_stay(make_images, tmp_path):
    root = make_images(["b.png", "c.png"])
    ask(root, tmp_path / "out")
    before = bytes_in(tmp_path / "out")
    make_images(["a.png"], start=7)
    assert ask(root, tmp_path / "out") == 0
    after = bytes_in(tmp_path / "out")
    assert before.items() < after.items()
    assert names_in(tmp_path / "out") == ["photos/b.png", "photos/c.png", "photos/a.png"]


def test_a_replaced_image_is_asked_about_anew_and_a_removed_one_is_not_paid_for(make_images, tmp_path, capsys):
    root = make_images(["a.png", "b.png", "c.png", "d.png"])
    ask(root, tmp_path / "out", "--images-per-file", "2")
    before = requests_in(tmp_path / "out")
    noise_image(99).save(root / "a.png")
    (root / "c.png").unlink()
    (root / "d.png").write_bytes(b"torn")  # what cannot be read now may be mended, so its request stays
    assert ask(root, tmp_path / "out", "--images-per-file", "2") == 3
    after = requests_in(tmp_path / "out")
    assert names_in(tmp_path / "out") == ["photos/b.png", "photos/d.png", "photos/a.png"]
    assert content_of(after[-1])[1] == (root / "a.png").read_bytes()
    assert after[:2] == [before[1], before[3]]
    assert "photos/a.png\n  photos/c.png" in capsys.readouterr().out
    for name in ("b.png", "d.png", "a.png"):
        (root / name).unlink()
    make_images(["z.png"], start=5)
    ask(root, tmp_path / "out", "--images-per-file", "2")
    assert list(bytes_in(tmp_path / "out")) == ["photos_fake_reasoning_0004.jsonl"]


def test_requests_of_earlier_versions_are_known_by_what_they_send(make_images, tmp_path):
    root = make_images(["a.png", "b.png"])
    ask(root, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.jsonl")
    old = [{**request, "custom_id": image_of(request["custom_id"])} for request in requests_in(tmp_path / "out")]
    path.write_text("".join(json.dumps(request) + "\n" for request in old))
    noise_image(99).save(root / "b.png")
    ask(root, tmp_path / "out")
    assert requests_in(tmp_path / "out")[0]["custom_id"] == "photos/a.png"
    assert names_in(tmp_path / "out") == ["photos/a.png", "photos/b.png"]
    assert content_of(requests_in(tmp_path / "out")[1])[1] == (root / "b.png").read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        ["--label", "real"],
        ["--task", "caption"],
        ["--label", "fake", "--model", "o4-mini"],
        ["--label", "fake", "--detail", "low"],
        ["--label", "fake", "--max-tokens", "9"],
    ],
)
def test_a_folder_is_of_one_task_label_and_setting(other, make_images, tmp_path):
    root = make_images(["a.png"])
    ask(root, tmp_path / "out")
    before = bytes_in(tmp_path / "out")
    common = ["--image-folder", str(root), "--output-folder", str(tmp_path / "out"), "--set-name", "elsewhere"]
    with pytest.raises(DataError, match="asks something else"):
        main([*common, *other])
    assert bytes_in(tmp_path / "out") == before
    assert main([*common, "--label", "fake"]) == 0
    assert len(bytes_in(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *[(model, "max_completion_tokens") for model in ("o1", "o3-mini", "gpt-5", "gpt-5.1-nano", "ft:o4-mini:x")],
        *[(model, "max_tokens") for model in ("gpt-4o-2024-08-06", "gpt-4.1", "qwen3-vl", "a/gpt-oss-20b", "olmo")],
    ],
)
def test_the_limit_has_the_name_that_the_model_takes(model, name, make_images, tmp_path):
    assert limit_name(model) == name
    root = make_images(["a.png"])
    ask(root, tmp_path / "out", "--model", model, "--max-tokens", "7")
    (request,) = requests_in(tmp_path / "out")
    assert request["body"][name] == 7 and len({"max_tokens", "max_completion_tokens"} & set(request["body"])) == 1


def test_the_limits_name_can_be_given(make_images, tmp_path):
    ask(make_images(["a.png"]), tmp_path / "out", "--model", "own", "--limit-name", "max_completion_tokens")
    assert requests_in(tmp_path / "out")[0]["body"]["max_completion_tokens"] == 300


def test_other_settings_need_another_folder(make_images, tmp_path, run_script):
    root = make_images(["a.png"])
    common = ["--image-folder", root, "--output-folder", "out", "--label", "fake"]
    assert run_script("get_jsonl", *common, cwd=tmp_path).returncode == 0
    before = bytes_in(tmp_path / "out")
    other = run_script("get_jsonl", *common, "--max-tokens", "99", cwd=tmp_path)
    assert other.returncode == 1
    assert "asks something else" in other.stderr
    assert bytes_in(tmp_path / "out") == before


def test_memory_stays_flat(make_images, tmp_path):
    root = make_images(["0.bmp"])
    for number in range(1, 60):
        noise_image(number, (300, 300)).save(root / f"{number}.bmp")
    tracemalloc.start()
    ask(root, tmp_path / "out", "--images-per-file", "2")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, bytes_in(tmp_path / "out").values())) > 2 * peak


def test_dry_run_counts_tokens_and_cost_and_writes_nothing(make_images, tmp_path, capsys):
    root = make_images(["a.png"])
    noise_image(1, (1024, 1024)).save(root / "square.png")
    noise_image(2, (2048, 4096)).save(root / "tall.jpg")
    arguments = ["--image-folder", str(root), "--label", "fake", "--dry-run"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert f"image tokens: {255 + 765 + 1105}" in told
    prompt_tokens = 3 * -(-len(reasoning_prompt("fake")) // 4)
    price = PRICES["gpt-4o-2024-08-06"]
    cost = ((2125 + prompt_tokens) * price.input + 900 * price.output) / 1e6
    assert f"at most ${cost / 2:.4f} in batches, ${cost:.4f} directly" in told
    assert main([*arguments, "--model", "mine"]) == 0
    assert "no price is known for mine" in capsys.readouterr().out
    own = [
        "--model",
        "mine",
        "--input_price",
        "1",
        "--output-price",
        "0",
        "--image-tokens",
        "10",
        "1",
        "--detail",
        "low",
    ]
    assert main([*arguments, *own]) == 0
    told = capsys.readouterr().out
    assert "image tokens: 30\n" in told
    assert f"${(30 + prompt_tokens) / 1e6:.4f} directly" in told
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((1024, 1024), 765),
        ((2048, 4096), 1105),
        ((512, 512), 255),
        ((513, 512), 425),
        ((1, 1), 255),
        ((1536, 768), 1105),
    ],
)
def test_tile_rule(size, tokens):
    assert TileRule().tokens(*size) == tokens
    assert TileRule().tokens(*size[::-1]) == tokens
    assert TileRule().tokens(*size, detail="low") == 85


@pytest.mark.parametrize(
    ("arguments", "told", "status"),
    [
        (["--image-folder", "none", "--output-folder", "o", "--label", "fake"], "there is no folder none", 1),
        (["--image-folder", ".", "--output-folder", "o", "--label", "fake"], "there is no image in", 1),
        (["--image-folder", ".", "--output-folder", "o"], "needs --label", 2),
        (["--image-folder", ".", "--label", "fake"], "--output-folder is needed", 2),
        (["--image-folder", ".", "--label", "maybe", "--dry-run"], "invalid choice", 2),
        (["--image-folder", ".", "--label", "fake", "--dry-run", "--max-bytes", "0"], "above 0", 2),
        (["--image-folder", ".", "--label", "fake", "--dry-run", "--set-name", "../x"], "relative path", 1),
        (["--image-folder", ".", "--label", "fake", "--dry-run", "--input-price", "1"], "go together", 2),
    ],
)
def test_wrong_use_is_explained(arguments, told, status, tmp_path, run_script):
    done = run_script("get_jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == status
    assert told in done.stderr
    assert "Traceback" not in done.stderr
