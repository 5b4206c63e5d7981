"""Trains the byte-level BPE tokenizer on the corpus and saves it in Hugging Face format.

python -m examples.tiny_model.tokenizer --output FOLDER
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.tiny_model.corpus import tokenizer_texts
from examples.tiny_model.template import TEMPLATE_FILE

VOCAB_SIZE = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens, left out of decoded text by default."""
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Tokens of their own that stay in decoded text, as in Qwen3."""

MAX_POSITIONS = 32768

# A word with the space before it; one digit; a run of signs with the space before it; line breaks; other spaces.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(seed: int = 0, documents: int = 40_000) -> Tokenizer:
    """A tokenizer of `VOCAB_SIZE` tokens: all 256 bytes, merges, then the special and markup tokens at the end.

    Digits never merge, so a number has one token a digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    added += [AddedToken(text, special=False, normalized=False) for text in MARKUP]
    markup = {token.content for token in added}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (_without(markup, text) for text in tokenizer_texts(seed, documents))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(added[: len(SPECIAL)])
    tokenizer.add_tokens(added[len(SPECIAL) :])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def _without(markup: set[str], text: str) -> str:
    for token in sorted(markup):
        text = text.replace(token, "\n")
    return text


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": text in SPECIAL,
            }
            for text in (*SPECIAL, *MARKUP)
        },
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": TEMPLATE_FILE.read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (default 0)")
    parser.add_argument("--documents", type=int, default=40_000, help="documents to train on (default 40,000)")
    arguments = parser.parse_args()
    save_tokenizer(train_tokenizer(arguments.seed, arguments.documents), arguments.output)


if __name__ == "__main__":
    main()
