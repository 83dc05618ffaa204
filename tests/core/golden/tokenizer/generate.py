#!/usr/bin/env python3
"""Writes the golden files of this folder: small tokenizers in the shapes of well-known ones, and what
the Python package `tokenizers` makes of varied text with them.

    pip install tokenizers && python3 generate.py [--models DIR ...]

  texts.json          the texts, as {"text": ...}, or {"hex": ...} for bytes that are not UTF-8
  NAME.json           a tokenizer.json
  variants.json       further tokenizers: the name of a NAME.json and the keys that replace its own
  NAME.golden.json    for every text its ids, and decoded text; for random id sequences their text

Texts that are not UTF-8 are decoded as Python does with errors="replace" first, for `tokenizers` takes
text only. With --models, NAME.golden.json files for tokenizers that are elsewhere are written too
(model-NAME.golden.json for DIR/NAME/tokenizer.json).
"""

import argparse
import json
import pathlib
import random

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

FOLDER = pathlib.Path(__file__).resolve().parent

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
          r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS +
         r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS +
         r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PUNCTUATED = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
              r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# What the tokenizers are trained on.
CORPUS = [
    "The drafter proposes a tree of tokens and the target scores every node of the tree in one pass.",
    "An acceptance rule picks a path, and the path becomes the end of the prefix.",
    "Water boils at 100 degrees; at 3000 metres it boils near 90. That isn't a mistake, it's physics.",
    "Anna has 24 apples. She gives 7 to Ben and buys 13 more. How many apples does she have now?",
    "They're sure we'll see that you've won, but I'd wait: he's late and I'm early. DON'T SHOUT!",
    "def accept(tree, scores):\n    for node in tree.nodes:\n        if scores[node] > 0.5:\n"
    "            return node\n    return None\n",
    "for (int i = 0; i < rows; ++i) {\n\tsum += values[i] * weights[i];\n}\n",
    "{\"name\": \"tree\", \"nodes\": [1, 2, 3], \"depth\": 31, \"open\": false}",
    "https://example.org/path/to/page?query=value&other=1#part",
    "Die Wörter der Sprache ändern sich über die Jahre; größere Bäume wachsen langsam.",
    "Les élèves étaient déjà là, où l'été dernier ils avaient mangé des gâteaux.",
    "El niño comió una manzana en el jardín mientras la señora leía.",
    "Дерево растёт медленно, но каждый узел проверяется за один проход.",
    "日本の山は高くて美しい。春には桜の花が咲きます。カタカナとひらがな。",
    "今天天气很好，我们去公园散步。树上有很多鸟。",
    "나무는 천천히 자란다. 우리는 공원에서 걸었다.",
    "الشجرة تنمو ببطء والطيور تغني في الصباح.",
    "पेड़ धीरे धीरे बढ़ता है और पक्षी गाते हैं।",
    "ต้นไม้เติบโตช้าๆ และนกร้องเพลงตอนเช้า",
    "Emoji are fun 😀 😃 🌳 🌲 👍🏽 👩‍💻 and flags too 🇩🇪 🇯🇵.",
] * 4

