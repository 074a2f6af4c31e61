"""Small tokenizers of every kind that base models have, trained on a few lines of text."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Text: my line is dead since this morning\nLabel: no connection\n\n",
    "why is it so? so it is, and that is that. yes, yo, you and I know what it was.\n",
    "Question: what is 12 + 30?\nAnswer: 42\n\nQuestion: who won?\nAnswer: they did, 3 to 1.\n\n",
    "<|user|>hello<|assistant|>\nhi there, how are you today?\n",
] * 20
ALGORITHMS = ("byte-level BPE", "Metaspace BPE", "WordPiece", "Unigram")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
#: Chat templates by how they end an answer.
TEMPLATES = {
    "none": None,
    "its own end": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "no end": "{{ bos_token }}{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
}


class Kind(NamedTuple):
    """What a tokenizer has and does."""

    algorithm: str
    adds_bos: bool
    adds_eos: bool
    has_pad: bool
    template: str


ALL = [Kind(*values) for values in product(ALGORITHMS, (True, False), (True, False), (True, False), TEMPLATES)]


@cache
def _backend(algorithm: str) -> str:
    common = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    if algorithm == "byte-level BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    elif algorithm == "WordPiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    else:
        is_bpe = algorithm == "Metaspace BPE"
        backend = Tokenizer(models.BPE(unk_token="<unk>") if is_bpe else models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(**common) if is_bpe else trainers.UnigramTrainer(unk_token="<unk>", **common)
    backend.train_from_iterator(TEXT, trainer)
    return backend.to_str()


def build(kind: Kind) -> PreTrainedTokenizerFast:
    """The tokenizer of that kind."""
    backend = Tokenizer.from_str(_backend(kind.algorithm))
    single = f"{'<s> ' if kind.adds_bos else ''}$A{' </s>' if kind.adds_eos else ''}"
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    more = {"pad_token": "<pad>"} if kind.has_pad else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:], clean_up_tokenization_spaces=False, **more,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES[kind.template]
    return tokenizer
