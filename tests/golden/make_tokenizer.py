"""Makes tests/golden/tokenizer: small tokenizers of every layout that the tokenizer module reads, and what the Python packages do with nasty text.

Run: .venv/bin/python tests/golden/make_tokenizer.py     (tokenizers 0.23.3, sentencepiece 0.2.3; seed 17)
"""
import io
import json
import pathlib
import random

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = pathlib.Path(__file__).parent / "tokenizer"
SEED = 17

# Pre-tokenizer patterns as the published models state them.
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
DEEPSEEK3 = [
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""]
# Where Oniguruma and PCRE2 read the same letters differently.
ODD = r"(?i:straße|ſ)|\p{Han}{1,2}+|[\w&&]?\h{2,}\b".replace("&&", "") + r"|\p{Greek}+|[[:punct:]]{2}|[^[:alnum:]\s]x|^#.*$|\bthe\B|[[:upper:]]+|\d{2}+|[\s\u3042]+|\p{^L}|\w+?|(?m:.)"


def corpus():
    rng = random.Random(SEED)
    words = {
        "en": "the a red heart of is we'll it's don't and in house picture smile happy face small large tokens image model THE Heart HTTPServer McDonald".split(),
        "de": "das Mädchen größer Straße über schön und nicht für die Häuser".split(),
        "fr": "l'été déjà où garçon cœur être naïve façade".split(),
        "ru": "красное сердце улыбка дом не и на человек".split(),
        "el": "κόκκινη καρδιά και το σπίτι".split(),
        "zh": list("红色的心我们是中国人笑脸图片模型") + ["红心", "模型"],
        "ja": ["ハート", "赤い", "です", "ます", "絵文字", "カタカナ"],
        "ko": "빨간 하트 얼굴 그림 모델".split(),
        "ar": "قلب أحمر وجه مبتسم بيت".split(),
        "he": "לב אדום בית".split(),
        "hi": "लाल दिल चेहरा नमस्ते".split(),
        "th": ["หัวใจ", "สีแดง"],
        "code": "def f(x): return x[i]+1; for (int i=0;i<n;++i) {} #include <vector> std::string if __name__ == '__main__':".split(" "),
        "emoji": ["❤️", "😀", "👍🏽", "👩‍👩‍👧", "🇫🇷"],
        "num": ["1", "42", "2024", "3.14", "1,000,000", "٤٢", "½", "Ⅻ"],
    }
    lines = []
    for _ in range(4000):
        group = words[rng.choice(list(words))]
        lines.append(rng.choice([" ", " ", " ", "  ", "\n    ", "\t"]).join(rng.choice(group) for _ in range(rng.randrange(2, 9))) + rng.choice(["", ".", "!\n", "\n\n", "..."]))
    return lines


