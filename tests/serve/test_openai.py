"""The real ``openai`` client, unchanged, against the server."""

import math

import openai
import pytest

from llava import ForgeryDetector
from llava.abstention import AbstentionRule
from tests.serve.running import StubSystem, data_url, png, running, sample

SAMPLE = "05_fake_inpainting.jpg"


def client_of(server, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def question(*images: str, text: str = "") -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


@pytest.fixture(scope="module")
def client(embedded):
    return client_of(embedded)


@pytest.fixture(scope="module")
def image() -> str:
    return data_url(sample(SAMPLE)[1], "image/jpeg")


def test_models_are_listed_and_described(client):
    (model,) = client.models.list().data
    assert model.id == "model" and client.models.retrieve("model").id == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_an_answer_is_that_of_the_detector(client, detector, image):
    answer = client.chat.completions.create(model="model", messages=question(image))
    own = detector.analyze(sample(SAMPLE)[1])
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].logprobs is None
    assert answer.forgery["report"]["label"] == own.label


@pytest.mark.parametrize("streams", [False, True])
def test_the_verdicts_token_has_p_fake(client, detector, image, streams):
    answer = client.chat.completions.create(model="model", messages=question(image), logprobs=True, stream=streams)
    if streams:
        chunks = list(answer)
        tokens = [t for c in chunks for t in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert len(chunks) > 20 and chunks[-1].choices[0].finish_reason == "stop"
        report = chunks[-1].forgery["report"]
    else:
        tokens, text = answer.choices[0].logprobs.content, answer.choices[0].message.content
        report = answer.forgery["report"]
    own = detector.analyze(sample(SAMPLE)[1])
    assert text.strip() == own.text == report["text"] and "".join(token.token for token in tokens).strip() == own.text
    (verdict,) = [token for token in tokens if token.top_logprobs]
    assert verdict.token.strip() == own.label
    probability = {top.token: math.exp(top.logprob) for top in verdict.top_logprobs}
    wanted = own.fake_probability if own.answer_probability is None else own.answer_probability
    assert probability["fake"] == pytest.approx(wanted, abs=1e-4)
    assert sum(probability.values()) == pytest.approx(1)
    assert all(token.logprob <= 0 for token in tokens)


def test_options_of_openai_reach_the_system(client, detector, image):
    short = client.chat.completions.create(model="model", messages=question(image), max_tokens=5)
    own = detector.analyze(sample(SAMPLE)[1], max_new_tokens=5)
    assert short.choices[0].message.content == own.text and short.forgery["report"]["score_source"] == own.score_source
    sampled = {"temperature": 1.5, "seed": 3, "max_completion_tokens": 40}
    drawn = client.chat.completions.create(model="model", messages=question(image), **sampled)
    own = detector.analyze(sample(SAMPLE)[1], temperature=1.5, seed=3, max_new_tokens=40)
    assert drawn.choices[0].message.content == own.text
    asked = client.chat.completions.create(model="model", messages=question(image, text="Real?"), max_tokens=20)
    assert (
        asked.choices[0].message.content
        == detector.analyze(sample(SAMPLE)[1], question="Real?", max_new_tokens=20).text
    )


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("messages", "settings", "error", "part"),
    [
        (question("https://example.org/a.png"), {}, openai.UnprocessableEntityError, "addresses are never fetched"),
        (question(data_url(b"no image")), {}, openai.UnprocessableEntityError, "no image in a known format"),
        (question(), {}, openai.UnprocessableEntityError, "one image"),
        (question(data_url(png()), data_url(png())), {}, openai.UnprocessableEntityError, "one image"),
        (question(data_url(png())), {"model": "gpt-4o"}, openai.NotFoundError, "'gpt-4o'"),
        (question(data_url(png())), {"n": 2}, openai.UnprocessableEntityError, "one answer"),
        (question(data_url(png())), {"temperature": -1}, openai.UnprocessableEntityError, "temperature"),
        (question(data_url(png())), {"max_tokens": 10**6}, openai.UnprocessableEntityError, "at most 1024"),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_the_client(client, messages, settings, error, part, streams):
    with pytest.raises(error, match=part):
        client.chat.completions.create(**{"model": "model", "messages": messages, "stream": streams, **settings})


def test_no_verdict_is_said_in_words_and_nothing_leaks(detector, image):
    silent = ForgeryDetector(detector.system, AbstentionRule(low=None, high=None, error_level=0.1, confidence=0.9))
    with running(silent) as server:
        client = client_of(server)
        answer = client.chat.completions.create(model="model", messages=question(image), logprobs=True)
        assert answer.choices[0].message.content.startswith("No verdict: inconclusive")
        assert answer.choices[0].logprobs.content == [] and answer.forgery["report"]["label"] is None
        chunks = list(client.chat.completions.create(model="model", messages=question(image), stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks).startswith("No verdict: inconclusive")


def test_a_system_without_words_says_its_verdict():
    with running(ForgeryDetector(StubSystem()), keys=("secret",)) as server:
        client = client_of(server, "secret")
        answer = client.chat.completions.create(model="model", messages=question(data_url(png())))
        assert answer.choices[0].message.content == "This image is fake."
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "wrong").models.list()
