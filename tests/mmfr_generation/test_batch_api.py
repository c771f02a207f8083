"""From requests to answers over a real local server, with whatever can go wrong."""

import email.utils
import json
import random
import shutil
import subprocess
import sys
import time

import pytest

from llava.errors import UserError
from llava.files import exclusive_lock
from mmfr_generation import get_jsonl
from mmfr_generation.api.batch_jobs import BatchJobs
from mmfr_generation.api.chat_client import ChatError, make_client
from mmfr_generation.api.direct_jobs import DirectJobs
from tests.mmfr_generation.annotation_helpers import REPOSITORY, noise_image, script_environment
from tests.mmfr_generation.api_server import KEY, Failure, completion

QUICK = ["--retry-pause", "0.01"]
BATCH = [*QUICK, "--poll-seconds", "0.01"]


def write_requests(folder, files=3, each=4):
    """Request files as ``get_jsonl.py`` writes them, with a pixel or two of image."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        lines = []
        for image in range(each):
            text = [{"type": "text", "text": f"{number} {image}: The image is fake."}]
            body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": text}]}
            request = {"custom_id": f"ç/{number}/{image}.png", "method": "POST", "url": "/v1/chat/completions"}
            lines.append(json.dumps({**request, "body": body}, ensure_ascii=False) + "\n")
        (folder / f"sét_{number:04d}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def folders(tmp_path):
    return write_requests(tmp_path / "requests"), tmp_path / "answers"


@pytest.fixture
def jobs(server, folders, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    # The client has no option for its pause after a lost connection.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def make(kind=BatchJobs, url=server.url, **more):
        settings = {"first_pause": 0.01, "poll_seconds": 0.01, **more} if kind is BatchJobs else more
        return kind(make_client(url, first_pause=0.01), *folders, **settings)

    return make


def answers_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def check_complete(folders, failed=()):
    """Every request has one line, in order, and all but ``failed`` hold an answer."""
    requests, answers = folders
    for path in sorted(requests.glob("*.jsonl")):
        asked = [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
        lines = [json.loads(line) for line in (answers / path.name).read_bytes().splitlines()]
        assert [line["custom_id"] for line in lines] == asked
        for line in lines:
            good = bool(line["response"]) and line["response"]["status_code"] == 200
            assert good == (line["custom_id"] not in failed), line
    assert len(answers_in(answers)) == len(answers_in(requests))


def test_batches_bring_every_answer(server, folders, jobs):
    server.plans = [{"shuffle": True}, {}, {}]
    assert jobs().run() == []
    check_complete(folders)
    assert all(count == 1 for count in server.uploads().values())
    assert len(server.batches) == 3
    assert {batch["endpoint"] for batch in server.batches.values()} == {"/v1/chat/completions"}
    uploads, batches = len(server.files), len(server.batches)
    before = answers_in(folders[1])
    assert jobs().run() == []
    assert (len(server.files), len(server.batches)) == (uploads, batches)
    assert answers_in(folders[1]) == before


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        *[("POST", "/v1/files", what) for what in (429, 500, "drop", "drop_after", "cut")],
        *[("POST", "/v1/batches", what) for what in (503, "drop_after", "cut")],
        ("GET", "/v1/files", 429),
        ("GET", "/v1/files", "cut"),
        ("GET", "/v1/batches", 500),
        ("GET", "/v1/batches", "drop"),
        ("GET", "/v1/files/file-4/content", 500),
        ("GET", "/v1/files/file-4/content", "cut"),
    ],
)
def test_passing_failures_are_overcome(method, path, what, server, folders, jobs):
    server.failures = [Failure(method, path, what, times=3)]
    assert jobs().run() == []
    assert not server.failures
    check_complete(folders)
    assert all(count == 1 for count in server.uploads().values())
    assert len(server.batches) == 3


@pytest.mark.parametrize("form", ["seconds", "date", "milliseconds"])
def test_retry_after_is_kept(form, server, jobs):
    value = {"seconds": "1", "date": email.utils.formatdate(time.time() + 2, usegmt=True), "milliseconds": "1000"}[form]
    name = "retry-after-ms" if form == "milliseconds" else "Retry-After"
    server.failures = [Failure("GET", "/v1/files", 429, headers={name: value})]
    begin = time.monotonic()
    jobs().submit()
    assert 0.8 < time.monotonic() - begin < 5


def test_an_expired_batch_is_asked_again_for_what_is_missing(server, folders, jobs):
    server.plans = [{"status": "expired", "done": 1}, {"status": "expired", "done": 0}, {"silent": [2]}]
    assert jobs().run() == []
    check_complete(folders)
    assert set(server.asked.values()) == {1}
    # The batch that gave nothing is started again from the file that is on the server already.
    assert all(count == 1 for count in server.uploads().values())
    assert len(server.uploads()) == 5
    assert len(server.batches) == 6


def test_failures_of_single_requests_are_kept_and_named(server, folders, jobs):
    server.plans = [{"errors": {1: {"code": "bad_image", "message": "cannot see"}, 2: {"status": 500, "message": "x"}}}]
    assert jobs(max_pending=1).run() == ["ç/0/1.png: bad_image: cannot see"]
    check_complete(folders, failed={"ç/0/1.png"})
    assert server.asked["ç/0/2.png"] == 1
    assert len(server.batches) == 4


def test_a_refused_batch_is_reported_and_tried_again_by_the_next_run(server, folders, jobs):
    server.plans = [{"status": "failed", "code": "billing", "message": f"pay first, {KEY}"}]
    first = jobs()
    failed = first.run()
    assert len(failed) == 4
    assert "the server says of 1: pay first, [key]" in first.summary()
    assert len(server.batches) == 3
    assert jobs().run() == []
    check_complete(folders)
    assert all(count == 1 for count in server.uploads().values())


def test_a_cancelled_batch_is_not_started_again_by_itself(server, folders, jobs):
    server.plans = [{"status": "cancelled", "silent": [1, 2]}]
    assert len(jobs().run()) == 2
    assert len(server.batches) == 3
    assert jobs().run() == []
    assert len(server.batches) == 4
    assert set(server.asked.values()) == {1}


def test_the_server_is_asked_for_its_batches_once(server, folders, jobs):
    write_requests(folders[0], files=12, each=1)
    server.polls_needed = 1
    assert jobs().run() == []
    listings = server.requests["GET", "batches"] - sum(batch["polls"] for batch in server.batches.values())
    assert listings == 1
    check_complete(folders)


def test_a_limit_passes_by_itself(server, folders, jobs):
    server.plans = [{}, {"status": "failed", "code": "token_limit_exceeded", "message": "too many"}]
    assert jobs().run() == []
    check_complete(folders)
    assert len(server.batches) == 4


def test_no_more_batches_than_allowed_are_pending(server, folders, jobs):
    live = []
    server.polls_needed = 3
    one = jobs(max_pending=1)
    note = one._note
    one._note = lambda *given: (note(*given), live.append(one._live()))
    assert one.run() == []
    assert max(live) == 1
    check_complete(folders)


def test_rounds_end(server, folders, jobs):
    server.plans = [{"status": "expired"}] * 50
    failed = jobs().run(rounds=2)
    assert len(failed) == 12
    assert len(server.batches) == 6


def test_steps_one_by_one(server, folders, run_script, tmp_path):
    common = ["--input_folder", "requests", "--output_folder", "answers", "--base_url", server.url, *BATCH]
    submitted = run_script("batch_api", "submit", *common, cwd=tmp_path)
    assert submitted.returncode == 0
    assert "3 validating" in submitted.stdout
    early = run_script("batch_api", "download", *common, cwd=tmp_path)
    assert "batches downloaded: 0" in early.stdout
    assert not answers_in(folders[1])
    watched = run_script("batch_api", "watch", *common, cwd=tmp_path)
    assert watched.returncode == 0
    assert "3 completed" in watched.stdout
    check_complete(folders)
    assert sum(server.uploads().values()) == 3


def test_a_changed_request_file_is_not_mixed_up(server, folders, jobs):
    jobs().submit()
    path = folders[0] / "sét_0001.jsonl"
    path.write_text(path.read_text().replace("fake", "FAKE"))
    with pytest.raises(UserError, match=r"sét_0001\.jsonl has changed"):
        jobs()


def test_uploads_are_found_without_the_state_file(server, folders, jobs):
    jobs().submit()
    (folders[1] / ".batch_api" / "state.json").unlink()
    assert jobs().run() == []
    check_complete(folders)
    assert sum(server.uploads().values()) == 3
    assert len(server.batches) == 3


def killed_until_done(server, command, cwd, kills, chance):
    """Runs a command and kills it at random requests to the server until it ends by itself; returns how often."""
    died = 0
    while True:
        with server.lock:
            server.kill_at = {server.count + chance.randint(1, 9)} if died < kills else set()
        process = subprocess.Popen(
            command, cwd=cwd, env=script_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        server.client_pid = process.pid
        error = process.communicate(timeout=120)[1]
        if process.returncode == 0:
            return died
        assert process.returncode == -9, error
        died += 1


@pytest.mark.parametrize(
    ("kills", "mode"),
    [
        (2, "run"),
        pytest.param(20, "run", marks=pytest.mark.slow),
        (2, "direct"),
        pytest.param(20, "direct", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_it_ends_in_the_same(kills, mode, server, folders, tmp_path, jobs):
    files, each = max(5, kills // 2), 8
    write_requests(folders[0], files, each)
    if mode == "run":
        server.plans = [{}, {"status": "expired", "done": 3}, {"silent": [0]}]
    script = str(REPOSITORY / "mmfr_generation" / "batch_api.py")
    command = [sys.executable, script, mode, "--input-folder", "requests", "--output-folder", "answers"]
    command += ["--base-url", server.url, *(BATCH if mode == "run" else [*QUICK, "--concurrency", "2"])]
    died = killed_until_done(server, command, tmp_path, kills, random.Random(kills))
    assert died == kills
    check_complete(folders)
    killed = answers_in(folders[1])
    if mode == "run":
        assert all(count == 1 for count in server.uploads().values())
        assert set(server.asked.values()) == {1}
        assert len(server.batches) == files + 2
    else:
        assert sum(server.asked.values()) <= files * each + 2 * died
    assert BatchJobs(make_client(server.url), *folders, poll_seconds=0.01).run() == []
    if mode == "run":
        assert answers_in(folders[1]) == killed
    leftovers = [path for path in folders[1].iterdir() if path.name.endswith(".partial")]
    assert not leftovers


def test_direct_mode_asks_each_request_once_and_several_at_a_time(server, folders, jobs):
    assert jobs(DirectJobs, concurrency=3).run() == []
    check_complete(folders)
    assert set(server.asked.values()) == {1}
    assert 2 <= server.most_at_work <= 3
    assert jobs(DirectJobs).run() == []
    assert set(server.asked.values()) == {1}
    assert not server.batches


@pytest.mark.parametrize("what", [429, 500, "drop", "drop_after", "cut"])
def test_direct_mode_overcomes_failures(what, server, folders, jobs):
    server.failures = [Failure("POST", "/v1/chat", what, times=4)]
    assert jobs(DirectJobs).run() == []
    check_complete(folders)


def test_direct_mode_keeps_failures_and_asks_them_again(server, folders, jobs):
    server.failures = [Failure("POST", "/v1/chat", 400, body={"error": {"message": f"no {KEY}", "code": "bad"}})]
    failed = jobs(DirectJobs, concurrency=1).run()
    assert len(failed) == 1
    assert failed[0].startswith("ç/0/0.png: bad: ")
    assert "no [key]" in failed[0]
    check_complete(folders, failed={"ç/0/0.png"})
    assert jobs(DirectJobs).run() == []
    check_complete(folders)


@pytest.mark.parametrize(
    ("what", "body", "told"),
    [
        (401, {"error": {"message": "bad key", "code": "invalid_api_key"}}, "does not accept the API key"),
        (404, {"error": {"message": "no such model", "code": "model_not_found"}}, "no such model"),
        (429, {"error": {"message": "quota is used up", "code": "insufficient_quota"}}, "quota is used up"),
    ],
)
def test_a_fatal_error_stops_at_once(what, body, told, server, folders, run_script, tmp_path):
    server.failures = [Failure("POST", "/v1/chat", what, times=1000, body=body)]
    common = ["--input-folder", "requests", "--output-folder", "answers", "--base-url", server.url]
    done = run_script("batch_api", "direct", *common, *QUICK, cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert server.requests["POST", "chat"] < 12
    server.failures = [Failure("POST", "/v1/files", what, times=1000, body=body)]
    done = run_script("batch_api", "run", *common, *BATCH, cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert server.requests["POST", "files"] == 1


def test_an_answer_torn_by_a_kill_is_asked_again(server, folders, jobs):
    jobs(DirectJobs).run()
    before = answers_in(folders[1])
    log = folders[1] / ".batch_api" / "sét_0001.direct.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert jobs(DirectJobs).run() == []
    assert sorted(server.asked.values()) == [1] * 11 + [2]
    assert answers_in(folders[1]) == before


def test_the_key_is_sent_and_written_nowhere(server, folders, jobs, run_script, tmp_path):
    body = {"error": {"message": f"wrong key {KEY}", "code": None}}
    server.plans = [{"status": "failed", "code": "x", "message": f"key {KEY}"}]
    jobs().run()
    jobs(DirectJobs).run()
    server.failures = [Failure("GET", "/v1/files", 401, times=9, body=body)]
    common = ["--input-folder", "requests", "--output-folder", "other", "--base-url", server.url, *BATCH]
    done = run_script("batch_api", "run", *common, cwd=tmp_path)
    assert "[key]" in done.stderr
    assert KEY not in done.stderr + done.stdout
    assert server.seen_keys == {f"Bearer {KEY}"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_wrong_use_is_explained(folders, run_script, tmp_path):
    common = ["--input-folder", "requests", "--output-folder", "answers"]
    keyless = run_script("batch_api", "run", *common, cwd=tmp_path, OPENAI_API_KEY="", OPENAI_BASE_URL="")
    assert keyless.returncode == 1
    assert keyless.stderr == "error: the environment variable OPENAI_API_KEY is not set; it must hold the API key\n"
    nothing = run_script("batch_api", "run", "--input-folder", ".", "--output-folder", "o", cwd=tmp_path)
    assert "there is no .jsonl file in" in nothing.stderr
    (folders[0] / "bad.jsonl").write_text("{}\n")
    bad = run_script("batch_api", "submit", *common, cwd=tmp_path, OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    assert "bad.jsonl, line 1, is not a request" in bad.stderr
    for done in (keyless, nothing, bad):
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [BatchJobs, DirectJobs])
def test_a_server_out_of_reach_is_named(kind, jobs):
    with pytest.raises(ChatError, match=r"no answer from http://127\.0\.0\.1:9/v1/ .* check --base-url"):
        jobs(kind, url="http://127.0.0.1:9/v1").run()


def test_waiting_outlasts_a_server_out_of_reach(server, folders, jobs, monkeypatch, capsys):
    one = jobs()
    one.submit()
    monkeypatch.setattr(one.chat, "client", one.chat.single)
    server.failures = [Failure("GET", "/v1/batches", "drop", times=9)]
    one.watch()
    check_complete(folders)
    assert capsys.readouterr().err.count("next try in 0.01 s") == 9
    server.failures = [Failure("GET", "/v1/batches", 401, times=9)]
    two = jobs()
    two.state["sét_0000.jsonl"].attempts[-1].status = "in_progress"
    with pytest.raises(ChatError, match="does not accept"):
        two.watch()
    assert len(server.failures) == 1 and server.failures[0].times == 8


def test_two_processes_do_not_share_a_folder(server, folders, run_script, tmp_path, jobs):
    with exclusive_lock(folders[1] / ".batch_api" / "state.json"):
        common = ["--input-folder", "requests", "--output-folder", "answers", "--base-url", server.url]
        done = run_script("batch_api", "run", *common, cwd=tmp_path)
    assert done.returncode == 1
    assert "another process is writing answers/.batch_api/state.json" in done.stderr
    assert not server.files


def test_text_of_any_kind_arrives(server, folders, jobs):
    server.answer = lambda request: completion("half \ud83d, 😀, \0, \u2028")
    assert jobs().run() == []
    check_complete(folders)


@pytest.mark.parametrize("kind", [BatchJobs, DirectJobs])
def test_a_replaced_image_is_asked_again_and_a_removed_one_is_not(kind, server, tmp_path, jobs, make_images):
    shutil.rmtree(tmp_path / "requests")
    root = make_images(["a.png", "b.png", "c.png", "d.png"])
    ask = ["--image-folder", str(root), "--output-folder", str(tmp_path / "requests"), "--label", "fake"]
    get_jsonl.main([*ask, "--images-per-file", "2"])
    assert jobs(kind).run() == []
    assert len(server.asked) == 4
    noise_image(99).save(root / "a.png")
    (root / "c.png").unlink()
    make_images(["e.png"], start=7)
    get_jsonl.main([*ask, "--images-per-file", "2"])
    assert jobs(kind).run() == []
    assert len(server.asked) == 6 and set(server.asked.values()) == {1}
    check_complete((tmp_path / "requests", tmp_path / "answers"))


@pytest.mark.parametrize("kind", [BatchJobs, DirectJobs])
def test_a_folder_that_asks_for_different_things_is_refused(kind, server, tmp_path, jobs, make_images):
    shutil.rmtree(tmp_path / "requests")
    ask = ["--image-folder", str(make_images(["a.png"])), "--output-folder"]
    for number, more in enumerate((["--label", "fake"], ["--task", "caption"])):
        get_jsonl.main([*ask, str(tmp_path / str(number)), *more])
    (tmp_path / "0").rename(tmp_path / "requests")
    for path in (tmp_path / "1").iterdir():
        shutil.copy(path, tmp_path / "requests")
    with pytest.raises(UserError, match=r"ask for different things; a request folder is of one task"):
        jobs(kind).run()
    assert not server.asked
