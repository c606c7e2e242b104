"""Tokenizer of questions, learned from them: a vocabulary of hundreds where a model starts from nothing.

A plain tokenizers backend with no class of its own, so `AutoTokenizer` loads the saved files without regard.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import TokenizersBackend

SPECIAL_TOKENS = PAD_TOKEN, UNK_TOKEN, CLS_TOKEN, SEP_TOKEN = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def train_question_tokenizer(
    questions: Iterable[str], vocab_size: int = 512, model_max_length: int = 64
) -> TokenizersBackend:
    """Learn a tokenizer: lower case without accents, `[CLS] words [SEP]`.

    It knows the letters and the most frequent words of the questions; other words become letters, and those with a
    letter that it does not know `[UNK]`. The same questions always give the same tokenizer (the `tokenizers` trainer
    orders what is equally frequent by chance), so that a training in several processes, or one that is resumed, agrees.

    Args:
        questions: texts to learn from.
        vocab_size: most entries; each letter takes two.
        model_max_length: tokens that `truncation=True` leaves, `[CLS]` and `[SEP]` included.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for question in questions for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(question))
    )
    frequency = Counter(letter for word in counts.elements() for letter in word)
    letters = sorted(frequency, key=lambda letter: (-frequency[letter], letter))
    letters = letters[: (vocab_size - len(SPECIAL_TOKENS)) // 2]
    entries = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    entries += words[: max(vocab_size - len(entries), 0)]
    vocab = {entry: index for index, entry in enumerate(entries)}
    backend = Tokenizer(WordPiece(vocab, unk_token=UNK_TOKEN))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.WordPiece()
    backend.post_processor = TemplateProcessing(
        single=f"{CLS_TOKEN} $A {SEP_TOKEN}",
        special_tokens=[(CLS_TOKEN, vocab[CLS_TOKEN]), (SEP_TOKEN, vocab[SEP_TOKEN])],
    )
    return TokenizersBackend(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        cls_token=CLS_TOKEN,
        sep_token=SEP_TOKEN,
        split_special_tokens=True,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


__all__ = ["train_question_tokenizer"]
