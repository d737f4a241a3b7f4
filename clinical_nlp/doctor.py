"""What this machine can do, found by trying it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "absent", "warning", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `absent` is something that is optional; `broken` is something that the package needs."""

    what: str
    state: State
    detail: str


def examine() -> list[Finding]:
    """Make every check; one that fails unexpectedly is itself a finding."""
    findings = []
    for check in (_python, _versions, _memory, _disk, _gpu, _bf16, _four_bit, _offline, _tiny, _spark, _data):
        try:
            findings.append(check())
        except Exception as error:  # a check must not hide the others
            findings.append(Finding(check.__name__.strip("_"), "broken", f"the check failed ({type(error).__name__})"))
    return findings


def _python() -> Finding:
    state: State = "ok" if sys.version_info >= (3, 11) else "broken"
    return Finding("python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _versions() -> Finding:
    """Compare what is installed with what the package's metadata asks for."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for line in importlib.metadata.requires("clinical_nlp") or []:
        requirement = Requirement(line)
        if "extra" in str(requirement.marker) or (requirement.marker and not requirement.marker.evaluate()):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding("packages", "broken", "; ".join(wrong) + "; run pip install -e . again")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return Finding("packages", "ok", f"{count} requirements met; {shown}")


def _memory() -> Finding:
    from clinical_nlp.runs import hardware

    found = hardware()
    available = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (line := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        available = int(line.group(1)) / 2**20
    detail = f"{found['cores']} cores, {found.get('memory_gib', '?')} GiB"
    if available is not None:
        detail += f", {available:.1f} GiB free"
    state: State = "warning" if available is not None and available < 4 else "ok"
    return Finding("memory", state, detail + ("; the demo wants 4 GiB free" if state == "warning" else ""))


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    state: State = "ok" if free >= 2 else "warning"
    return Finding("disk", state, f"{free:.1f} GiB free here" + ("" if free >= 2 else "; a run wants 2 GiB"))


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "absent", "none that torch can use; small models train on the processor, slowly")
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)")
    return Finding("gpu", "ok", ", ".join(names))


def _bf16() -> Finding:
    import torch

    if torch.cuda.is_available():
        able = torch.cuda.is_bf16_supported()
        return Finding("bf16", "ok" if able else "absent", "on the GPU" if able else "not on this GPU; fp32 is used")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    return Finding("bf16", "ok" if fast else "absent", "on the processor" if fast else "slow on this processor")


def _four_bit() -> Finding:
    """Quantise a small layer and push a vector through it."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return Finding("4-bit", "absent", "bitsandbytes is not on this platform; use lora instead of qlora")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
    result = layer(torch.ones(1, 64, device=device))
    if not bool(torch.isfinite(result).all()):
        return Finding("4-bit", "broken", f"NF4 on {device} gives numbers that are not finite")
    trap = bool(getattr(layer, "support_avx512bf16_for_cpu", False))
    guard = "; its CPU repacking is switched off at loading, since it spoils gradients" if trap else ""
    return Finding("4-bit", "ok", f"bitsandbytes {importlib.metadata.version('bitsandbytes')}, NF4 on {device}{guard}")


def _offline() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    detail = "on: no hub is asked" if offline else "off: a hub id may be fetched"
    return Finding("offline", "ok" if offline else "warning", detail)


def _tiny() -> Finding:
    from clinical_nlp.errors import ClinicalNlpError
    from clinical_nlp.models.loading import load_base

    try:
        base = load_base("builtin:tiny", kind="causal")
    except ClinicalNlpError as error:
        return Finding("builtin:tiny", "broken", str(error))
    count = sum(parameter.numel() for parameter in base.network.parameters())
    return Finding("builtin:tiny", "ok", f"{count / 1e6:.1f} M parameters, {len(base.tokenizer)} tokens")


def _spark() -> Finding:
    try:
        version = importlib.metadata.version("pyspark")
    except importlib.metadata.PackageNotFoundError:
        return Finding("spark", "absent", "pyspark is not installed (pip install clinical_nlp[spark])")
    java = shutil.which("java") or os.environ.get("JAVA_HOME")
    return Finding(
        "spark", "ok" if java else "absent", f"pyspark {version}, " + (f"java at {java}" if java else "no java")
    )


def _data() -> Finding:
    folder = os.environ.get("CLINICAL_NLP_DATA")
    if not folder:
        return Finding("corpora", "absent", "CLINICAL_NLP_DATA is not set; name corpora by --corpus.path")
    if not Path(folder).is_dir():
        return Finding("corpora", "warning", f"CLINICAL_NLP_DATA={folder} is no folder")
    return Finding("corpora", "ok", f"CLINICAL_NLP_DATA={folder}")
