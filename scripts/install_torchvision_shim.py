"""Makes a CUDA build of torchvision importable beside a CPU build of torch, in the running environment.

Where no CPU build of torchvision is to be had, its CUDA build can still serve its Python parts (timm needs those), but
its import stops at operators that its compiled library did not register, and takes transformers with it. This declares
those operators just before torchvision is first imported. With a CUDA build of torch nothing is installed.
"""

import sysconfig
from importlib.util import find_spec
from pathlib import Path

MODULE = "_torchvision_cpu_shim"
SOURCE = '''\
"""Declares operators that torchvision expects, when it is first imported beside a CPU build of torch."""

import sys
from importlib.abc import MetaPathFinder


class _Shim(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for operator in ("nms", "qnms"):
                    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", signature)
        return None


sys.meta_path.insert(0, _Shim())
'''


def main() -> None:
    """Writes the shim into the environment's site-packages if it is needed."""
    import torch

    if torch.version.cuda is not None or find_spec("torchvision") is None:
        print("torchvision needs no shim here")
        return
    site_packages = Path(sysconfig.get_path("purelib"))
    (site_packages / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    (site_packages / f"{MODULE}.pth").write_text(f"import {MODULE}\n", encoding="utf-8")
    print(f"torchvision shim installed in {site_packages}")


if __name__ == "__main__":
    main()
