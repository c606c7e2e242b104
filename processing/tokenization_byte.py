"""Byte-level tokenizer with 512 entries: 4 special tokens, the 256 bytes, 252 reserved tokens, which may have names.

A plain tokenizers backend with no class of its own, so `AutoTokenizer` loads the saved files without regard.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
BYTE_OFFSET = len(SPECIAL_TOKENS)
VOCAB_SIZE = 512


def build_byte_tokenizer(model_max_length: int = 1024, reserved: Sequence[str] = ()) -> TokenizersBackend:
    """Build the tokenizer: `<|pad|>` 0, `<|im_start|>` 1, `<|im_end|>` 2, `<|unk|>` 3, byte b 4 + b, others reserved.

    Text becomes `<|im_start|>`, its UTF-8 bytes, `<|im_end|>`. Special tokens spelled out in a text are encoded as
    their bytes, so every text that UTF-8 can hold survives `decode(encode(text), skip_special_tokens=True)`.

    Args:
        model_max_length: tokens that `truncation=True` leaves, start and end included.
        reserved: names of the first reserved tokens, 260, 261, ...
    """
    byte_characters = bytes_to_unicode()
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {byte_characters[byte]: BYTE_OFFSET + byte for byte in range(256)}
    vocab |= {f"<|reserved_{index}|>": index for index in range(BYTE_OFFSET + 256 + len(reserved), VOCAB_SIZE)}
    vocab |= {token: BYTE_OFFSET + 256 + index for index, token in enumerate(reserved)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A {EOS_TOKEN}",
        special_tokens=[(BOS_TOKEN, vocab[BOS_TOKEN]), (EOS_TOKEN, vocab[EOS_TOKEN])],
    )
    return TokenizersBackend(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


__all__ = ["build_byte_tokenizer"]