NASTY = [
    "", " ", "  ", "\n", "\t", "a", "Hello world", " Hello", "Hello ", "  Hello   world  ", "we'll IT'S don't 'S 'Re x'ſ", "the red heart\n\nis  here.\n",
    "line\r\nline\r\n\r\n  indented\n\tTab\t\tTab", " " * 7, " " * 33 + "x" + " " * 70, "\n" * 9 + " \n \n x", "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u180eg\u200bh\ufeffi",
    "def f(x):\n    return x[i]+1  # comment\n\n\nclass A: pass", "#include <vector>\nfor (int i=0;i<n;++i) { v[i]->x |= 0xFF; }", "https://example.org/a_b-c?d=e&f=%20#g",
    "1234567890 12 345 6.78e-9 1,000,000 ٤٢١ ½¾ Ⅻ ²³ 一二三", "das Mädchen größer Straße STRASSE ẞ", "l'été déjà où c'est L'ÉTÉ", "e\u0301te\u0301 n\u0303 a\u0308\u0323 \u0301x q\u0307\u0323", "ﬁnance ﬀ ǆ ℌ ① ｆｕｌｌ　ｗｉｄｔｈ ㍿",
    "красное сердце, улыбка!", "ΚΌΚΚΙΝΗ καρδιά ΟΔΟΣ ς", "红色的心，我们是中国人。红心模型", "赤いハートです。カタカナ ｶﾀｶﾅ々〆", "빨간 하트 얼굴 \u1112\u1161\u11ab", "قلب أحمر وَجْه مبتسم؟", "לֵב אָדֹם", "नमस्ते लाल दिल क्षि", "หัวใจสีแดง", "ກຂຄ ကခဂ ᏣᎳᎩ ᚠᚢᚦ 𐌰𐌱 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    "❤️ ❤ 😀😀 👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇫🇷🇩🇪 ☺︎ 1️⃣", "\u0000a\u0001b\u001b[31mred\u007f\u0080\u009f", "\ufffd\ufffe\uffff\U0010ffff\ue000", "\u202eabc\u202c \u2066x\u2069 a\u00adb \u034f",
    "<s>hello</s>", "hello<s>", "<s> hello </s> world<unk>", "a<|end|>b <|end|> c<|END|>", "<|end|><|end|>  <|end|>\n<|end|>x", "x <mask> y", "x  <mask>  y<mask>", "  <mask>", "<mask>\n", "wordly word words sword word. word", "éword wordé word_ word1 _word", "[TAG]x [tag] y [TAG]",
    "<0x41><0xE2><0x82>", "<0xZZ> ▁ ▁▁a Ġ Ċ", "<", "<|", "<|en", "|||IP||| ||| |IP|", "İstanbul ISPARTA ıi ǅ ΑΣ", "STRASSE straße Straſe ſs", "x\u0300\u0301\u0302\u0303y" * 3, "abababababababababab" * 4, "the" * 40, "tHe HTTPServer McDonald's iPhone XMLHttpRequest", "don’t ‘quote’ “double” —dash… §¶",
    "a/b//c///\n/d", "...!!!???\n\n\n!!!", "{}[]()<>\\|`~@#$%^&*_+-=", "#heading\ntext #no\n# yes", "deadbeef 0xDEADBEEF cafe\u0301 ff", "\u3042\u3044 あい　\u3042", "ÅÅÅ", "x¾ y²z ³word¹ ½½ ¼  \n", "a\u200db \u200c\u200d word\u200d \u200dword", "ᾳ ᾼ Ω Ω K K",
]


def fuzz(count):
    rng = random.Random(SEED + 1)
    ranges = [(32, 126)] * 4 + [(9, 13), (32, 32), (0xA0, 0x24F), (0x250, 0x52F), (0x300, 0x36F), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x2BFF),
                              (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFFFD), (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF), (0, 31)]
    bits = ["<s>", "</s>", "<|end|>", "<mask>", "word", " ", "  ", "\n", "the", "'s", "▁", "[TAG]", "é", "<unk>"]
    import unicodedata
    texts = []
    while len(texts) < count:
        parts = []
        for _ in range(rng.randrange(1, 24)):
            low, high = rng.choice(ranges)
            if rng.random() < 0.12:
                parts.append(rng.choice(bits))
            else:
                # Characters that Unicode 13 knows: the packages and PCRE2 carry tables of different ages.
                run = [chr(rng.randrange(low, high + 1)) for _ in range(rng.randrange(1, 4))]
                parts.append("".join(c for c in run if unicodedata.category(c) != "Cn" and unicodedata.ucd_3_2_0.category(c) != "Cn"))
        texts.append("".join(parts))
    return texts


def fnv(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def fingerprint(ids, text):
    return f"{fnv(b''.join(i.to_bytes(4, 'little') for i in ids) + text.encode()):016x}"


SPECIALS = ["<unk>", "<s>", "</s>", "<|end|>"]
FLAGGED = [AddedToken("<mask>", special=True, lstrip=True, normalized=False), AddedToken("word", single_word=True, normalized=True), AddedToken("[TAG]", rstrip=True, normalized=True), AddedToken("  \n", normalized=False)]


def template(before=("<s>",), after=()):
    def make(t):
        pieces = [*before, "$A", *after]
        return processors.TemplateProcessing(single=" ".join(pieces), special_tokens=[(s, t.token_to_id(s)) for s in {*before, *after}])
    return make


def train(pre=None, norm=None, dec=None, post=None, vocab=700, byte_alphabet=True, train_pre=None, trainer=None, model=None, added=(), edit=None):
    t = Tokenizer(models.BPE(**(model or {})))
    if norm is not None:
        t.normalizer = norm
    t.pre_tokenizer = train_pre or pre
    options = dict(vocab_size=vocab, special_tokens=SPECIALS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_alphabet else [])
    options.update(trainer or {})
    t.train_from_iterator(corpus(), trainers.BpeTrainer(**options))
    if train_pre is not None or pre is None:
        t.pre_tokenizer = pre
    if dec is not None:
        t.decoder = dec
    if added:
        t.add_tokens(list(added))
    if post is not None:
        t.post_processor = post(t)
    data = json.loads(t.to_str())
    if edit is not None:
        edit(data)
    return data


def byte_fallback(data):
    """The 256 byte tokens join the vocabulary (as ids behind the others) and become ordinary tokens of the model."""
    vocab = data["model"]["vocab"]
    for token in data["added_tokens"]:  # make room: added tokens follow the vocabulary
        if token["content"] not in vocab:
            token["id"] += 256
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    data["model"]["byte_fallback"] = True
    data["model"]["unk_token"] = "<unk>"
    data["model"]["fuse_unk"] = True


def incomplete_bytes(data):
    byte_fallback(data)
    for byte in (0xE2, 0xF0):
        del data["model"]["vocab"][f"<0x{byte:02X}>"]
    ids = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    old_added = {a["content"]: a for a in data["added_tokens"]}
    data["model"]["vocab"] = {token: i for i, (token, _) in enumerate(ids)}
    data["added_tokens"] = [a for a in old_added.values() if a["content"] in data["model"]["vocab"]]


def string_merges(data):
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]


