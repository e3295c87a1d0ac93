#!/usr/bin/env python3
"""What nvcc makes of the device code for sm_90: nothing spilled, no local memory, and kernels that move eight elements together (V = 8) read and write 16 bytes at a time.

    check_ptx.py --nvcc /usr/local/cuda/bin/nvcc -I src -I <site-packages>/torch/include FILE.cu …

Exit code 77: nothing was checked, and why.
"""
import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile

ALWAYS_PACKED = {"CrossEntropyRow"}  # without a parameter V
# Stores of fewer than 16 bytes that such kernels have besides their rows.
SMALL_STORES = {"RmsNormForward": "rstd", "SwigluBackward": "dot", "CrossEntropyRow": "nll, and the ends of rows that start or stop off 16 bytes"}
# Loads of fewer than 32 bits.
NARROW_LOADS = {"CrossEntropyRow": "the ends of rows, and the target's logit"}


def readable(names):
    """Mangled names -> the functors that they run, as the sources write them: RmsNormForward<float, bf16, float, 8>."""
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"\(.*|(\w+::)+|^void ", "", p).replace("BFloat16", "bf16") for p in plain]
    return dict(zip(names, [re.sub(r"^(?:row|thread)_kernel<(.*?)(?:, \d+)? *>$", r"\1", s) for s in short]))


def compile_file(nvcc, includes, source, folder):
    command = [nvcc, "-cubin", "-arch=sm_90", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
    command += [part for i in includes for part in ("-isystem" if "torch" in i else "-I", i)] + ["-o", os.path.join(folder, "kernels.cubin"), source]
    run = subprocess.run(command, capture_output=True, text=True)
    log = run.stdout + run.stderr
    if run.returncode:
        sys.exit(f"{source} does not compile:\n{log}")
    ptx = [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".ptx")]
    return log, open(ptx[0]).read()


def resources(log):
    """Per kernel: bytes of stack, of spilled stores and loads, and registers."""
    found = re.findall(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers", log)
    return {name: tuple(map(int, numbers)) for name, *numbers in found}


def accesses(ptx):
    """Per kernel: [(ld or st, bytes of an element, elements)] of global memory, in the order of the code."""
    result = {}
    for name, body in re.findall(r"\.entry (\w+)\((.*?)^\}", ptx, re.S | re.M):
        result[name] = [
            (kind, int(bits) // 8, int(vector or 1))
            for kind, space, vector, bits in re.findall(r"^\s*(?:@!?%p\d+ )?(ld|st)((?:\.(?!v[24]|[busf]\d)\w+(?:::\w+)*)*)(?:\.v([24]))?\.[busf](\d+)\s", body, re.M)
            if not re.search(r"\.(param|shared|local|const)", space)
        ]
    return result


def faults_of(log, ptx):
    faults, used, reached = [], resources(log), accesses(ptx)
    if not used or set(used) != set(reached):
        return [f"ptxas names {len(used)} kernels, the PTX {len(reached)}"], used
    names = readable(list(used))
    for name, (stack, stores, loads, _) in used.items():
        if stack or stores or loads:
            faults.append(f"{names[name]}: {stack} bytes of local memory, {stores} + {loads} bytes spilled")
    for name, list_ in reached.items():
        kind = names[name].split("<")[0]
        if not names[name].endswith(", 8>") and kind not in ALWAYS_PACKED:
            continue
        count = collections.Counter((what, size * n) for what, size, n in list_)
        for what in ("ld", "st"):
            if not count[what, 16]:
                faults.append(f"{names[name]}: no {what} of 16 bytes")
        small = sorted((size, n) for (what, size), n in count.items() if what == "st" and size < 16)
        if small and kind not in SMALL_STORES:
            faults.append(f"{names[name]}: stores of fewer than 16 bytes: " + ", ".join(f"{n} of {size}" for size, n in small))
        narrow = [size for what, size, n in list_ if what == "ld" and size < 4]
        if narrow and kind not in NARROW_LOADS:
            faults.append(f"{names[name]}: {len(narrow)} loads of fewer than 4 bytes an element")
    return faults, used


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="")
    parser.add_argument("-I", dest="includes", action="append", default=[])
    parser.add_argument("sources", nargs="+")
    options = parser.parse_args()
    if not os.path.exists(options.nvcc):
        print("skipped: no nvcc (set CUDACXX, or tools/setup.sh --cuda)")
        sys.exit(77)
    if not any(os.path.exists(os.path.join(i, "c10/cuda/CUDAException.h")) for i in options.includes):
        print("skipped: this LibTorch has no CUDA headers")
        sys.exit(77)

    def check(source):
        with tempfile.TemporaryDirectory() as folder:
            return faults_of(*compile_file(options.nvcc, options.includes, source, folder))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(check, options.sources))
    faults = []
    for source, (found, used) in zip(options.sources, results):
        most = max((registers for *_, registers in used.values()), default=0)
        print(f"{source}: {len(used)} kernels, at most {most} registers, {len(found)} faults")
        faults += found
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
