"""The character-level tokenizer of the shipped language model and its chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END, USER, ASSISTANT = "<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, END, USER, ASSISTANT)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = " " + LETTERS + "0123456789" + "'.,?!:;-\"()\n"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('user', 'assistant') -%}"
    "{{- raise_exception('role must be user or assistant, got ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""`<|user|>...<|end|><|assistant|>...<|end|>`: one token of markup a side, because context is paid for by the character."""


def build_tokenizer(model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character.

    Upper case is lowered, accents are taken off ("é" reads "e"), typographic quotes and dashes become plain ones, tabs become spaces; any
    other character is one `<|unk|>`. Decoding joins the characters again.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    plain = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\t": " ", "\r\n": "\n"}
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), *(normalizers.Replace(a, b) for a, b in plain.items())]
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
