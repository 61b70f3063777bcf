"""Chat templates for tokenizers that bring none: Jinja text, nothing else.

Both end every assistant turn with a token that stops generation, and neither rewrites
earlier turns, so that a rendered conversation starts with the rendering of its prefix.
"""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen's layout; the tokenizer needs `<|im_end|>` as one token that ends a sequence."""

PLAIN = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}"
    "{% else %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Works with any tokenizer: role names in words, the tokenizer's own end token."""

CHAT_TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
"""Templates by the name that `--data.chat-template` takes."""
