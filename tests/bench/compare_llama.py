"""Generation beside llama.cpp on the same weights; run by compare.py --only llama.

The checkpoint is in bfloat16. First the logits: llama.cpp on a float32 file of it must agree with `moegraft logits` in float32, or nothing is timed; what
the bf16 and Q8_0 files differ by is reported beside the figures.
"""
import json
import os
import subprocess
from pathlib import Path

from machine import HERE, ROOT, ask_python, log, run

TYPES = ["bf16", "q8_0"]
# Relative error of a position's logits. Float32: sums in another order. The others: their own rounding of weights and activations and the experts that it
# swaps, which is no error of the converter; a wrong tensor gives about 1.
LARGEST_ERROR = {"f32": 1e-5, "bf16": 0.1, "q8_0": 0.3}
CHECKED = (2, 48)


def gguf(comparison, model, kind):
    path = Path(f"{model}-{kind}.gguf")
    if not (ROOT / path).exists():
        log(f"making {path}")
        subprocess.run([comparison.args.llama_python, str(HERE / "to_gguf.py"), model, str(path), "--type", kind], check=True, cwd=ROOT, capture_output=True, text=True)
    return str(path)


def llama(comparison, file, *options):
    return [comparison.args.llama_python, str(HERE / "peer_llama.py"), file, *options, *(["--threads", str(comparison.args.threads)] if comparison.args.threads else [])]


def check(comparison, shape, model):
    """{what computed: how far its logits are from ours in float32}; None when they are not the same model."""
    ids, wanted, rounded, errors = comparison.ids(model, *CHECKED), f"{model}-logits.safetensors", f"{model}-logits-bf16.safetensors", {}
    ours = lambda dtype, out, quantize="none": subprocess.run([comparison.args.binary, "logits", model, "--ids", ids, "--dtype", dtype, "--quantize", quantize, "-o", out], check=True, cwd=ROOT, capture_output=True, text=True)
    ours("float32", wanted)
    code = "import json; from safetensors.torch import load_file\na, b = (load_file(f)['logits'].double() for f in (%r, %r))\nprint(json.dumps({'relative_error': ((a - b).norm(dim=-1) / a.norm(dim=-1)).median().item(), 'same_likeliest': (a.argmax(-1) == b.argmax(-1)).double().mean().item()}))"
    for name, quantize in (("ours_bf16", "none"), ("ours_q8_0", "q8_0")):
        ours("bfloat16", rounded, quantize)
        errors[name] = json.loads(ask_python(comparison.python, code % (wanted, rounded)))
    for kind in ["f32", *TYPES]:
        file = gguf(comparison, model, kind)
        errors[kind] = run(llama(comparison, file, "--ids", ids, "--check", wanted, *(["--exact"] if kind == "f32" else [])))
        log(f"  logits of {kind}: differ by {errors[kind]['relative_error']:.1e}, {100 * errors[kind]['same_likeliest']:.0f} % of likeliest tokens the same")
        if kind == "f32":
            os.unlink(ROOT / file)
        if not errors[kind]["relative_error"] <= LARGEST_ERROR[kind]:
            comparison.result["failures"].append(f"{shape}: llama.cpp's {kind} logits differ from ours by {errors[kind]['relative_error']:.2e} of their size (at most {LARGEST_ERROR[kind]:.0e})")
            return None
    for file in (wanted, rounded):
        os.unlink(ROOT / file)
    return errors