CODE = "class Tree<T>:\n\tdef __init__(self, *args, **kwargs):\n\t\tself._x = {}  # 1st\n\n\n        return x != y && z"
HAND_WRITTEN = [
    "", " ", "  ", "\n", "\r\n", "\t", "a", " a", "a ", "  a  b   c    ", "Hello, world!",
    "The tree of tokens has 31 levels and 64 nodes; it's 12345678 deep.",
    "I'm you're he's we'll they'd I've don't", "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T", "it\u2019s 'tis '' 'sS 'S'T",
    "'\u017f and '\u017fo \u212aelvin 'LL'll'Ll'lL", CODE,
    "if (a<b) {return [x, y];} /* ... */ printf(\"%d\\n\", i++);\r\n\r\n#endif",
    "a\u00a0b \u00a0 c\u00a0\u00a0d", "\u3000全角\u3000スペース\u3000", "a\u2003b\u2009c\u200ad\u202fe\u205ff\u1680g", "a\u2028b\u2029c\u0085d",
    "a\x0bb\x0cc\x1cd\x1fe\x00f", "zero\u200bwidth\u200cjoin\u200der\ufeffbom\u180emongolian",
    "tab\tand  two spaces\n\n\nthree lines\r\n\r\nwindows   \n   \n  x", " \t \n \r\n \u00a0 \u3000 ", "          ten", "x" + " " * 40 + "y", "\n" * 20,
    " " * 17 + "\n" + " " * 9, "\t\t\t\tx\t\t", "caf\u00e9 cafe\u0301 \u1e69 s\u0323\u0307 s\u0307\u0323", "\u212b \u00c5 A\u030a \u2126 \u03a9", "\ud55c\uae00 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0915\u093c \u0958 \u09c7\u09be \u0cca", "\ufb01 \ufb02 \u00bd \u2460 \u2163 \uff21\uff22 \u338f \u00b2", "i\u0307 \u0130 I \u0131 STRASSE stra\u00dfe \u1e9e \u03a3\u03c3\u03c2",
    "0 12 345 6789 01234567890", "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969 \u0e51\u0e52\u0e53 \uff11\uff12\uff13 \u00b2\u00b3 \u2167 \u2469 \u00bc \u3007\u4e00\u4e8c", "3.14159, -2e10, 0xFF, 1_000, 50%", "1,234,567.89",
    "Die gr\u00f6\u00dften B\u00e4ume", "Дерево и узел, 42!", "日本語のテキストと123とABC。", "今天天气很好，abc。", "나무가 자란다 ㄱㄴㄷ", "الشجرة تنمو ١٢٣ ببطء", "पेड़ धीरे क्षत्रिय १२३", "ต้นไม้เติบโต ๑๒๓", "שלום עולם", "Ελληνικά κείμενο",
    "ქართული", "አማርኛ ጽሑፍ", "\u1780\u17d2\u1798\u17c2\u179a", "\U0001d538\U0001d539 \U0001f600 \U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f4\u200d\u2620\ufe0f \u2764\ufe0f 1\ufe0f\u20e3 \U0001f1e9\U0001f1ea\U0001f1ef", "\U0001f600" * 9,
    "<s>", "</s>", "<s> a</s>b <unk> c", "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> <|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "<|bos|><|user|>What is 2 + 2?<|assistant|>4<|end|>", "<|endof", "<<s>>", "[MASK] x [MASK]y[MASK]", "  [LEFT]  [RIGHT]  [BOTH]  [WORD] x[WORD] [WORD]y ,[WORD], _[WORD] \u00e9[WORD] [WORD]\u0301 end",
    "[LEFT][LEFT] [RIGHT] [LEFT]", "caf\u00e9tok cafe\u0301tok CAF\u00c9TOK Caf\u00e9Tok", "\u2581a \u2581\u2581 b\u2581c", "<0x41><0x0A> <0xFF>", "\u0120a \u010a \u00e9 \u0100", "ab" * 300, "supercalifragilistic" * 30, "=" * 200, "-=" * 50, "aAbBcC" * 20, "\u00e9" * 100, "e\u0301" * 50, "日本" * 60, " a" * 100, "1" * 101, "' " * 20, "'s" * 20, "\n " * 20, "\r\n\t" * 15, "\u0301\u0301a \u0301", "\u200d\u200d", "\ufffd \ufffe \uffff", "a\U0010ffffb\ue000c",
    "\u01c5\u01c8 \u02b0\u02bc \u1d2c \u2c7c", "\u24b6\u24d0 \u2160 \u3021", "$\u20ac\u00a3+<=>^`|~ \u00a9\u2192\u2200", "\u00ab\u00bb\u2018\u2019\u201c\u201d\u2026\u2014\u3001\u3002\uff01", "_a_b __c__ a_1 \u203f", "#\u00a7\u00b6 @user 100\u20ac",
]
BROKEN = ["80", "ff", "c3", "61c362", "e28261", "e282", "f09f98", "f09f9861", "eda080", "edbfbf", "c080", "c1bf", "e08080", "f0808080", "f4908080",
          "f8888080", "fffe", "61ff20c3a920e9", "e28228a1", "f0288cbc", "c3c3a9", "20f09f20", "ef bf bd ff".replace(" ", ""), "e282ace282", "80808080"]

