"""What the drivers of the benchmarks share: this machine by name, instruction sets, and running a command while watching it from outside."""
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
FEATURES = "avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 asimd bf16 sve".split()
# What holds each side to an instruction set: our own switch, and those of the libraries under both LibTorch and the peer.
ISAS = {
    "avx512_bf16": ("AVX512_CORE_BF16", "avx512", "AVX512"),
    "avx512": ("AVX512_CORE", "avx512", "AVX512"),
    "avx2": ("AVX2", "avx2", "AVX2"),
}


def log(*words):
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def isa_environment(isa):
    if not isa:
        return {}
    onednn, aten, mkl = ISAS[isa]
    return {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl}


def spell(command, environment):
    return "".join(f"{k}={shlex.quote(v)} " for k, v in environment.items()) + shlex.join(command)


def run(command, outside=None, environment=None):
    """A command's JSON; `outside` collects what this process sees of it: wall seconds, seconds between the lines that tell of its steps, and peak resident MiB
    as the kernel counts it."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, **(environment or {})})
        errors, steps = [], []
        for line in child.stderr:
            if re.match(rb"step \d+ of \d+:", line):
                steps.append(time.perf_counter())
            errors.append(line.decode(errors="replace"))
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if child.returncode != 0:
        raise RuntimeError(f"{spell(command, environment or {})} ended with {child.returncode}: {''.join(errors).strip()[-800:]}")
    if outside is not None:
        outside.append({"wall_s": wall, "max_rss_mib": usage.ru_maxrss / 1024, "cpu_s": usage.ru_utime + usage.ru_stime, "step_s": [b - a for a, b in zip(steps, steps[1:])]})
    return json.loads(text.strip().splitlines()[-1])


def hardware():
    text = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout

    def lscpu(key):
        found = re.search(rf"^\s*{key}:\s*(.+)$", text, re.M)
        return found.group(1).strip() if found else ""

    name, family, model = lscpu("Model name") or platform.machine(), lscpu("CPU family"), lscpu("Model")
    # "AMD EPYC", "Intel(R) Xeon(R) Processor @ 2.30GHz": what a virtual machine shows of very different processors.
    if family and not re.search(r"\d", name.split("@")[0]):
        name += f" (family {family} model {model})"
    flags = set(lscpu("Flags").split())
    return {"cpu": name, "cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0)), "features": [f for f in FEATURES if f in flags], "l2": lscpu("L2 cache"), "l3": lscpu("L3 cache"),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), "system": platform.platform()}


def gpu():
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def ask_python(python, code, environment=None):
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE), **(environment or {})}).stdout


def read_gbytes(python, device):
    """GB/s at which all cores, or the GPU, read memory."""
    code = f"import time, torch\nx = torch.ones(1 << 14, 1 << 14, device='{device}')\nv = x[0].clone()\nt = []\nfor _ in range(6):\n    s = time.perf_counter(); (x @ v)[0].item(); t.append(time.perf_counter() - s)\nprint(x.nbytes / min(t) / 1e9)"
    return float(ask_python(python, code))


def versions(python):
    return json.loads(ask_python(python, "import json,torch,transformers,peft,platform;print(json.dumps(dict(python=platform.python_version(),torch=torch.__version__,transformers=transformers.__version__,peft=peft.__version__)))"))


def commit():
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
