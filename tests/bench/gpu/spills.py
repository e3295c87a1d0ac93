#!/usr/bin/env python3
"""Compiles every .cu file of a build once more with ptxas talking, and exits with 1 when a kernel spills registers.

    spills.py build-cuda/compile_commands.json
"""
import json
import re
import shlex
import subprocess
import sys


def main():
    entries = [e for e in json.load(open(sys.argv[1])) if e["file"].endswith(".cu")]
    if not entries:
        sys.exit(f"spills: {sys.argv[1]} has no .cu file: a build without MOEGRAFT_CUDA")
    kernels = spilled = 0
    for entry in entries:
        words = shlex.split(entry["command"])
        words[words.index("-o") + 1] = "/dev/null"
        text = subprocess.run([*words, "-Xptxas", "-v"], cwd=entry["directory"], capture_output=True, text=True, check=True).stderr
        name = ""
        for line in text.splitlines():
            if found := re.search(r"Function properties for (\S+)|Compiling entry function '(\S+)'", line):
                name = found.group(1) or found.group(2)
            if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                kernels += 1
                if found.group(1) != "0" or found.group(2) != "0":
                    spilled += 1
                    print(f"spills: {name}: {found.group(0)}", file=sys.stderr)
    print(f"   {kernels} kernels in {len(entries)} files, {spilled} spill")
    sys.exit(1 if spilled or not kernels else 0)


if __name__ == "__main__":
    main()
