"""What is said of an installation, and what is called broken."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava import assets, doctor

ROOT = Path(__file__).parents[1]


def distribution(folder: Path, name: str, module: str) -> None:
    """An installed package that brings a module."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text("")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{module}\n")


def test_a_whole_installation_has_no_problems(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("problems\n  none")
    for word in ("python", "torch", "cpu: ", "bfloat16", "fakereasoning", str(assets.DEMO_MODEL)):
        assert word in text


def test_json_has_the_same(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["versions"]["torch"] and found["devices"]
    assert found["package"]["imported"] == str(Path(llava.__file__).parent)
    assert found["systems"]["fakereasoning"] == "FakeReasoning, built in"
    assert found["weights"]["AnnaGao/FakeReasoning"] is None


def test_each_extra_of_the_package_is_known():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
    assert set(doctor.EXTRAS) == {line.split(" = ")[0] for line in section.splitlines()}


def test_an_extra_that_lacks_a_package_says_how_to_get_it(monkeypatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "timm" else installed(name))
    found = doctor.examine()
    assert found.extras["timm"]["missing"] == ["timm"]
    assert "lacks timm: pip install 'fakereasoning[timm]'" in doctor.describe(found)
    assert found.problems == []


def test_a_needed_package_that_is_missing_or_old_is_a_problem(monkeypatch, capsys):
    installed = doctor._installed
    wrong = {"peft": None, "pillow": "9.0"}
    monkeypatch.setattr(doctor, "_installed", lambda name: wrong.get(name, "") if name in wrong else installed(name))
    assert doctor.main([]) == 1
    problems = capsys.readouterr().out.split("problems\n")[1]
    assert re.search(r"peft is not installed: pip install 'peft>=", problems)
    assert re.search(r"pillow is 9\.0, but is needed as pillow<13,>=11", problems)


def test_another_package_of_that_name_is_a_problem(tmp_path, monkeypatch):
    distribution(tmp_path, "rival", "llava")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor.examine()
    assert found.package["distributions"] == ["rival"]
    assert found.package["others"][0] == str(tmp_path / "llava")
    assert len(found.problems) == 1 and "pip uninstall rival" in found.problems[0]
    assert f"another llava, not imported: {tmp_path / 'llava'}" in doctor.describe(found)


def test_a_system_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    from llava.systems import registry

    distribution(tmp_path, "guest", "guest_system")
    (tmp_path / "guest-1.0.dist-info" / "entry_points.txt").write_text("[llava.systems]\nguest = guest_system:SPEC\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.specs.cache_clear()
    found = doctor.examine()
    registry.specs.cache_clear()
    assert len(found.problems) == 1 and "'guest'" in found.problems[0]


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "DEMO_MODEL", tmp_path)
    monkeypatch.setenv("DINO_WEIGHT", str(tmp_path / "dino.pth"))
    found = doctor.examine()
    assert found.weights["embedded model"] is None and found.weights["DINO_WEIGHT"] is None
    assert len(found.problems) == 2


def test_weights_in_the_cache_of_the_hub_are_found(tmp_path):
    repository = tmp_path / "models--AnnaGao--FakeReasoning"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    code = "from llava import doctor; print(doctor._cached('AnnaGao/FakeReasoning'))"
    environment = {"HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_a_torch_that_cannot_be_imported_is_a_problem(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise error("libcudart is missing")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    found = doctor.Examination()
    doctor._look_at_devices(found)
    assert found.devices == [] and found.problems == ["torch cannot be imported: libcudart is missing"]


def test_its_help_loads_no_torch():
    code = (
        "import sys, llava.doctor as d\ntry: d.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
