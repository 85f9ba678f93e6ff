"""What of the kernels works on this machine, and why the rest does not.

python -m aepo_kernels.doctor
"""

from __future__ import annotations

import platform

import torch

from aepo_kernels import __version__, backend_status, multiplies_bfloat16, row_kernels, versions
from aepo_kernels.self_check import difference


def report(name: str = "aepo-kernels") -> str:
    """The report as text; name: what its first line calls the program."""
    lines = [f"{name} {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += ["", "devices"]
    lines += [
        f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            lines.append(f"  cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        lines.append("  cuda: torch sees no device")
    lines += ["", "kernel backends"]
    for backend, reason in backend_status().items():
        lines.append(f"  {backend}: {'works' if reason is None else reason}")
    lines.append(f"  rows of chunked: {row_kernels(device)}")
    fast = multiplies_bfloat16(device)
    lines.append(f"  bfloat16 GEMMs: {'works' if fast else 'as float32, for want of instructions'}")
    wrong = difference(torch.device(device), torch.float32)
    lines.append(f"  beside plain torch: {wrong or 'the same loss and gradients'}")
    lines += ["", "versions"]
    for name, tested in versions.TESTED.items():
        found = versions.installed_version(name) or "not installed"
        lines.append(f"  {name}: {found} (tested: {' to '.join(tested)})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
