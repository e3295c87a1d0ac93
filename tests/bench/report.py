"""The tables that compare.py writes."""
import compare_llama


def table(header, rows):
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [header, ["---"] + ["---:"] * (len(header) - 1), *rows]) + "\n"


def ran_on(ours, peers):
    cpu = ours.get("cpu", {})
    return f"{cpu.get(ours.get('dtype'), 'not said')} / {peers.get('cpu_capability', 'not said')}"


def markdown(r):
    hw = r["hardware"]
    where = f"{hw['gpu']} on {hw['cpu']}" if hw["gpu"] else f"{hw['cpu']}, {hw['usable_cores']} cores ({', '.join(hw['features'])}), {hw['memory_gib']} GiB"
    where += f", held to {r['isa']}" if r["isa"] else ""
    v = r["versions"]
    text = [f"# moegraft beside its peers\n\n{where}; {hw['system']}. Commit {r['commit']}, {r['date']}. "
            f"torch {v['torch']}, transformers {v['transformers']}, PEFT {v['peft']}, Python {v['python']}. Load average before the start: {r['load_at_start']:.2f}; OMP_WAIT_POLICY: {r['omp_wait_policy']}.\n\n```\n{r['command']}\n```\n",
            "" if not r["steps_table"] else f"## Training step\n\nLoRA of rank {r['rank']} on all experts (quickstart: queries and values too), gate open, every token labelled, same checkpoint and ids; forward, loss, backward, AdamW. Both sides by turns, {r['rounds']} rounds of {r['steps']} steps: "
            "tokens/s of the best step (in brackets the median). Peak is the process's largest resident memory up to the last step (the allocator's on a GPU). The limit is the rate of a large matrix product in the same dtype and runs; the work is "
            "2 FLOP per active parameter forward, as much for the gradient of the activations, and LoRA's own. \"Outside\" is the same ratio by the clock of the process that started both, between the lines that tell of steps. "
            f"\"Attainable\" is how much of the limit can be reached at best, where frozen weights (once forward, once backward) and what is trained come from memory at {r['read_gbytes_per_s']:.0f} GB/s. "
            "\"Gated\": moegraft's step as a graft takes it, LoRA on image tokens alone and only they labelled, beside the peer's plain step. \"Ran on\": the kernels of moegraft and the instruction set of the peer's torch, as each names them.\n"]
    if r["peer_gflops"]["bfloat16"] < r["peer_gflops"]["float32"] / 4:
        text.append(f"The peer's products run at {r['peer_gflops']['bfloat16']:.1f} GF/s in bf16 and {r['peer_gflops']['float32']:.0f} in float32 here, so it runs in float32 where moegraft runs in bf16.\n")
    rows = []
    for c in r["steps_table"]:
        a, b, q = c["moegraft"], c["peer"], c["ratio"]
        rate = lambda s: f"{s['best_tokens_per_s']:.0f} ({s['median_tokens_per_s']:.0f})"
        rows.append([c["label"], ran_on(a, b), rate(a), rate(b), f"**{q['best']:.2f}** ({q['median']:.2f})", f"{q['outside']:.2f}" if "outside" in q else "", f"{a['peak_mib']:.0f}", f"{b['peak_mib']:.0f}",
                     f"**{q['peak']:.2f}**", f"{c['matmul_gflops']:.0f}", f"{100 * a['share_of_limit']:.0f} %", f"{100 * b['share_of_limit']:.0f} %",
                     f"{100 * c['attainable_share']:.0f} %", f"{100 * a['share_of_limit'] / c['attainable_share']:.0f} %"])
    if rows:
        text.append(table(["case", "ran on", "moegraft tokens/s", "peer tokens/s", "ratio", "outside", "moegraft MiB", "peer MiB", "ratio", "limit GF/s", "moegraft of limit", "peer of limit", "attainable", "moegraft of that"], rows))
        text.append("Losses of the first round, per step:\n")
        losses = [[c["label"], *(" ".join(f"{x:.5f}" for x in c[side]["loss"]) for side in ("moegraft", "peer")), "" if c["gated"] else f"{c['first_loss_difference']:.1e}"] for c in r["steps_table"]]
        text.append(table(["case", "moegraft", "peer", "first differs by"], losses))
    if r["peer_implementations"]:
        text.append("## The peer's ways to run experts\n")
        rows = [[f"{c['shape']} {c['dtype']} {c['batch']}×{c['seq']} {c['experts']}"] + ([f"{c['tokens_per_s']:.0f}", f"{c['peak_mib']:.0f}"] if "error" not in c else ["failed", ""]) for c in r["peer_implementations"]]
        text.append(table(["case", "tokens/s", "peak MiB"], rows))
    if r["generation"]:
        text.append("## Generation\n\nGreedy text from the same prompts with cached keys and values; image tokens: one picture's codes per sequence, drawn in one batch with LoRA acting on them, beside the peer's text decode at that batch, "
                    "plain and with the same LoRA unmerged. Tokens/s; the best of all rounds.\n")
        rows = []
        for c in r["generation"]:
            p, d, i = c["prefill"], c["decode"], c["image"]
            rows.append([c["label"], ran_on(*(c["paths"][side] for side in ("moegraft", "peer"))), f"{p['moegraft']:.0f} / {p['peer']:.0f} = **{p['ratio']:.2f}**", f"{d['moegraft']:.0f} / {d['peer']:.0f} = **{d['ratio']:.2f}**",
                         f"{c['pictures']}: {i['moegraft']:.0f} / {i['peer']:.0f} = **{i['ratio']:.2f}** (LoRA: {i['peer_lora']:.0f})", f"{c['peak_mib']['moegraft']:.0f} / {c['peak_mib']['peer']:.0f}", f"{100 * c['same_tokens']:.0f} %"])
        text.append(table(["case", "ran on", "prefill", "decode", "image tokens", "peak MiB", "same tokens"], rows))
    if r["llama"]:
        text.append("## Generation beside llama.cpp\n\n" + compare_llama.section(r))
    text.append("## Commands\n\nFrom the project's root:\n\n```")
    for c in r["steps_table"] + r["generation"] + r["llama"]:
        text += list(c["commands"].values())
    text.append("```\n")
    if r["failures"]:
        text.append("## Failures\n\n" + "\n".join("- " + f for f in r["failures"]) + "\n")
    return "\n".join(text)