# Characters that every Unicode version in use knows, so that goldens do not depend on one.
POOLS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "etaoin shrdlu", "0123456789", " \t\n\r\u00a0\u3000\u2003\u2028\u0085\x0b\x0c", "  \n\n ", ".,;:!?'\"()[]{}<>-_=+*/\\|@#$%^&~`", "'sStTdDmMlLrReEvV",
    "\u00e0\u00e9\u00ee\u00f5\u00fc\u00df\u00e6\u00f8\u00c5\u0130\u017f", "\u0300\u0301\u0302\u0308\u030a\u0323\u0327\u0345", "АБВГабвгдежё", "あいうえおアイウ日本語中文字々〇", "가나다라한글", "אבגד", "ابتثج١٢٣", "कखगघ्िा़१२", "กขคงเ็่้๑๒", "ΑΒΓαβγςάέ", "\U0001f600\U0001f333\U0001f44d\U0001f3fd\u200d\u2764\ufe0f\U0001f1e9\U0001f1ea",
    "\u00b2\u00bd\u2160\u2460\uff11\ufb01\u212b\u2126", "\u2581\u0120\u010a\u0100\u200b\u200c\u200d\ufeff\u180e\u00ad", "\x00\x01\x1b\x1c\x1f\x7f",
]


def random_texts(rng, count):
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(1, 6)):
            pool = rng.choice(POOLS)
            text += "".join(rng.choice(pool) for _ in range(rng.randint(1, 7)))
            if rng.random() < 0.3:
                text += " "
            if rng.random() < 0.07:
                text += rng.choice(["<s>", "</s>", "<|endoftext|>", "<|eot_id|>", "[LEFT]", " [RIGHT] ", "[WORD]", "cafétok", "<0x0A>"])
        texts.append(text)
    return texts


def as_json(tokenizer):
    return json.loads(tokenizer.to_str())


def train(tokenizer, vocab_size, special, byte_alphabet):
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet,
                                  limit_alphabet=1000 if byte_alphabet else 150, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)


def byte_level(pattern):
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def gpt2():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = byte_level(None)
    train(t, 700, [], True)
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    made = as_json(t)
    # As in files of that age.
    made["model"]["continuing_subword_prefix"] = ""
    made["model"]["end_of_word_suffix"] = ""
    made["model"]["merges"] = [" ".join(merge) for merge in made["model"]["merges"]]
    del made["model"]["byte_fallback"], made["model"]["ignore_merges"]
    return made


def gpt_neox():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = byte_level(None)
    train(t, 700, ["<|endoftext|>", "<|padding|>"], True)
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    t.decoder = decoders.ByteLevel(add_prefix_space=False)
    # GPT-NeoX has its long runs of spaces as plain added tokens.
    t.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return as_json(t)


def llama3():
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer = byte_level(LLAMA3)
    train(t, 700, [], True)
    made = as_json(t)
    # A whole word whose merges would not lead to it: ignore_merges finds it.
    made["model"]["vocab"]["\u0120supercalifragilistic"] = len(made["model"]["vocab"])
    t = Tokenizer.from_str(json.dumps(made))
    t.add_special_tokens([AddedToken(s, normalized=False) for s in
                          ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]])
    bos = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B:1",
                                      special_tokens=[("<|begin_of_text|>", bos)]),
    ])
    t.decoder = decoders.ByteLevel()
    return as_json(t)


def qwen2():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = byte_level(QWEN2)
    train(t, 700, [], True)
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]])
    return as_json(t)


