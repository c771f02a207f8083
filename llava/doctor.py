"""Says what is installed and found here: versions, devices, extras, systems, weights, and packages in the way.

Exit status: 0 all that is needed works, 1 something is broken; what is broken stands at the end.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llava
from llava.assets import DEMO_MODEL, demo_model_folder
from llava.cli import OptionParser, run_cli
from llava.errors import OptionError
from llava.systems import registry

EXTRAS = {
    "train": "training on several GPUs with DeepSpeed",
    "eval": "metrics of texts, curves and tables of an evaluation",
    "synthetic": "rendering MMFR-Synthetic, and its baselines",
    "video": "frames in HDF5 packs",
    "captions": "BLEU, ROUGE-L and CIDEr as some authors compute them",
    "serve": "the server and its page, and C2PA manifests",
    "cluster": "several processes of the server behind one port",
    "endpoint": "evaluating models behind OpenAI-compatible endpoints",
    "annotate": "annotation by an API, and the published data set",
    "quant": "models in 8 or 4 bits",
    "flash": "flash attention on CUDA devices",
    "timm": "vision transformers of timm as second branch",
    "dev": "style, types and tests",
    "test-serve": "tests of the server and its page",
}
"""What each extra of the package brings."""
_IMPORTANT = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy", "pillow")


@dataclass
class Examination:
    """What was found.

    Attributes:
        versions: Version of Python, of this package, and of each package that it needs; None for one that is missing.
        devices: What torch can compute on.
        extras: For each extra what it brings, which packages it lacks, and the command that installs them.
        systems: Title of each system, and where it comes from.
        weights: Where weights lie: the embedded model, and published ones in the hub's cache; None if not here.
        package: The imported ``llava``, and others that could be imported instead.
        problems: What is broken, and what to do; empty if all is well.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    systems: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str | None] = field(default_factory=dict)
    package: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine() -> Examination:
    """Looks at everything; what is broken becomes a problem, not an exception."""
    found = Examination()
    for look in (_look_at_versions, _look_at_devices, _look_at_extras, _look_at_systems, _look_at_package):
        look(found)
    return found


# --- versions and extras


def _requirements() -> Iterator[Any]:
    """Yields the package's requirements, with their markers; none if it is not installed."""
    from packaging.requirements import Requirement

    try:
        yield from map(Requirement, metadata.requires(llava.DISTRIBUTION) or ())
    except metadata.PackageNotFoundError:
        return


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Any, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _look_at_versions(found: Examination) -> None:
    found.versions = {"python": platform.python_version(), llava.DISTRIBUTION: _installed(llava.DISTRIBUTION)}
    if found.versions[llava.DISTRIBUTION] is None:
        found.problems.append(f"{llava.DISTRIBUTION} is not installed, only imported: pip install -e . in its folder")
    needed = {requirement.name: requirement for requirement in _requirements() if _applies(requirement, "")}
    for name in dict.fromkeys((*_IMPORTANT, *needed)):
        version = found.versions[name] = _installed(name)
        requirement = needed.get(name)
        if version is None:
            found.problems.append(f"{name} is not installed: pip install '{requirement or name}'")
        elif requirement and not requirement.specifier.contains(version, prereleases=True):
            found.problems.append(f"{name} is {version}, but is needed as {requirement}: pip install '{requirement}'")


def _look_at_extras(found: Examination) -> None:
    requirements, modules = list(_requirements()), metadata.packages_distributions()
    for extra, brings in EXTRAS.items():
        own = [item for item in requirements if _applies(item, extra) and not _applies(item, "")]
        missing = [item.name for item in own if not _is_importable(item.name, modules)]
        command = f"pip install '{llava.DISTRIBUTION}[{extra}]'" if missing or not own else None
        found.extras[extra] = {"brings": brings, "missing": missing, "install": command}


def _is_importable(name: str, modules: Mapping[str, Sequence[str]]) -> bool:
    """Whether a distribution is installed and its modules are where they should be; imports none of them.

    Args:
        name: The distribution.
        modules: Which distributions bring each top-level module.
    """
    own = [module for module, owners in modules.items() if name in owners and module.isidentifier()]
    return _installed(name) is not None and all(find_spec(module) is not None for module in own)


# --- devices


