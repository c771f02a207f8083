"""Folders for serving engines, opened as such an engine would: by plain transformers."""

import base64
import io
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from llava import ForgeryDetector, load_pretrained_model
from llava.export import main as export
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.checkpoint_files import read_tensors
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.serving_files import add_image_word, llama_tensors
from llava.systems.language_model import fill_conversation
from tests.conftest import GOLDENS
from tests.small_models import small_model
from tests.test_published_size import model as published_13b  # noqa: F401
from tests.trained import picture

FAKEVLM = GOLDENS.parent / "goldens_fakevlm"
TOKENS = 120


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory) -> Path:
    """The small fused model as a Llama and a client."""
    target = tmp_path_factory.mktemp("export") / "model"
    assert export(["--model-path", str(trained), "--save-model-path", str(target)]) == 0
    return target


@contextmanager
def engine(folder: Path, script: list[str], always: str = "good", *, tells_all: bool = True):
    """An engine that continues prompt embeddings with plain transformers, and fails as a script says.

    It tells the log-probabilities of all words, or of as many as it is asked for.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, lock = AutoTokenizer.from_pretrained(folder), threading.Lock()

    def complete(body: dict, logprobs: bool) -> dict:
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        assert embeds.ndim == 2 and embeds.shape[1] == model.config.hidden_size and body["prompt"] == ""
        ids, top = [], []
        with torch.no_grad():
            for _ in range(body["max_tokens"]):
                told = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
                logits = model(inputs_embeds=torch.cat([embeds, told])[None]).logits[0, -1]
                values, places = logits.log_softmax(-1).topk(len(logits) if tells_all else body.get("logprobs", 1))
                ids.append(int(logits.argmax()))
                top.append({f"token_id:{i}": v for i, v in zip(places.tolist(), values.tolist(), strict=True)})
                text = tokenizer.decode(ids, skip_special_tokens=True)
                if ids[-1] == model.config.eos_token_id or any(stop in text for stop in body.get("stop", [])):
                    break
        told = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [0.0] * len(ids), "top_logprobs": top}
        choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": told if logprobs else None}
        usage = {"prompt_tokens": len(embeds), "completion_tokens": len(ids), "total_tokens": 0}
        return {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                step = script.pop(0) if script else always
                good = not step.isdigit()
                content = json.dumps(complete(body, step != "no logprobs") if good else {"error": {"message": "no"}})
            self.send_response(200 if good else int(step))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2 if step == "cut" else None].encode())
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}/v1"
        opened.shutdown()


def client(written: Path, folder: Path, url: str) -> ForgeryDetector:
    shutil.copytree(written / "client", folder)
    config = json.loads((folder / "config.json").read_text())
    config["served"]["base_url"] = url
    (folder / "config.json").write_text(json.dumps(config))
    detector = ForgeryDetector.from_pretrained(folder, device="cpu")
    detector.system.answering.endpoint.first_pause = 0.01
    return detector


def test_the_llama_has_the_same_logits_from_the_same_embeddings(written, trained):
    llama = LlamaForCausalLM.from_pretrained(written / "language_model").eval()
    _, model, _, _ = load_pretrained_model(trained, device="cpu")
    ids = torch.tensor([[1, -200, 40, 50, 60]])
    pixels = process_images([picture(3)], model.image_processor, model.config)
    embeds = model.prepare_inputs_labels_for_multimodal(ids, pixels).inputs_embeds
    with torch.no_grad():
        assert (llama(inputs_embeds=embeds).logits - model(input_ids=ids, images=pixels).logits).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(written / "language_model")
    assert tokenizer("Is it real?\nSay.").input_ids == model.tokenizer("Is it real?\nSay.").input_ids


def test_a_served_model_answers_as_the_whole_one_despite_faults(written, trained, tmp_path):
    images = [picture(index) for index in range(3)]
    own = ForgeryDetector.from_pretrained(trained, device="cpu")
    wanted = list(own.analyze_many(images, max_new_tokens=TOKENS))
    with engine(written / "language_model", ["500", "good", "cut"]) as url:
        detector = client(written, tmp_path / "c", url)
        found = list(detector.analyze_many(images, max_new_tokens=TOKENS))
        alone = [r.fake_probability for r in detector.analyze_many(images, score_only=True)]
    for report, other in zip(found, wanted, strict=True):
        assert not report.error and report.text == other.text and report.label == other.label
        assert report.fake_probability == pytest.approx(other.fake_probability, abs=1e-5)
        assert report.details["score"] == "logprobs" and report.score_source == other.score_source
    expected = [r.fake_probability for r in own.analyze_many(images, score_only=True)]
    assert alone == pytest.approx(expected, abs=1e-5)
    with engine(written / "language_model", [], tells_all=False) as url:
        report = client(written, tmp_path / "d", url).analyze(images[0], max_new_tokens=TOKENS)
    if report.details["score"] == "logprobs, a bound":  # a word that is not told may have less than it is given
        assert abs(report.fake_probability - 0.5) < abs(wanted[0].fake_probability - 0.5)
    else:
        assert report.fake_probability == pytest.approx(wanted[0].fake_probability, abs=1e-5)


def test_without_logprobs_the_verdict_is_the_score_and_a_refusal_is_told(written, tmp_path):
    with engine(written / "language_model", [], always="no logprobs") as url:
        detector = client(written, tmp_path / "a", url)
        report = detector.analyze(picture(0), max_new_tokens=TOKENS)
        assert report.details["score"] == "verdict"
        assert report.fake_probability == (None if report.label is None else float(report.label == "fake"))
        assert "no log-probabilities" in detector.analyze(picture(0), score_only=True).error
    with engine(written / "language_model", [], always="422") as url:
        assert "refuses" in client(written, tmp_path / "b", url).analyze(picture(0)).error


def test_a_clip_model_opens_as_transformers_llava_with_the_same_ids_and_logits(tmp_path):
    target = tmp_path / "model"
    given = ["--model-path", str(FAKEVLM / "base"), "--system", "fakevlm", "--save-model-path", str(target)]
    assert export(given) == 0
    tokenizer, model, processor, _ = load_pretrained_model(FAKEVLM / "base", system="fakevlm", device="cpu")
    image = Image.open(sorted((FAKEVLM / "images").glob("*.png"))[0]).convert("RGB")
    theirs, words = LlavaForConditionalGeneration.from_pretrained(target).eval(), AutoTokenizer.from_pretrained(target)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?\nWhy?"}]}]
    text = words.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = words(text, add_special_tokens=False).input_ids  # engines add no mark to a chat template
    image_id = theirs.config.image_token_id
    own = tokenizer_image_token("<image>Is it?\nWhy?", tokenizer, return_tensors="pt")
    assert ids == [image_id if index < 0 else index for index in own.tolist()]
    number = theirs.config.image_seq_length
    places = [index for index in ids for _ in range(number if index == image_id else 1)]
    pixels = AutoImageProcessor.from_pretrained(target, backend="pil")(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([places]), pixel_values=pixels).logits
        wanted = model(input_ids=own[None], images=process_images([image], processor, model.config)).logits
    assert (found - wanted).abs().max() < 1e-5


def test_a_missing_image_word_is_added_and_never_the_likeliest(bundled):
    model = small_model(vocab_size=len(bundled.base[0]))
    model.tokenizer = bundled.base[0]
    before = model.lm_head.weight.clone()
    add_image_word(model)
    assert model.tokenizer.get_vocab()["<image>"] == model.config.vocab_size - 1 == len(before)
    states = torch.randn(50, before.shape[1])
    assert torch.equal(model.lm_head(states).argmax(-1), (states @ before.T).argmax(-1))


def test_names_and_shapes_at_the_published_size(published_13b):  # noqa: F811
    config = published_13b.config
    with torch.device("meta"):
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        llama = LlamaForCausalLM(LlamaForCausalLM.config_class(**{name: getattr(config, name) for name in fields}))
    found = llama_tensors(stored_state_dict(published_13b), config.tie_word_embeddings)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in llama.state_dict().items()}


def test_what_cannot_be_exported_is_refused(written, trained, tmp_path, capsys):
    target = str(tmp_path / "x")
    assert export(["--model-path", str(trained), "--save-model-path", str(written)]) == 1
    assert export(["--model-path", str(trained), "--save-model-path", target, "--form", "llava"]) == 1
    assert export(["--model-path", str(written / "client"), "--save-model-path", target]) == 1
    said = capsys.readouterr().err
    assert "is not empty" in said and "use --form llama" in said and "is the client of" in said
    quantised = tmp_path / "quantised"
    shutil.copytree(trained, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert export(["--model-path", str(quantised), "--save-model-path", target]) == 1
    assert "quantised already" in capsys.readouterr().err and not Path(target).exists()


def test_an_explainer_whose_tokenizer_lacks_the_image_word_is_written(tmp_path):
    shield = GOLDENS.parent / "goldens_fakeshield"
    prefix = "model.vision_tower.vision_tower."
    shutil.copytree(shield / "clip", tmp_path / "clip")
    own = {n.removeprefix(prefix): t[...] for n, t in read_tensors(shield / "DTE-FDM").items() if n.startswith(prefix)}
    save_file(own, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    given = ["--model-path", str(shield / "DTE-FDM"), "--system", "fakeshield", "--dtype", "float32"]
    target = tmp_path / "model"
    assert export([*given, "--vision-tower", str(tmp_path / "clip"), "--save-model-path", str(target)]) == 0
    theirs, words = LlavaForConditionalGeneration.from_pretrained(target).eval(), AutoTokenizer.from_pretrained(target)
    options = {"system": "fakeshield", "device": "cpu", "dtype": "float32", "vision_tower": tmp_path / "clip"}
    tokenizer, model, _, _ = load_pretrained_model(shield / "DTE-FDM", **options)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    text = words.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids, image_id = words(text, add_special_tokens=False).input_ids, theirs.config.image_token_id
    asked = tokenizer_image_token(fill_conversation("llava_v1", "Is it?"), tokenizer, return_tensors="pt")
    assert ids == [image_id if index < 0 else index for index in asked.tolist()]
    number, side = theirs.config.image_seq_length, model.config.pixel_format()["size"]
    places = [index for index in ids for _ in range(number if index == image_id else 1)]
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([places]), pixel_values=pixels).logits
        wanted = model(input_ids=asked[None], images=pixels).logits
    assert (found[..., : wanted.shape[-1]] - wanted).abs().max() < 1e-5