def sentencepiece():
    """Llama-2's shape: no pre-tokenizer, so that merges reach over words, and bytes for the rest."""
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    train(t, 450, ["<unk>", "<s>", "</s>"], False)
    t.pre_tokenizer = None
    made = as_json(t)
    learnt = sorted(made["model"]["vocab"].items(), key=lambda item: item[1])[3:]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab["<0x%02X>" % byte] = 3 + byte
    for token, _ in learnt:
        vocab[token] = len(vocab)
    for run in ["\u2581\u2581", "\u2581\u2581\u2581\u2581", "\u2581\u2581\u2581\u2581\u2581\u2581\u2581\u2581"]:
        half = run[: len(run) // 2]
        vocab.setdefault(run, len(vocab))
        made["model"]["merges"].append([half, half])
    made["model"]["vocab"] = vocab
    for token in made["added_tokens"]:
        token["normalized"] = False
    made["post_processor"] = json.loads(Tokenizer.from_str(json.dumps(made)).to_str())["post_processor"]
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                 {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    made["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return made


def split(pattern, behavior, invert=False, literal=False):
    return {"type": "Split", "pattern": {"String" if literal else "Regex": pattern}, "behavior": behavior, "invert": invert}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def flagged(first_id, without=None):
    """Added tokens with every flag."""
    def token(content, special, **flags):
        base = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        return base | flags
    tokens = [
        token("[LEFT]", True, lstrip=True), token("[RIGHT]", True, rstrip=True), token("[BOTH]", False, lstrip=True, rstrip=True),
        token("[WORD]", False, single_word=True), token("[MASK]", True, lstrip=True, normalized=True), token("caf\u00e9tok", False, normalized=True),
        token("caf", False, single_word=True, normalized=True), token("<s>", True), token("  ", False, normalized=True),
    ]
    # `tokenizers` numbers added tokens without gaps, whatever the file says.
    return [{"id": first_id + i} | t for i, t in enumerate(t for t in tokens if t["content"] != without)]


def variants(bases):
    gpt2_size = len(bases["gpt2"]["model"]["vocab"])
    sp = bases["sentencepiece"]
    made = {
        # The pre-tokenizer forms of newer Llama-2 and Mistral files.
        "metaspace-first": ("sentencepiece", {"normalizer": None, "pre_tokenizer": METASPACE}),
        "metaspace-always": ("sentencepiece", {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always", "split": True},
                             "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}}),
        "metaspace-never": ("sentencepiece", {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"},
                            "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}}),
        "metaspace-old": ("sentencepiece", {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True},
                          "decoder": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}}),
        "metaspace-after-split": ("sentencepiece", {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False},
                                  "pre_tokenizer": sequence(split(",", "MergedWithPrevious", literal=True), METASPACE)}),
        # Unknown characters in their three ways, and none.
        "unknown-fused": ("sentencepiece", {"model": {"byte_fallback": False}}),
        "unknown-single": ("sentencepiece", {"model": {"byte_fallback": False, "fuse_unk": False}}),
        "unknown-dropped": ("sentencepiece", {"model": {"byte_fallback": False, "unk_token": None}}),
        "no-decoder": ("sentencepiece", {"decoder": None}),
        "strip-decoder": ("sentencepiece", {"decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
            {"type": "Replace", "pattern": {"Regex": "[aeiou]+"}, "content": "<>"}, {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]}}),
        "late-decoder": ("sentencepiece", {"decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "\u2581t"}, "content": " T"}, {"type": "Strip", "content": "e", "start": 0, "stop": 1}]}}),
        "strip-tokens": ("sentencepiece", {"decoder": {"type": "Sequence", "decoders": [
            {"type": "Strip", "content": "\u2581", "start": 2, "stop": 0}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": "e", "start": 3, "stop": 0}]}}),
        # Added tokens.
        "flags-nfc": ("gpt2", {"normalizer": {"type": "NFC"}, "added_tokens": flagged(gpt2_size)}),
        "flags-lower": ("gpt2", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]}, "added_tokens": flagged(gpt2_size)}),
        "flags-prepend": ("sentencepiece", {"added_tokens": sp["added_tokens"] + flagged(len(sp["model"]["vocab"]), without="<s>")}),
        # Normalizers.
        "nfkc": ("gpt2", {"normalizer": {"type": "NFKC"}}), "nfkd": ("gpt2", {"normalizer": {"type": "NFKD"}}), "nfd": ("gpt2", {"normalizer": {"type": "NFD"}}),
        "strip": ("gpt2", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Replace", "pattern": {"Regex": "\\s{2,}"}, "content": " "}]}}),
        # Pre-tokenizers.
        "prefix-space": ("gpt2", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}),
        "no-regex": ("gpt2", {"pre_tokenizer": BYTES}), "no-pre-tokenizer": ("gpt2", {"pre_tokenizer": None}),
        "cl100k": ("gpt2", {"pre_tokenizer": sequence(split(CL100K, "Removed", invert=True), BYTES)}),
        "o200k": ("gpt2", {"pre_tokenizer": sequence(split(O200K, "Isolated"), BYTES)}),
        "cjk": ("gpt2", {"pre_tokenizer": sequence(split(r"\p{N}{1,3}", "Isolated"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "Isolated"), split(PUNCTUATED, "Isolated"), BYTES)}),
        "falcon": ("gpt2", {"pre_tokenizer": sequence({"type": "Punctuation", "behavior": "Contiguous"}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                            {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]", "Isolated"))}),
        "digits": ("gpt2", {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "MergedWithNext"}, BYTES)}),
        "classes": ("gpt2", {"pre_tokenizer": sequence(split(r"[^\S\r\n]+|\w+\b|\h{2}|\p{Han}+|\p{^L}", "Isolated"), BYTES)}),
        "empty-matches": ("gpt2", {"pre_tokenizer": sequence(split(r"(?=[A-Z])|\s*", "Isolated"), BYTES)}),
    }
    for behavior in ["Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]:
        for invert in [False, True]:
            name = "split-" + behavior.lower() + ("-inverted" if invert else "")
            made[name] = ("gpt2", {"pre_tokenizer": sequence(split(r"\s|[aeiou]{1,2}", behavior, invert), BYTES)})
    return made


def patched(base, changes):
    made = json.loads(json.dumps(base))
    for key, value in changes.items():
        if key == "model":
            made["model"].update(value)
        else:
            made[key] = value
    return made


def decode(tokenizer, ids, skip_special_tokens):
    # Its skip_special_tokens compares texts, so since it decodes added tokens in their normalized form it keeps
    # special tokens that normalizing changes. A token that the file calls special is skipped here.
    if skip_special_tokens:
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        ids = [i for i in ids if i not in special]
    try:
        return tokenizer.decode(ids, skip_special_tokens=False)
    except BaseException as error:  # `tokenizers` panics where it strips the end of an empty text
        if "index out of bounds" not in str(error):
            raise
        return ""


def golden(tokenizer, texts, seed):
    rng = random.Random(seed)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    result = {"tokenizers": tokenizers.__version__, "texts": [], "sequences": []}
    for text in texts:
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        ids = tokenizer.encode(text, add_special_tokens=True).ids
        entry = {"ids": plain}
        if ids != plain:
            entry["with_special"] = ids
        decoded = decode(tokenizer, ids, skip_special_tokens=False)
        if decoded != text:
            entry["decoded"] = decoded
        skipped = decode(tokenizer, ids, skip_special_tokens=True)
        if skipped != decoded:
            entry["skipped"] = skipped
        result["texts"].append(entry)
    for _ in range(200):
        ids = [rng.randrange(size + 2) if rng.random() < 0.5 else rng.randrange(min(size, 300)) for _ in range(rng.randint(0, 10))]
        result["sequences"].append({"ids": ids, "decoded": decode(tokenizer, ids, skip_special_tokens=False),
                                    "skipped": decode(tokenizer, ids, skip_special_tokens=True)})
    return result


def write(path, value):
    path.write_text(json.dumps(value, separators=(",", ":"), ensure_ascii=True) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--train", action="store_true", help="train the tokenizers anew")
    arguments = parser.parse_args()
    rng = random.Random(20250614)
    strings = HAND_WRITTEN + random_texts(rng, 220)
    texts = [{"text": s} for s in strings] + [{"hex": h} for h in BROKEN]
    decoded = strings + [bytes.fromhex(h).decode("utf-8", errors="replace") for h in BROKEN]
    write(FOLDER / "texts.json", texts)

    # Training breaks ties differently from run to run, so tokenizers that are there are kept.
    bases = {}
    for name, make in {"gpt2": gpt2, "gpt-neox": gpt_neox, "llama3": llama3, "qwen2": qwen2, "sentencepiece": sentencepiece}.items():
        path = FOLDER / f"{name}.json"
        if arguments.train or not path.exists():
            write(path, make())
        made = bases[name] = json.loads(path.read_text())
        write(FOLDER / f"{name}.golden.json", golden(Tokenizer.from_str(json.dumps(made)), decoded, name))

    # Every fifth text is enough for a variant, and all those written for one.
    listed = {}
    for name, (base, changes) in variants(bases).items():
        which = [i for i, s in enumerate(decoded) if i % 5 == len(listed) % 5 or ("added_tokens" in changes and "[" in s)]
        made = golden(Tokenizer.from_str(json.dumps(patched(bases[base], changes))), [decoded[i] for i in which], name)
        listed[name] = {"base": base, "changes": changes, "which": which, "golden": made}
        made["sequences"] = made["sequences"][:60] if "decoder" in changes else []
    write(FOLDER / "variants.json", listed)

    for folder in arguments.models:
        path = pathlib.Path(folder)
        write(FOLDER / f"model-{path.name}.golden.json", golden(Tokenizer.from_file(str(path / "tokenizer.json")), decoded, path.name))


if __name__ == "__main__":
    main()