def _look_at_devices(found: Examination) -> None:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing
        found.problems.append(f"torch cannot be imported: {error}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        with torch.cuda.device(index):
            bf16 = _yes(torch.cuda.is_bf16_supported(including_emulation=False))
        found.devices.append(f"cuda:{index}: {properties.name}, {memory}, CUDA {torch.version.cuda}, bfloat16 {bf16}")
    if torch.backends.mps.is_available():
        found.devices.append(f"mps: bfloat16 {_yes(_multiplies_bf16('mps'))}")
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = _yes(_multiplies_bf16("cpu"))
    found.devices.append(f"cpu: {torch.get_num_threads()} threads, {capability}, bfloat16 {bf16}")


def _multiplies_bf16(device: str) -> bool:
    import torch

    try:
        matrix = torch.eye(2, dtype=torch.bfloat16, device=device)
        return bool((matrix @ matrix == matrix).all())
    except (RuntimeError, TypeError):  # what torch raises for a type that a device does not have
        return False


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# --- systems and weights


def _look_at_systems(found: Examination) -> None:
    weights: list[str] = []
    try:
        for name, spec in registry.specs().items():
            module = spec.identify.__module__
            origin = "built in" if module.startswith("llava.") else f"from {module}"
            found.systems[name] = f"{spec.title}, {origin}"
            weights += spec.weights
    except OptionError as error:  # an installed system that cannot be imported
        found.problems.append(str(error))
    embedded = demo_model_folder()
    found.weights["embedded model"] = None if embedded is None else str(embedded)
    if embedded is None:
        found.problems.append(f"the embedded model is missing: {DEMO_MODEL} is not there; install the package again")
    for hub_id in dict.fromkeys(weights):
        found.weights[hub_id] = _cached(hub_id)
    if os.environ.get("DINO_WEIGHT"):
        path = Path(os.environ["DINO_WEIGHT"]).expanduser()
        found.weights["DINO_WEIGHT"] = str(path) if path.exists() else None
        if not path.exists():
            found.problems.append(f"the environment variable DINO_WEIGHT names {path}, which is not there")


def _cached(hub_id: str) -> str | None:
    """Returns the folder of the hub's cache that holds a repository's config; None if it was not fetched."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(hub_id, "config.json")
    return str(Path(file).parent) if isinstance(file, str) else None


# --- the package itself


def _look_at_package(found: Examination) -> None:
    imported = Path(llava.__file__).parent
    places = [Path(entry or ".").resolve() for entry in sys.path]
    others = [place / "llava" for place in dict.fromkeys(places) if (place / "llava" / "__init__.py").is_file()]
    others = [other for other in others if other.resolve() != imported.resolve()]
    owners = sorted(set(metadata.packages_distributions().get("llava", ())) - {llava.DISTRIBUTION})
    found.package = {"imported": str(imported), "others": [str(other) for other in others], "distributions": owners}
    for owner in owners:
        found.problems.append(
            f"the installed package {owner} brings a llava of its own, which can be imported instead of this one: "
            f"pip uninstall {owner}, or install {llava.DISTRIBUTION} into an environment of its own"
        )


# --- the command


def describe(found: Examination) -> str:
    """Returns it for reading."""
    sections: list[tuple[str, list[str]]] = [
        ("versions", [f"{name:<18}{version or 'not installed'}" for name, version in found.versions.items()]),
        ("devices", found.devices or ["none"]),
        ("extras", [_describe_extra(name, extra) for name, extra in found.extras.items()]),
        ("systems", [f"{name:<18}{text}" for name, text in found.systems.items()]),
        ("weights", [f"{name:<36}{place or 'not here'}" for name, place in found.weights.items()]),
        ("package", [f"llava is imported from {found.package['imported']}"]),
    ]
    sections[-1][1].extend(f"another llava, not imported: {other}" for other in found.package["others"])
    sections.append(("problems", found.problems or ["none"]))
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _describe_extra(name: str, extra: dict[str, Any]) -> str:
    lacks = f"lacks {', '.join(extra['missing'])}: {extra['install']}" if extra["install"] else "installed"
    return f"{name:<12}{extra['brings']}; {lacks}"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parsed = build_parser().parse_args(arguments)

    def run() -> int:
        found = examine()
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False) if parsed.json else describe(found))
        return 1 if found.problems else 0

    return run_cli(run)