def case(comparison, shape, model, errors, batch, prompt, tokens):
    ids = comparison.ids(model, batch, prompt)
    common = ["--ids", ids, "--tokens", str(tokens), "--rounds", "2"]
    commands = {dtype: comparison.ours("generate", model, *common, "--pictures", str(batch), "--rank", str(comparison.args.rank), "--dtype", dtype) for dtype in ("float32", "bfloat16")}
    commands["quantised"] = comparison.ours("generate", model, *common, "--pictures", str(batch), "--rank", str(comparison.args.rank), "--dtype", "bfloat16", "--quantize", "q8_0")
    commands |= {kind: llama(comparison, gguf(comparison, model, kind), *common) for kind in TYPES}
    log("llama", shape, f"{batch}×{prompt}+{tokens}")
    runs = comparison.alternate(commands)
    figures = {}
    for name, (inside, outside) in runs.items():
        figures[name] = {key: max(r[key] for r in inside) for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "image_tokens_per_s") if key in inside[0]}
        figures[name] |= {"peak_mib": comparison.memory(inside, outside), **comparison.path(inside[0]), "seconds": [{key: r[key] for key in ("prefill_s", "decode_s", "image_decode_s") if key in r} for r in inside]}
    texts = {name: inside[0]["ids"] for name, (inside, _) in runs.items()}
    same = {name: sum(x == y for a, b in zip(texts["float32"], texts[name]) for x, y in zip(a, b)) / (batch * tokens) for name in texts}
    label = f"{shape} {batch}×{prompt}+{tokens}" + (f", {comparison.args.isa}" if comparison.args.isa else "")
    comparison.check_path(label, runs["bfloat16"][0][0])
    comparison.result["llama"].append({"label": label, "shape": shape, "batch": batch, "prompt": prompt, "tokens": tokens, "figures": figures, "logits": errors, "same_tokens": same, "commands": comparison.spell(commands)})
    for what, ours, theirs in (("bf16 beside bf16", "bfloat16", "bf16"), ("Q8_0 beside Q8_0", "quantised", "q8_0")):
        log(f"  {what}: " + ", ".join(f"{key} {figures[ours][key + '_tokens_per_s'] / figures[theirs][key + '_tokens_per_s']:.2f}" for key in ("prefill", "decode")))
    comparison.save()


def compare(comparison, shapes, quick):
    python = comparison.args.llama_python
    probe = "import json, gguf, safetensors, llama_cpp; print(json.dumps([llama_cpp.__version__, llama_cpp.llama_print_system_info().decode()]))"
    try:
        version, system = json.loads(subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{python} has no llama-cpp-python, gguf or safetensors (tests/bench/README.md says how to make one): {getattr(error, 'stderr', None) or error}") from error
    if comparison.args.isa == "avx2" and "AVX512 = 1" in system:
        raise RuntimeError(f"{python}: this llama.cpp was built with AVX-512; for --isa avx2 give --llama-python one that was built without")
    comparison.result["llama_version"], comparison.result["llama_system"] = version, system
    for shape in shapes:
        model = comparison.checkpoint(shape, "bfloat16")
        if errors := check(comparison, shape, model):
            for batch, prompt, tokens in [(1, 128, 16)] if quick else [(1, 512, 64), (16, 32, 32)]:
                case(comparison, shape, model, errors, batch, prompt, tokens)


def section(r):
    """Markdown, for docs/performance.md too."""
    from report import table

    ran = {d: c["figures"][d].get("cpu", {}).get(d, "not said") for c in r["llama"] for d in ("float32", "bfloat16")}
    text = [f"llama-cpp-python {r['llama_version']} ({r['llama_system'].strip(' |')}); keys and values in float16 and attention as it comes. moegraft's kernels: {', '.join(f'{d} {k}' for d, k in ran.items())}. "
            f"{r['hardware']['usable_cores']} threads; the best of {2 * r['rounds']} times, processes by turns.\n"]
    rows, errors = [], []
    for c in r["llama"]:
        f = c["figures"]
        for what, key, theirs in (("prefill", "prefill", "prefill"), ("decode", "decode", "decode"), ("image codes", "image", "decode")):
            ours, peers = [f[d][key + "_tokens_per_s"] for d in ("float32", "bfloat16", "quantised")], [f[t][theirs + "_tokens_per_s"] for t in TYPES]
            rows.append([f"{c['label']}, {what}", *(f"{x:.0f}" for x in ours + peers), f"**{ours[1] / peers[0]:.2f}**", f"**{ours[2] / peers[1]:.2f}**"])
        errors.append([c["label"], *(f"{c['logits'][t]['relative_error']:.1e}" for t in ("f32", "ours_bf16", "ours_q8_0", *TYPES)), *(f"{100 * c['same_tokens'][n]:.0f} %" for n in ("bfloat16", "quantised", *TYPES)), *(f"{f[n]['peak_mib']:.0f}" for n in f)])
    text.append(table(["tokens/s", "moegraft float32", "moegraft bf16", "moegraft q8_0", "llama.cpp bf16", "llama.cpp Q8_0", "bf16 / bf16", "q8_0 / Q8_0"], rows))
    text.append("Logits beside ours in float32 (median over positions of |difference| / |logits|), tokens that greedy text has in common with ours in float32, and peak resident MiB:\n")
    text.append(table(["case", "logits: llama.cpp f32", "moegraft bf16", "q8_0", "llama.cpp bf16", "Q8_0", "tokens: moegraft bf16", "q8_0", "llama.cpp bf16", "Q8_0", "MiB: moegraft float32", "bf16", "q8_0", "llama.cpp bf16", "Q8_0"], errors))
    return "\n".join(text)
