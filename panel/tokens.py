"""The model's tokenizer and chat template: Llama 3's, at a vocabulary of 512."""

from __future__ import annotations

import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from panel.questions import NO_PICTURE_ANSWER, all_questions
from panel.truth import sample_truth

VOCABULARY = 512
BOS = "<|begin_of_text|>"
EOT = "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
IMAGE = "<image>"
SPECIAL = (BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT, PAD, IMAGE)

# Llama 3's pre-tokenizer, character by character: runtimes recognize it by this very text.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<image>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def _corpus() -> list[str]:
    rng = random.Random(0)
    texts = ["system", "user", "assistant", "\n\n", NO_PICTURE_ANSWER]
    for _ in range(200):
        for question in all_questions(sample_truth(rng)):
            texts += [question.text, question.answer]
    # Without digits in the corpus no merge can contain one: every digit stays a token of its own.
    return [re.sub(r"\d", "", text) for text in texts]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the questions and answers and wrap it for transformers."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # The corpus may run out of merges; reserved tokens fill the vocabulary, as in Llama 3.
    spare = VOCABULARY - len(SPECIAL) - tokenizer.get_vocab_size()
    reserved = tuple(f"<|reserved_special_token_{index}|>" for index in range(spare))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL + reserved])
    template = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": IMAGE},
    )
