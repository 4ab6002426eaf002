"""The machine in words, for reports."""

import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, object]:
    """{"cpu", "threads", "torch", "python", "device"}."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "device": name}