def ignore_merges(data):
    data["model"]["ignore_merges"] = True
    # A token that merges cannot make: only ignore_merges reaches it.
    data["model"]["vocab"]["Ġzebra"] = max(list(data["model"]["vocab"].values()) + [a["id"] for a in data["added_tokens"]]) + 1


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern) if isinstance(pattern, str) and pattern not in (" ", "e.") else pattern, behavior, invert)


def byte_level_after(*splits):
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def configurations():
    bl, meta = decoders.ByteLevel(), pre_tokenizers.Metaspace(prepend_scheme="always")
    yield "qwen2", train(byte_level_after(split(QWEN2)), normalizers.NFC(), bl, lambda t: processors.ByteLevel(trim_offsets=False), added=FLAGGED)
    yield "llama3", train(byte_level_after(split(LLAMA3)), None, bl, lambda t: processors.Sequence([processors.ByteLevel(), template()(t)]), edit=ignore_merges)
    yield "o200k", train(byte_level_after(split(O200K)), None, bl, edit=string_merges)
    yield "o200k_removed", train(byte_level_after(split(O200K, "removed", True)), None, bl, vocab=500)
    yield "deepseek3", train(byte_level_after(*[split(p) for p in DEEPSEEK3]), normalizers.Sequence([]), bl, template(), added=FLAGGED)
    spaces = [AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)] + [AddedToken("|||IP|||", normalized=True), AddedToken("<|padding|>", special=True)]
    yield "neox", train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), bl, template((), ("</s>",)), added=spaces, edit=string_merges)
    yield "gpt2_prefix", train(pre_tokenizers.ByteLevel(add_prefix_space=True), None, bl, lambda t: processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), added=FLAGGED)
    sp = dict(train_pre=meta, byte_alphabet=False, trainer=dict(limit_alphabet=120), vocab=500)
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    meta_train = lambda **kw: {**sp, **kw}

    def llama2(**kw):
        data = train(None, None, decoders.Sequence(LLAMA_DECODER), template(), **meta_train(**kw))
        data["normalizer"] = json.loads(Tokenizer_with(normalizer=prepend))["normalizer"]
        return data
    yield "llama2", llama2(edit=byte_fallback)
    yield "llama2_flags", llama2(edit=byte_fallback, added=FLAGGED)
    yield "incomplete_bytes", llama2(edit=incomplete_bytes)
    yield "metaspace_first", train(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None, decoders.Sequence(LLAMA_DECODER[:3]), template(("<s>",), ("</s>",)), edit=byte_fallback, added=FLAGGED, **sp)
    yield "metaspace_always", train(meta, None, decoders.Metaspace(prepend_scheme="always"), model=dict(unk_token="<unk>"), **{**sp, "train_pre": None})
    yield "metaspace_never", train(pre_tokenizers.Metaspace(prepend_scheme="never"), None, decoders.Metaspace(prepend_scheme="never"), model=dict(unk_token="<unk>", fuse_unk=True), added=FLAGGED, **{**sp, "train_pre": None})
    words = dict(byte_alphabet=False, vocab=400)
    yield "end_of_word", train(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=True)]),
                               normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(r" {2,}"), " ")]), decoders.BPEDecoder("</w>"),
                               trainer=dict(end_of_word_suffix="</w>", limit_alphabet=150), model=dict(unk_token="<unk>", end_of_word_suffix="</w>"), added=FLAGGED, **words)
    yield "subword_prefix", train(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=False)]), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), None,
                                  trainer=dict(continuing_subword_prefix="##", limit_alphabet=150), model=dict(unk_token="<unk>", continuing_subword_prefix="##", fuse_unk=True), **words)
    yield "nfkd_drop", train(pre_tokenizers.CharDelimiterSplit("e"), normalizers.Sequence([normalizers.NFKD(), normalizers.Strip(left=True, right=False)]), decoders.Fuse(), trainer=dict(limit_alphabet=100), **words)
    yield "split_previous", train(byte_level_after(split(" ", "merged_with_previous")), None, bl, vocab=350)
    yield "split_next", train(byte_level_after(split(r"\s|\p{Lu}", "merged_with_next")), None, bl, vocab=350)
    yield "split_contiguous", train(byte_level_after(split(r"\w\W?", "contiguous", True), pre_tokenizers.Punctuation("merged_with_previous")), None, bl, vocab=350)
    yield "split_removed", train(byte_level_after(split("e.", "removed"), pre_tokenizers.Punctuation("removed")), None, bl, vocab=350)
    yield "odd_regex", train(byte_level_after(split(ODD)), None, bl, vocab=400)
    yield "byte_normalizer", train(split(r"Ġ?[^Ġ]+"), normalizers.ByteLevel(), bl, vocab=400, added=FLAGGED[:1])


