"""Answer files become reasoning and caption files, and nothing is lost on the way."""

import json

import pytest

from mmfr_generation.output_to_reasoning import main
from tests.mmfr_generation.annotation_helpers import DATA
from tests.mmfr_generation.api_server import completion, result_line

GOLDENS = json.loads((DATA / "mmfr_generation.json").read_text())["output_to_reasoning"]


def line(custom_id, text, finish_reason="stop"):
    return result_line({"custom_id": custom_id}, 200, completion(text, finish_reason))


def write(path, lines):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in lines))
    return path


@pytest.mark.parametrize("label", ["real", "fake"])
def test_the_published_answers(label, tmp_path, capsys):
    answers = write(tmp_path / "answers.jsonl", GOLDENS[label]["jsonl"])
    assert main(["--input", str(answers), "--output", str(tmp_path / "out.json"), "--label", label]) == 3
    written = json.loads((tmp_path / "out.json").read_text())
    rejects = [json.loads(entry) for entry in (tmp_path / "out.json.rejects.jsonl").read_text().splitlines()]
    asked = [json.loads(entry)["custom_id"] for entry in GOLDENS[label]["jsonl"]]
    assert sorted([*written, *(reject["custom_id"] for reject in rejects)]) == sorted(asked)
    assert all(reject["reason"] and reject["detail"] and reject["where"] for reject in rejects)
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [f"total: {len(asked)}", f"failure: {len(rejects)}", f"success: {len(written)}"]
    for image, sentences in GOLDENS[label]["output"].items():
        if image in written and "nested" not in image and "attr_case" not in image:
            assert {k: v for k, v in written[image].items() if v} == {
                k: v for k, v in sentences.items() if v and k != "Weird"
            }


GOOD = '{"Answer": "The image is fake.", "Forgery Attributes": {"Low Image Quality": "It is soft."}}'


def test_what_the_api_can_send(tmp_path):
    refusal = line("refused.png", None)
    refusal["response"]["body"]["choices"][0]["message"]["refusal"] = "I will not."
    entries = [
        line("good.png", GOOD),
        line("cut.png", GOOD[:-20], "length"),
        line("whole though at the limit.png", GOOD, "length"),
        refusal,
        {"custom_id": "expired.png", "response": None, "error": {"code": "batch_expired", "message": "late"}},
        result_line({"custom_id": "bad.png"}, 400, {"error": {"message": "bad image", "code": "invalid"}}),
        {"custom_id": "odd.png", "response": {"status_code": 200, "body": {"choices": "none"}}},
        {"custom_id": "list.png", "response": []},
        "not json",
        "[1, 2]",
        '{"response": {}}',
        '{"custom_id": 5}',
        "",
        line("élan \ud83d.png", GOOD),
    ]
    write(tmp_path / "a.jsonl", entries)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\n")
    assert main(["--input", str(tmp_path), "--output", str(tmp_path / "o.json"), "--label=fake"]) == 3
    written = json.loads((tmp_path / "o.json").read_text())
    assert list(written) == ["good.png", "élan \ud83d.png"]
    rejects = [json.loads(entry) for entry in (tmp_path / "o.json.rejects.jsonl").read_text().splitlines()]
    reasons = {reject["custom_id"]: reject["reason"] for reject in rejects if reject["custom_id"]}
    assert reasons == {
        "cut.png": "truncated",
        "whole though at the limit.png": "truncated",
        "refused.png": "refused",
        "expired.png": "request_failed",
        "bad.png": "request_failed",
        "odd.png": "request_failed",
        "list.png": "request_failed",
    }
    assert [r["where"] for r in rejects if r["reason"] == "unreadable_line"] == [
        "a.jsonl, line 9",
        "a.jsonl, line 10",
        "a.jsonl, line 11",
        "a.jsonl, line 12",
        "b.jsonl, line 1",
    ]
    assert next(r for r in rejects if r["custom_id"] == "bad.png")["detail"].endswith("invalid: bad image")


def test_the_last_accepted_answer_counts(tmp_path):
    write(tmp_path / "1.jsonl", [line("x.png", "nothing"), line("y.png", GOOD)])
    write(tmp_path / "2.jsonl", [line("x.png", GOOD), line("y.png", "nothing")])
    write(tmp_path / "3.jsonl", [line("y.png", GOOD.replace("soft", "dull"))])
    main(["--input", str(tmp_path), "--output", str(tmp_path / "o.json"), "--label", "fake"])
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["x.png"]["Low Image Quality"] == "It is soft."
    assert written["y.png"]["Low Image Quality"] == "It is dull."
    assert (tmp_path / "o.json.rejects.jsonl").read_text() == ""


def test_captions(tmp_path):
    lines = [line("x.png", " A cat\non a mat. "), line("y.png", "cut off", "length"), line("z.png", "<CAPTION> a")]
    write(tmp_path / "c.jsonl", lines)
    assert main(["--input", str(tmp_path), "--output", str(tmp_path / "o.json"), "--task", "caption"]) == 3
    assert json.loads((tmp_path / "o.json").read_text()) == {"x.png": "A cat on a mat."}
    rejects = [json.loads(entry)["reason"] for entry in (tmp_path / "o.json.rejects.jsonl").read_text().splitlines()]
    assert rejects == ["truncated", "holds_tag"]


