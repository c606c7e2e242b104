"""Word-piece tokenizer of questions, learned from them: a vocabulary of hundreds where a model starts from nothing.

A plain tokenizers backend with no class of its own, so `AutoTokenizer` loads the saved files without regard.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import TokenizersBackend

SPECIAL_TOKENS = PAD_TOKEN, UNK_TOKEN, CLS_TOKEN, SEP_TOKEN = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def train_question_tokenizer(
    questions: Iterable[str], vocab_size: int = 512, model_max_length: int = 64
) -> TokenizersBackend:
    """Learn a tokenizer: lower case without accents, words cut into pieces that it knows, `[CLS] words [SEP]`.

    Words with a letter that no question has become `[UNK]`.

    Args:
        questions: texts to learn from.
        vocab_size: most entries.
        model_max_length: tokens that `truncation=True` leaves, `[CLS]` and `[SEP]` included.
    """
    backend = Tokenizer(WordPiece(unk_token=UNK_TOKEN))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator(questions, trainer)
    start, end = backend.token_to_id(CLS_TOKEN), backend.token_to_id(SEP_TOKEN)
    backend.post_processor = TemplateProcessing(
        single=f"{CLS_TOKEN} $A {SEP_TOKEN}", special_tokens=[(CLS_TOKEN, start), (SEP_TOKEN, end)]
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
