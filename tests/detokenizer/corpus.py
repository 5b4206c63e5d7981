"""Text in many scripts, and tokenizers trained on it here: no file and no network needed."""

import os
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

QWEN3 = os.environ.get("QWEN3_MODEL", "")
HAS_QWEN3 = (Path(QWEN3) / "tokenizer.json").is_file()

CORPUS = {
    "latin": "The naïve façade of Zoë's café cost £3.50 — “really?”\r\n\tÅngström, žluťoučký kůň, Việt Nam",
    "cyrillic": "Съешь ещё этих мягких французских булок, да выпей чаю. Ґанок і їжак",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· ἐν ἀρχῇ ἦν ὁ λόγος",
    "arabic": "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت — ١٢٣",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה, שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश, क्षत्रिय, ज्ञान",
    "tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "chinese": "天地玄黃,宇宙洪荒。日月盈昃,辰宿列張。𠜎𠜱𡿺 机器学习",
    "japanese": "いろはにほへと ちりぬるを、ガギグゲゴ か\u3099き\u3099 漢字カタカナ",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다 \u1112\u1161\u11ab",
    "amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ። ብላ ካለኝ እንደአባቴ በቆመጠኝ",
    "emoji": "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ☕️ 🧑🏿‍🚀 ❤️‍🔥 \U0001f9d1\u200d\u2764\ufe0f\u200d\U0001f9d1",
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343a\u0328\u0301lgo \u0e01\u0e33 \u200d\u200c\u2060\ufeff",
    "special": "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n<tool_call>{}</tool_call><|endoftext|>",
    "odd": "\x00\x01\x7f\ufffd\ufffd x \U0010ffff   \n\n\n" + "a" * 40,
}


def small_backend() -> Backend:
    """A byte-level BPE of 420 entries with holes in its vocabulary, special tokens, and added ones with odd letters."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS.values(),
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "<é｜>", "a b", "ÿ")])
    backend.add_special_tokens(["<|特殊|>"])
    return backend


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer(small_backend())


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """Characters for ASCII, tokens like `<0xE4>` for all else, as SentencePiece models with byte fallback have."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {character: 300 + place for place, character in enumerate(map(chr, range(0x21, 0x7F)))} | {"▁": 299}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


@cache
def qwen3_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(Path(QWEN3) / "tokenizer.json")