def test_wrong_use_is_explained(tmp_path, run_script):
    missing = run_script("output_to_reasoning", "--input", "no", "--output", "o.json", "--label", "real", cwd=tmp_path)
    assert (missing.returncode, missing.stderr) == (1, "error: there is no file or folder no\n")
    unlabelled = run_script("output_to_reasoning", "--input", ".", "--output", "o.json", cwd=tmp_path)
    assert unlabelled.returncode == 2
    assert "--label" in unlabelled.stderr


ATTRIBUTE = "Low Image Quality"


def reasoning(sentence, before="", after=""):
    return before + json.dumps({"Answer": "The image is fake.", "Forgery Attributes": {ATTRIBUTE: sentence}}) + after


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("I'm sorry, but I can't assist with that.", "stop", "refused"),
        ("I’m unable to determine this. {}", "stop", "refused"),
        ("As an AI language model, I cannot view images.", "stop", "refused"),
        (reasoning("I cannot describe the person."), "stop", "refused"),
        (reasoning("Soft edges."), "content_filter", "filtered"),
        (reasoning("Soft edges."), "length", "truncated"),
        (reasoning("Soft edges.", before="<think>Hm, it may be real.</think>"), "stop", "thinking"),
        (reasoning("Okay, so the edges are soft."), "stop", "thinking"),
        (reasoning("Let me look at the edges."), "stop", "thinking"),
        (reasoning('{"a": "b c"}'), "stop", "not_prose"),
        (reasoning("```The edges are soft.```"), "stop", "not_prose"),
        (reasoning("The edges are soft, so this image is real."), "stop", "other_verdict"),
        (reasoning("The picture appears to be authentic."), "stop", "other_verdict"),
        (reasoning("The <b>edges</b> are soft."), "stop", "holds_tag"),
        (reasoning("The edges of <image> are soft."), "stop", "special_token"),
        (reasoning("The edges are soft.</s>"), "stop", "special_token"),
        (reasoning("The edges are soft.<|im_end|>"), "stop", "special_token"),
        (reasoning("Soft."), "stop", "too_short"),
        (reasoning("The edges are soft."), "stop", ""),
        (reasoning("The edges are soft.", before="Sure! Here it is: ", after=" Shall I go on?"), "stop", ""),
        (reasoning("It would be sharper if this image were real."), "stop", ""),
        (reasoning("Edges are soft, as a real image has none."), "stop", ""),
    ],
)
def test_answers_are_screened_with_their_reason(text, finish, reason, tmp_path):
    write(tmp_path / "a.jsonl", [line("x.png", text, finish)])
    status = main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o.json"), "--label", "fake"])
    rejects = [json.loads(entry)["reason"] for entry in (tmp_path / "o.json.rejects.jsonl").read_text().splitlines()]
    assert rejects == ([reason] if reason else []) and status == (1 if reason else 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (reasoning("The edges are soft."), "not_prose"),
        ('```json\n{"caption": "A cat."}\n```', "not_prose"),
        ('["A cat."]', "not_prose"),
        ("Sorry, but I can't help with that request.", "refused"),
        ("Okay, let me describe it. A cat.", "thinking"),
        ("The user wants a caption. A cat on a mat.", "thinking"),
        ("Sure! Here is the description: a cat.", "thinking"),
        ("A cat on a mat. The image is fake.", "verdict_in_caption"),
        ("An AI-generated image of a cat.", "verdict_in_caption"),
        ("A real photo of a cat.", "verdict_in_caption"),
        ("A cat. [/INST]", "special_token"),
        ("Cat.", "too_short"),
        ("A cat on a mat, in soft light.", ""),
        ("A realistic painting of a fake fur coat.", ""),
        ("街上有一只猫在走路", ""),
    ],
)
def test_captions_are_screened_with_their_reason(text, reason, tmp_path):
    write(tmp_path / "a.jsonl", [line("x.png", text)])
    main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o.json"), "--task", "caption"])
    rejects = [json.loads(entry)["reason"] for entry in (tmp_path / "o.json.rejects.jsonl").read_text().splitlines()]
    assert rejects == ([reason] if reason else [])


def test_an_answer_about_a_replaced_image_does_not_count(tmp_path):
    old, new = "x.png#0123456789abcdef", "x.png#fedcba9876543210"
    write(tmp_path / "1.jsonl", [line(old, GOOD), line("y.png#0123456789abcdef", GOOD)])
    write(tmp_path / "2.jsonl", [line(new, "nothing")])
    main(["--input", str(tmp_path), "--output", str(tmp_path / "o.json"), "--label", "fake"])
    assert list(json.loads((tmp_path / "o.json").read_text())) == ["y.png"]
    write(tmp_path / "3.jsonl", [line(new, GOOD.replace("soft", "dull"))])
    main(["--input", str(tmp_path), "--output", str(tmp_path / "o.json"), "--label", "fake"])
    assert json.loads((tmp_path / "o.json").read_text())["x.png"][ATTRIBUTE] == "It is dull."