def Tokenizer_with(**parts):
    t = Tokenizer(models.BPE())
    for key, value in parts.items():
        setattr(t, key, value)
    return t.to_str()


def expected(encode, decode, size, before, after, texts, tie=lambda text: False):
    rng = random.Random(SEED + 2)
    random_ids = [[rng.randrange(size) for _ in range(rng.randrange(1, 14))] for _ in range(40)]
    return {
        "size": size, "before": before, "after": after,
        "nasty": [None if tie(t) else {"ids": encode(t), "text": decode(encode(t), True)} for t in NASTY],
        "fuzz": [None if tie(t) else fingerprint(encode(t), decode(encode(t), True)) for t in texts],
        "decode": [{"ids": ids, "skip": decode(ids, True), "keep": decode(ids, False)} for ids in random_ids],
    }


def write(name, data):
    (OUT / name).write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def tie_of(model):
    """Unigram: two segmentations of equal score; which one wins depends on the library version's rounding, so such texts are left out."""
    def tie(text):
        scores = [sum(model.get_score(i) for i in ids) for ids in model.nbest_encode_as_ids(text, 2)]
        return len(scores) == 2 and abs(scores[0] - scores[1]) < 1e-3
    return tie


def main():
    OUT.mkdir(exist_ok=True)
    for old in OUT.iterdir():
        old.unlink()
    texts = fuzz(400)
    write("texts.json", {"made_by": "tests/golden/make_tokenizer.py, tokenizers 0.23.3, sentencepiece 0.2.3, seed 17", "nasty": NASTY, "fuzz": texts})
    for name, data in configurations():
        write(f"{name}.tokenizer.json", data)
        t = Tokenizer.from_file(str(OUT / f"{name}.tokenizer.json"))
        ids = t.encode("a", add_special_tokens=False).ids
        special = t.encode("a").ids
        start = next((i for i in range(len(special) - len(ids) + 1) if special[i:i + len(ids)] == ids), 0)
        size = max(t.get_vocab(with_added_tokens=True).values()) + 1
        write(f"{name}.expected.json", expected(lambda x: t.encode(x, add_special_tokens=False).ids, lambda i, skip: t.decode(i, skip_special_tokens=skip), size, special[:start], special[start + len(ids):], texts))
    for name, kind, options in [("sp_bpe", "bpe", dict(normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True)), ("sp_unigram", "unigram", dict(normalization_rule_name="nmt_nfkc")),
                                ("sp_plain", "bpe", dict(normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=False))]:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(line for text in corpus() for line in text.split("\n") if line), model_writer=model, model_type=kind, vocab_size=500 if kind == "bpe" else 450,
                                                 **{"byte_fallback": True, "character_coverage": 0.98, **options}, minloglevel=2, num_threads=1)
        (OUT / f"{name}.model").write_bytes(model.getvalue())
        s = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        data = expected(s.encode, lambda i, skip: s.decode(i), s.get_piece_size(), [s.bos_id()], [], texts, tie_of(s) if kind == "unigram" else lambda text: False)
        data["decode"] = [{"ids": d["ids"], "skip": d["skip"]} for d in data["decode"]]
        write(f"{name}.expected.json", data)
    print(sum(f.stat().st_size for f in OUT.iterdir()) / 1e6, "MB")


if __name__ == "__main__":
    main()
