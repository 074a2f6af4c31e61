"""``prefixmemory chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from transformers import TextStreamer

from prefixmemory.adapters.loading import Adapter
from prefixmemory.errors import PrefixMemoryError, for_terminal
from prefixmemory.rows.chat_template import chat_prompt, has_chat_template
from prefixmemory.rows.collator import padding_id
from prefixmemory.rows.encoding import encode_prompt
from prefixmemory.rows.rendering import render_prompt
from prefixmemory.scoring.generation import AS_WRITTEN, GREEDY, AnswersIn, Sampling, end_tokens, room_for_answer
from prefixmemory.tuner.layers import set_scale

HELP = "/base switches the adapter off and on, /scale X sets a memory's scale, /reset forgets, /quit ends."


class Chat:
    """A conversation with an adapter; what was said is kept where the model has a chat template.

    An adapter that was trained on rows with text and label is asked one text at a time, as in training.
    """

    def __init__(self, adapter: Adapter, max_new_tokens: int, sampling: Sampling = GREEDY) -> None:
        self.adapter, self.max_new_tokens = adapter, max_new_tokens
        self._choice = sampling.options()  # once: a seed is one of the conversation, not of each answer
        self.remembers = has_chat_template(adapter.tokenizer) and adapter.row_format != "text"
        self.said: list[dict[str, str]] = []
        self.with_adapter = True

    def command(self, line: str) -> str:
        """Carry out ``/base``, ``/scale X`` or ``/reset``; returns what to tell the user.

        Raises:
            PrefixMemoryError: no such command, or a wrong number.
        """
        word, _, rest = line.strip().partition(" ")
        if word == "/base":
            self.with_adapter = not self.with_adapter
            return "The adapter answers." if self.with_adapter else "The base model answers."
        if word == "/reset":
            self.said = []
            return "Forgotten."
        if word == "/scale":
            if not self.adapter.is_memory:
                raise PrefixMemoryError(f"/scale sets the scale of a memory, and {self.adapter.name} is none.")
            try:
                scale = float(rest)
            except ValueError:
                raise PrefixMemoryError(f"/scale {rest}: give a number, such as /scale 0.5.") from None
            set_scale(self.adapter.model, scale)
            return f"The memory's scale is {scale:g}."
        raise PrefixMemoryError(f"{word} is no command. {HELP}")

    @torch.inference_mode()
    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Answer ``text``, and remember both."""
        tokenizer: Any = self.adapter.tokenizer
        if self.remembers:
            asked = [*self.said, {"role": "user", "content": text}]
            prompt = chat_prompt(asked, tokenizer, **self.adapter.chat_template_kwargs)
        else:
            prompt = render_prompt(text, self.adapter.row_format, tokenizer)
        read = encode_prompt(prompt, tokenizer)
        longest = room_for_answer(self.adapter.model, len(read), self.max_new_tokens)
        ids = torch.tensor([read], device=self.adapter.model.device)
        with nullcontext() if self.with_adapter else self.adapter.model.disable_adapter():
            written = self.adapter.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest,
                pad_token_id=padding_id(tokenizer),
                eos_token_id=end_tokens(self.adapter.model, tokenizer) or None,
                streamer=streamer,
                **self._choice,
            )
        answer = AnswersIn(tokenizer)(written[0, ids.shape[1] :])
        if self.remembers:
            self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer


class _Streamer(TextStreamer):
    """Prints words as they are written, and nothing that the terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer."""
        super().on_finalized_text(for_terminal(text), stream_end)


def chat(adapter: Adapter, max_new_tokens: int, sampling: Sampling = GREEDY) -> None:
    """Read lines from the terminal (or from standard input) and answer them until they end."""
    conversation = Chat(adapter, max_new_tokens, sampling)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        base = adapter.model.active_peft_config.base_model_name_or_path
        print(for_terminal(f"{adapter.name} on {base}. {HELP}"))
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            print(f"error: this is no {error.encoding} ({error.reason}). Type it again.")
            continue
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                print(for_terminal(conversation.command(line)))
            else:
                streamer = _Streamer(adapter.tokenizer, skip_prompt=True, **AS_WRITTEN)
                conversation.answer(line, streamer)
        except PrefixMemoryError as error:
            print(for_terminal(f"error: {error}", 2000))
        except KeyboardInterrupt:  # ctrl-C breaks off an answer, not the conversation
            print()
